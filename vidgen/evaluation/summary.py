"""Scores of single clips to the figures and the table of `vidgen eval toybox`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from vidgen.evaluation.judging import TASKS, answer_counts
from vidgen.evaluation.statistics import Rate, guess_rate, mean_interval
from vidgen.toybox.scenes import Scene

if TYPE_CHECKING:
    from rich.table import Table

Scores = Mapping[str, Sequence[dict[str, Any]]]

#: What the embedded model is held to; rates, decibels, and the jump's ratio, which is a ceiling.
FLOORS = {
    ("text", "place"): 0.97, ("text", "motion"): 0.90, ("text", "sprite"): 0.88,
    ("image", "motion"): 0.80, ("image", "last_sprite"): 0.88, ("image", "jump"): 1.3,
    ("vae", "psnr"): 30.0, ("vae", "mask_psnr"): 24.0, ("reserved", "psnr"): 27.0,
}  # fmt: skip
#: Which sources say how high a score can be: the judge on renders, and behind the VAE.
CEILINGS = {
    "text": ("render", "vae"), "held_out": ("render", "vae"), "image": ("render_end", None),
}  # fmt: skip


def summarise(
    scores: Scores, scenes: Mapping[str, Sequence[Scene]], trust: Mapping[str, Rate] | None
) -> dict[str, Any]:
    """Put scores together.

    Args:
        scores: by source; each clip's "right" answers, "answers", and "jump", "psnr", "mask_psnr".
        scenes: the same clips' scenes.
        trust: the judge's own accuracy.

    Returns:
        {"scores": {source: {measure: figure}}, "confusions": ...}; a figure has "value", "low",
        "high", "total" and, where known, "chance", "ceiling_render", "ceiling_vae", "floor".
    """
    figures: dict[str, dict[str, dict[str, Any]]] = {}
    for source, rows in scores.items():
        figures[source] = _figures(rows, scenes[source]) if rows else {}
    if trust is not None:
        figures["judge"] = {name: _rate(rate) for name, rate in trust.items() if rate.total}
    for source, sources in CEILINGS.items():
        for measure, figure in figures.get(source, {}).items():
            for name, other in zip(("render", "vae"), sources, strict=True):
                ceiling = figures.get(other or "", {}).get(measure)
                if ceiling is not None:
                    figure[f"ceiling_{name}"] = ceiling["value"]
    for (source, measure), floor in FLOORS.items():
        if measure in figures.get(source, {}):
            figures[source][measure]["floor"] = floor
    confusions = {
        source: {task: answer_counts(_pairs(rows, scenes[source], task)) for task in TASKS}
        for source, rows in scores.items()
    }
    return {"scores": figures, "confusions": confusions}


def truth(scene: Scene, measure: str) -> str:
    """What the scene's first actor, place or camera really is."""
    first = scene.actors[0]
    named = {"sprite": first.sprite, "last_sprite": first.sprite, "motion": first.motion,
             "place": scene.place, "camera": scene.camera}  # fmt: skip
    return named[measure]


def _figures(
    rows: Sequence[dict[str, Any]], scenes: Sequence[Scene]
) -> dict[str, dict[str, Any]]:
    figures = {}
    for measure in rows[0]["right"]:
        figures[measure] = _rate(Rate.of(row["right"][measure] for row in rows))
        figures[measure]["chance"] = guess_rate(truth(scene, measure) for scene in scenes)
    for measure in ("psnr", "mask_psnr"):
        values = [row[measure] for row in rows if math.isfinite(row.get(measure, math.nan))]
        if values:
            low, high = mean_interval(values)
            figures[measure] = {
                "value": fmean(values), "low": low, "high": high, "total": len(values)
            }
    if "jump" in rows[0]:
        jumps = sorted(row["jump"] for row in rows)
        low, high = _median_interval(jumps)
        figures["jump"] = {"value": median(jumps), "low": low, "high": high, "total": len(jumps)}
    return figures


def _rate(rate: Rate) -> dict[str, Any]:
    low, high = rate.interval
    return {"value": rate.rate, "low": low, "high": high, "total": rate.total}


def _median_interval(ranked: Sequence[float]) -> tuple[float, float]:
    """95% interval of a median by order statistics, ranks n / 2 +- 1.96 sqrt(n) / 2."""
    count = len(ranked)
    half = 1.96 * math.sqrt(count) / 2
    low, high = math.floor(count / 2 - half), math.ceil(count / 2 + half)
    return ranked[max(0, low)], ranked[min(count - 1, high)]


def _pairs(
    rows: Sequence[dict[str, Any]], scenes: Sequence[Scene], task: str
) -> list[tuple[str, str]]:
    return [(truth(s, task), row["answers"][task]) for s, row in zip(scenes, rows, strict=True)]


def reached(measure: str, figure: Mapping[str, Any]) -> bool | None:
    """Whether a figure is as good as its floor; None without one."""
    if "floor" not in figure:
        return None
    better = figure["value"] <= figure["floor"] if measure == "jump" else (
        figure["value"] >= figure["floor"])  # fmt: skip
    return bool(better)


def table(result: Mapping[str, Any]) -> Table:
    """The figures as a table for people."""
    from rich.table import Table

    columns = ("clips", "measure", "score", "95% interval", "n", "chance", "judge on renders",
               "behind the VAE", "floor")  # fmt: skip
    drawn = Table(title=f"Toybox, {result['model']['name']}, split {result['split']}")
    for column in columns:
        drawn.add_column(column, justify="left" if column in columns[:2] else "right")
    for source, figures in result["scores"].items():
        for measure, figure in figures.items():
            met = reached(measure, figure)
            style = None if met is None else ("green" if met else "red")
            show = _show(measure)
            drawn.add_row(
                source, measure, show(figure["value"]),
                f"{show(figure['low'])} .. {show(figure['high'])}", str(figure["total"]),
                *(show(figure.get(name)) for name in
                  ("chance", "ceiling_render", "ceiling_vae", "floor")),
                style=style,
            )  # fmt: skip
        drawn.add_section()
    return drawn


def _show(measure: str) -> Any:
    decibels, ratio = "psnr" in measure, measure == "jump"

    def show(value: float | None) -> str:
        if value is None:
            return ""
        if decibels:
            return f"{value:.1f} dB"
        return f"{value:.2f}" if ratio else f"{100 * value:.1f}%"

    return show
