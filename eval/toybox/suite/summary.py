"""Scores of single clips to the figures of `python -m eval.toybox`; `table` shows them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any, Literal

import numpy as np

from eval.toybox.metrics.drift import LOOKS
from eval.toybox.metrics.identity import DISTANCES, stranger_overlap
from eval.toybox.metrics.paths import path_of
from eval.toybox.metrics.sync import score_sync, sync_intervals
from eval.toybox.rates import Rate, guess_rate, median_interval
from eval.toybox.suite.items import CEILINGS
from eval.toybox.suite.judging import answer_counts
from eval.toybox.suite.weak_spots import weak_spots
from train.toybox.world.ambience import ambience_of
from train.toybox.world.scenes import Scene
from vidgen.evaluation.statistics import mean_interval, paired_interval, rate_interval

Row = Mapping[str, Any]
Figure = dict[str, Any]
Scores = Mapping[str, Sequence[dict[str, Any]]]


@dataclass(frozen=True)
class Number:
    """A measure that is no rate.

    Attributes:
        unit: "dB", "%", "x" (a ratio), "ms" or "" (none); values of "%" are shares.
        centre: of the clips' values.
        better: which way.
    """

    unit: Literal["dB", "%", "x", "ms", ""]
    centre: Literal["mean", "median"] = "mean"
    better: Literal["more", "less"] = "more"


NUMBERS: dict[str, Number] = {
    "psnr": Number("dB"), "mask_psnr": Number("dB"), "first_psnr": Number("dB"),
    "first_ssim": Number(""),
    "jump": Number("x", "median", "less"),
    "path_off": Number("%", "mean", "less"),
    "fall_off": Number("%", "mean", "less"), "gravity_spread": Number("%", "median", "less"),
    **{f"identity_{d}": Number("%") for d in DISTANCES},
    "shape": Number(""),
    **{f"{name}_drift": Number("%", "mean", "less") for name in LOOKS},
    "joins": Number("x", "mean", "less"),
}  # fmt: skip
#: Measures of all clips together.
SYNC: dict[str, Number] = {
    "sync_median": Number("ms", "median", "less"), "sync_bias": Number("ms", "median", "less"),
    "sync_f1": Number("%"),
}  # fmt: skip
UNITS = NUMBERS | SYNC
#: What the embedded model is held to; of what is better small it is a ceiling.
FLOORS = {
    ("text", "place"): 0.97, ("text", "motion"): 0.90, ("text", "sprite"): 0.88,
    ("image", "motion"): 0.80, ("image", "last_sprite"): 0.88, ("image", "jump"): 1.3,
    ("vae", "psnr"): 30.0, ("vae", "mask_psnr"): 24.0, ("reserved", "psnr"): 27.0,
    ("sound", "sync_median"): 40.0, ("sound", "sync_f1"): 0.8,
    ("sound", "voice"): 0.8, ("sound", "ambience"): 0.8,
}  # fmt: skip
#: Figures that are differences of two sources of pairs, and what the two are called in them.
DIFFERENCES = {
    "triples": {"seen": "seen_triples", "held_out": "held_triples"},
    "phrasings": {"grammar": "grammar", "phrased": "phrased"},
}


def summarise(
    scores: Scores, scenes: Mapping[str, Sequence[Scene]], trust: Mapping[str, Rate] | None,
    kinds: Sequence[str] = (),
) -> dict[str, Any]:
    """Put scores together.

    Args:
        scores: by source, a row for each clip; see `scoring`.
        scenes: the same clips' scenes; clips of one scene are alike, and intervals take them so.
        trust: the judge's own accuracy.
        kinds: of phrasings, clip by clip.

    Returns:
        {"scores": {source: {measure: figure}}, "confusions", "outcomes", "weak_spots"}; a figure
        has "value", "low" and "high" (None of one clip), "total" and, where known, "chance",
        "ceiling_render", "ceiling_vae", "floor".
        "outcomes" has of each source and rate a character a clip, in their order: 1 right, 0 wrong,
        - where the rate has no meaning. "weak_spots" is what `weak_spots` gives.
        "triples" has what is lost on held-out ones: the difference of "seen" and "held_out";
        "phrasings" likewise what the "grammar" has over the "phrased", and "phrasings, typos" and
        so on the same kind by kind.
    """
    figures: dict[str, dict[str, Figure]] = {}
    for source, rows in scores.items():
        figures[source] = _figures(rows, scenes[source]) if rows else {}
    for name, sides in DIFFERENCES.items():
        if all(scores.get(source) for source in sides.values()):
            both = {side: scores[source] for side, source in sides.items()}
            pairs = scenes[next(iter(sides.values()))]
            figures |= _differences(name, both, pairs, kinds if name == "phrasings" else ())
    if trust is not None:
        figures["judge"] = {name: _rate(rate) for name, rate in trust.items() if rate.total}
    for source, sources in CEILINGS.items():
        for measure, figure in figures.get(source, {}).items():
            for name, other in zip(("render", "vae"), sources, strict=True):
                ceiling = figures.get(other, {}).get(measure)
                if ceiling is not None:
                    figure[f"ceiling_{name}"] = ceiling["value"]
    for (source, measure), floor in FLOORS.items():
        if measure in figures.get(source, {}):
            figures[source][measure]["floor"] = floor
    return {
        "scores": figures,
        "confusions": {name: _confusions(rows, scenes[name]) for name, rows in scores.items()},
        "outcomes": {name: _outcomes(rows) for name, rows in scores.items()},
        "weak_spots": weak_spots(scores, scenes),
    }


def truth(scene: Scene, measure: str) -> str | None:
    """What the scene really shows; of two actors both names. None of what is no class."""
    sprites = " + ".join(sorted({actor.sprite for actor in scene.actors}))
    named = {
        **dict.fromkeys(("sprite", "first_sprite", "last_sprite", "voice"), sprites),
        "motion": " + ".join(sorted({actor.motion for actor in scene.actors})),
        "path": path_of(scene.actors[0].motion), "place": scene.place, "camera": scene.camera,
        "ambience": ambience_of(scene.place),
    }  # fmt: skip
    return named.get(measure)


def reached(measure: str, figure: Mapping[str, Any]) -> bool | None:
    """Whether a figure is as good as its floor; None without one."""
    if "floor" not in figure:
        return None
    less = measure in UNITS and UNITS[measure].better == "less"
    better = figure["value"] <= figure["floor"] if less else figure["value"] >= figure["floor"]
    return bool(better)


def _figures(rows: Sequence[Row], scenes: Sequence[Scene]) -> dict[str, Figure]:
    found: dict[str, Figure] = {}
    for measure in dict.fromkeys(name for row in rows for name in row["right"]):
        right, shown = zip(*((bool(row["right"][measure]), scene) for row, scene
                             in zip(rows, scenes, strict=True) if measure in row["right"]),
                           strict=True)  # fmt: skip
        low, high = rate_interval(right, shown)
        found[measure] = {"value": fmean(right), "low": low, "high": high, "total": len(right)}
        labels = [truth(scene, measure) for scene in shown]
        if labels[0] is not None:
            found[measure]["chance"] = guess_rate(labels)
    for measure, number in NUMBERS.items():
        known = [(row[measure], scene) for row, scene in zip(rows, scenes, strict=True)
                 if row.get(measure) is not None and math.isfinite(row[measure])]
        if known:
            values, shown = zip(*known, strict=True)
            found[measure] = _spread(values, shown, number.centre)
    answers = [row["shows"] for row in rows if row.get("shows")]
    if len(answers) > 1:
        chance = stranger_overlap(answers)
        for figure in (found[f"identity_{d}"] for d in DISTANCES if f"identity_{d}" in found):
            figure["chance"] = chance
    strangers = [row["stranger_shape"] for row in rows if row.get("stranger_shape") is not None]
    if "shape" in found and strangers:
        found["shape"]["chance"] = fmean(strangers)
    if "seen_s" in rows[0]:
        found |= _sync(rows, scenes)
    return found


def _spread(values: Sequence[float], scenes: Sequence[Scene], centre: str) -> Figure:
    groups = scenes if len(set(scenes)) > 1 else None  # of a single one clips are what is drawn
    if centre == "mean":
        value, within = fmean(values), mean_interval(values, groups=groups)
    else:
        value, within = median(values), median_interval(values, groups)
    low, high = (edge if math.isfinite(edge) else None for edge in within)  # JSON knows no infinity
    return {"value": value, "low": low, "high": high, "total": len(values)}


def _rate(rate: Rate) -> Figure:
    low, high = rate.interval
    return {"value": rate.rate, "low": low, "high": high, "total": rate.total}


def _differences(
    name: str, sides: Mapping[str, Sequence[Row]], scenes: Sequence[Scene], kinds: Sequence[str]
) -> dict[str, dict[str, Figure]]:
    """By how much the first side is better than the second, pair by pair; then kind by kind."""
    parts: dict[str, Sequence[int]] = {name: range(len(next(iter(sides.values()))))}
    for kind in dict.fromkeys(kinds):
        parts[f"{name}, {kind}"] = [i for i, each in enumerate(kinds) if each == kind]
    return {
        part: _difference({side: [rows[i] for i in chosen] for side, rows in sides.items()},
                          [scenes[i] for i in chosen])
        for part, chosen in parts.items()
    }  # fmt: skip


def _difference(
    sides: Mapping[str, Sequence[Row]], scenes: Sequence[Scene]
) -> dict[str, Figure]:
    (first, ones), (second, others) = sides.items()
    found = {}
    for measure in ones[0]["right"]:
        a, b = ([float(row["right"][measure]) for row in rows] for rows in (ones, others))
        low, high = paired_interval(a, b, groups=scenes)
        found[measure] = {
            "value": fmean(a) - fmean(b), "low": low, "high": high, "total": len(a),
            first: fmean(a), second: fmean(b),
        }  # fmt: skip
    return found


def _sync(rows: Sequence[Row], scenes: Sequence[Scene]) -> dict[str, Figure]:
    """Sound against picture over all clips, in ms; chance is the score of shuffled clips."""
    seen, heard = ([np.array(row[key]) for row in rows] for key in ("seen_s", "heard_s"))
    duration = rows[0]["duration_s"]
    score = score_sync(seen, heard, duration)
    within = sync_intervals(seen, heard, duration, groups=scenes)
    found = {}
    for name, value, floor, scale in (
        ("median_s", score.median_s, score.floor_median_s, 1e3),
        ("bias_s", score.bias_s, None, 1e3), ("f1", score.f1, score.floor_f1, 1.0),
    ):  # fmt: skip
        if math.isnan(value):
            continue
        low, high = (None if math.isnan(edge) else scale * edge for edge in within[name])
        figure = {"value": scale * value, "low": low, "high": high, "total": score.pairs}
        if floor is not None and not math.isnan(floor):
            figure["chance"] = scale * floor
        found[f"sync_{name.removesuffix('_s')}"] = figure
    return found


def _outcomes(rows: Sequence[Row]) -> dict[str, str]:
    signs = {True: "1", False: "0", None: "-"}
    measures = dict.fromkeys(name for row in rows for name in row["right"])
    return {name: "".join(signs[row["right"].get(name)] for row in rows) for name in measures}


def _confusions(
    rows: Sequence[Row], scenes: Sequence[Scene]
) -> dict[str, dict[str, dict[str, int]]]:
    """By task which truth got which wrong answer, in clips of one actor."""
    alone = [(s, r["answers"]) for s, r in zip(scenes, rows, strict=True) if len(s.actors) == 1]
    tasks = dict.fromkeys(task for _, answers in alone for task in answers)
    return {
        task: answer_counts([(str(truth(scene, task)), answers[task])
                             for scene, answers in alone if task in answers])
        for task in tasks
    }  # fmt: skip
