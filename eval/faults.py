"""Which temporal measure sees which fault, and whether it ranks the fault's grades.

    python -m eval.faults -o faults.json --report faults.html [--clips 24] [--size 128] [--decoded]

Renders Toybox clips, plants faults of five grades in each, takes all measures of
`vidgen eval temporal` and correlates mean measure and grade (Spearman); of late sound those of
`eval.toybox.metrics.sync`, on clips of bouncing sprites. From 0.9 on, the right way
round, a measure ranks the fault; all others are shown as not ranking it. With --decoded the clips
go through H.264 first. About 15 s a clip of 33 frames of 128x128 on one core.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray

from eval.toybox.judge import embedded_judge
from eval.toybox.metrics.bounces import bounce_times
from eval.toybox.metrics.sync import SyncScore, bouncing_scenes, score_sync
from train.toybox.world.cues import SAMPLE_RATE
from train.toybox.world.render import render
from train.toybox.world.scenes import SEED_RANGES, WORLD_VERSION, Scene, is_valid, sample_scenes
from train.toybox.world.sound import synthesize
from vidgen.core import pages
from vidgen.core.errors import exit_code
from vidgen.core.pages import Chart
from vidgen.core.runtime import atomic_write, check_output, fingerprint
from vidgen.evaluation.metrics.clip import MEASURES_VERSION, measure_clip
from vidgen.evaluation.metrics.flow import FlowEstimator
from vidgen.evaluation.metrics.vbench import MEASURES
from vidgen.media.clip import Clip
from vidgen.media.onsets import find_onsets
from vidgen.media.types import ClipInfo
from vidgen.media.write import write_clip
from vidgen.pipeline.codec import to_frames

FPS = Fraction(12)
RANKED = 0.9
FIRST_SEED = SEED_RANGES["dev"][0] + 9_000_000


STAND_INS = ("cat", "dog", "car", "rocket", "fish", "balloon")
Plant = Callable[["Shown", float], Any]


class Shown:
    """A clip, and what its faults are made of.

    Attributes:
        frames: uint8 [T, H, W, 3].
        other: the same with another sprite, which moves alike.
    """

    def __init__(self, scene: Scene, num_frames: int, side: int) -> None:
        first = scene.actors[0]
        sprite = next(
            name for name in STAND_INS if name != first.sprite and is_valid(name, first.motion)
        )
        self.frames, self.other = (
            to_frames(render([shot], num_frames, side, side, float(FPS)).video[0]).numpy()
            for shot in (scene, scene.recast(sprite))
        )


def shifted_levels(frames: Any, levels: Any) -> Any:
    """Frames [T, H, W, 3] plus levels, [T] or [T, 3], turned round where the picture is bright."""
    way = 1 if frames.mean() < 128 else -1
    levels = np.asarray(levels, dtype=np.float32)
    levels = levels.reshape(len(frames), 1, 1, -1) * way
    return np.clip(frames + levels, 0, 255).round().astype(np.uint8)


def mixed(frames: Any, others: Any, shares: Any) -> Any:
    """Frames [T, H, W, 3] with a share [T] of others."""
    shares = np.asarray(shares, dtype=np.float32).reshape(-1, 1, 1, 1)
    return (frames * (1 - shares) + others * shares).round().astype(np.uint8)


def flicker(shown: Shown, levels: float) -> Any:
    """Every second frame is brighter."""
    return shifted_levels(shown.frames, np.arange(len(shown.frames)) % 2 * levels)


def frozen(shown: Shown, share: float) -> Any:
    """A frame near the start is held for a share of the clip, and time goes on."""
    out = shown.frames.copy()
    start = len(out) // 4
    out[start : start + 1 + round(share * len(out))] = out[start]
    return out


def pop(shown: Shown, opacity: float) -> Any:
    """The sprite is another for two frames, and itself again."""
    middle = len(shown.frames) // 2
    shares = np.zeros(len(shown.frames))
    shares[middle : middle + 2] = opacity
    return mixed(shown.frames, shown.other, shares)


def morph(shown: Shown, share: float) -> Any:
    """The sprite turns into another little by little, by a share at the end."""
    return mixed(shown.frames, shown.other, np.linspace(0, share, len(shown.frames)))


def color_drift(shown: Shown, levels: float) -> Any:
    """Red goes one way and blue the other, to so many levels at the end."""
    ramp = np.linspace(0, levels, len(shown.frames))
    return shifted_levels(shown.frames, np.stack([ramp, 0 * ramp, -ramp], axis=1))


def jitter(shown: Shown, pixels: float) -> Any:
    """Each frame is off its place by chance, with so many pixels of deviation."""
    flows = FlowEstimator()
    ways = np.random.default_rng(0).normal(0, pixels, (len(shown.frames), 2)).astype(np.float32)
    size = shown.frames.shape[1:3]
    pairs = zip(shown.frames, ways, strict=True)
    return np.stack([flows.warp(f, np.broadcast_to(w, (*size, 2)).copy()) for f, w in pairs])


def seam(shown: Shown, levels: float) -> Any:
    """The second half is brighter."""
    count = len(shown.frames)
    return shifted_levels(shown.frames, np.where(np.arange(count) < count // 2, 0, levels))


def first_frame(shown: Shown, share: float) -> Any:
    """The clip begins with another picture than it was given: its colours change places."""
    out = shown.frames.copy()
    out[:1] = mixed(out[:1], np.roll(out[:1], 1, axis=-1), [share])
    return out


_LEVELS, _SHARES = (0, 3, 6, 12, 24, 48), (0, 0.2, 0.4, 0.6, 0.8, 1.0)
#: fault -> how it is planted, and its grades, of which the first is none
PLANTS: dict[str, tuple[Plant, tuple[float, ...]]] = {
    "flicker": (flicker, _LEVELS),
    "frozen": (frozen, (0, 0.1, 0.2, 0.3, 0.4, 0.5)),
    "pop": (pop, _SHARES),
    "morph": (morph, _SHARES),
    "color drift": (color_drift, _LEVELS),
    "jitter": (jitter, (0, 0.5, 1, 2, 3, 4)),
    "seam": (seam, _LEVELS),
    "first frame": (first_frame, _SHARES),
}


SOUND_OFFSET, OFFSETS = "sound offset", (0, 0.02, 0.04, 0.06, 0.08, 0.1)
"""Seconds by which sound is late, within what is still paired (`metrics.sync.LATE_S`)."""


def encoded(frames: Any) -> Any:
    """Frames after H.264, as a file holds them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "clip.mp4")
        write_clip(path, [frames], ClipInfo(FPS, frames.shape[2:0:-1], len(frames)))
        return Clip.from_file(path).frames


def scenes(count: int) -> Iterator[Scene]:
    """Scenes whose sprite really moves, and that no model was trained on."""
    pool = sample_scenes(FIRST_SEED, 4 * count + 16)
    return (s for s, _ in zip((s for s in pool if s.actors[0].motion != "stays"), range(count),
                              strict=False))  # fmt: skip


def take(shown: Shown, frames: Any, decode: bool) -> dict[str, float | None]:
    """All figures of frames [T, H, W, 3] that were to begin as the clip does."""
    frames = encoded(frames) if decode else frames
    return measure_clip(iter(frames), FPS, image=shown.frames[0]).figures


def spearman(values: Sequence[float], others: Sequence[float]) -> float | None:
    """Rank correlation (Spearman 1904), ties by mean rank; None where one side is constant."""
    a, b = (_mean_ranks(np.asarray(side, dtype=np.float64)) for side in (values, others))
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / scale if scale else None


def _mean_ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    below = (values[:, None] > values).sum(axis=1)
    alike = (values[:, None] == values).sum(axis=1)
    return below + (alike - 1) / 2


def measure(clips: int, num_frames: int, side: int, decode: bool) -> dict[str, Any]:
    """Responses of all measures to all faults: {fault: {measure: {mean, spearman, ranks}}}."""
    rows: dict[str, list[list[dict[str, float | None]]]] = {fault: [] for fault in PLANTS}
    for index, scene in enumerate(scenes(clips)):
        shown = Shown(scene, num_frames, side)
        clean = take(shown, shown.frames, decode)
        for fault, (plant, grades) in PLANTS.items():
            faulty = [take(shown, plant(shown, grade), decode) for grade in grades[1:]]
            rows[fault].append([clean, *faulty])
        if sys.stderr.isatty():
            print(f"\r{index + 1}/{clips}", end="", file=sys.stderr)
    responses = {fault: respond(table, PLANTS[fault][1]) for fault, table in rows.items()}
    return {
        "clips": clips, "frames": num_frames, "size": [side, side], "fps": str(FPS),
        "decoded": decode, "first_seed": FIRST_SEED, "world_version": WORLD_VERSION,
        "measures_version": MEASURES_VERSION, "grades": {f: g for f, (_, g) in PLANTS.items()},
        "responses": responses, "opencv": version_of_opencv(), "machine": fingerprint(),
    }


def sound_offset(clips: int) -> dict[str, dict[str, Any]]:
    """How the ruler for sound and picture takes sound that comes later and later.

    Args:
        clips: rendered clips of bouncing sprites, with their own sound.

    Returns:
        {measure: {mean, clips, spearman, ranks}}, means in seconds and shares.
    """
    scenes, judge = bouncing_scenes(FIRST_SEED, clips), embedded_judge().load()
    seen = [t for s in scenes for t in bounce_times(judge, render([s]).video, float(FPS))]
    sound, scores = synthesize(scenes), list[SyncScore]()
    for grade in OFFSETS:
        late = F.pad(sound, (round(grade * SAMPLE_RATE), 0))[:, : sound.shape[1]]
        scores.append(score_sync(seen, find_onsets(late, SAMPLE_RATE), 32 / float(FPS)))
    found = {}
    for name, way in (("sync_median", 1), ("sync_bias", 1), ("sync_f1", -1)):
        mean = [getattr(s, name.removeprefix("sync_") + "_s" * (way > 0)) for s in scores]
        rho = spearman(OFFSETS, mean)
        ranks = rho is not None and way * rho >= RANKED
        found[name] = {"mean": mean, "clips": clips, "spearman": rho, "ranks": ranks}
    return found


def version_of_opencv() -> str:
    """Of which the flow's figures hang."""
    import cv2

    return str(cv2.__version__)


def respond(
    table: Sequence[Sequence[dict[str, float | None]]], grades: Sequence[float]
) -> dict[str, dict[str, Any]]:
    """Mean response to each grade, over the clips that have all, and whether it ranks them.

    Args:
        table: figures by clip and grade.
        grades: of the fault.
    """
    found = {}
    for measure_name, kind in MEASURES.items():
        curves = [[figures.get(measure_name) for figures in graded] for graded in table]
        known = [curve for curve in curves if None not in curve]
        if not known:
            continue
        mean = [float(value) for value in np.mean(np.asarray(known, dtype=np.float64), axis=0)]
        rho = spearman(grades, mean)
        way = -1 if kind.better == "more" else 1
        ranks = rho is not None and kind.better != "neither" and way * rho >= RANKED
        found[measure_name] = {"mean": mean, "clips": len(known), "spearman": rho, "ranks": ranks}
    return found


def page(result: dict[str, Any]) -> str:
    """Return a page of the curves: for each fault those that rank it, then the others, pale."""
    sections = []
    for fault, responses in result["responses"].items():
        grades, charts = result["grades"][fault], []
        for name, row in sorted(responses.items(), key=lambda pair: not pair[1]["ranks"]):
            verdict = "ranks it" if row["ranks"] else "doesn't rank it"
            rho = "constant" if row["spearman"] is None else f"{row['spearman']:+.2f}"
            points = list(zip(grades, row["mean"], strict=True))
            charts.append(Chart(f"{name} against grade: {rho}", [(verdict, points)],
                                is_faded=not row["ranks"]))
        sections.append((fault, charts))
    return pages.page(
        "charts", title="Planted faults", sections=sections,
        intro=f"{result['clips']} clips. A measure ranks a fault where Spearman's correlation of "
        f"grade and mean is {RANKED} or more, the right way.")


def main() -> None:
    """Measure, write the results, show which measure ranks which fault."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("-o", "--output", required=True, metavar="JSON")
    parser.add_argument("--report", metavar="HTML", help="the curves as a page")
    parser.add_argument("--clips", type=int, default=24, metavar="N")
    parser.add_argument("--frames", type=int, default=33, metavar="N")
    parser.add_argument("--size", type=int, default=128, metavar="SIDE")
    parser.add_argument("--decoded", action="store_true", help="measure what H.264 leaves of them")
    parser.add_argument("--overwrite", action="store_true")
    args = parser.parse_args()
    for path in (args.output, args.report):
        if path is not None:
            check_output(path, overwrite=args.overwrite)
    result = measure(args.clips, args.frames, args.size, args.decoded)
    result["responses"][SOUND_OFFSET] = sound_offset(args.clips)
    result["grades"][SOUND_OFFSET] = OFFSETS
    atomic_write(args.output, (json.dumps(result, indent=1) + "\n").encode())
    if args.report is not None:
        atomic_write(args.report, page(result).encode())
    for fault, responses in result["responses"].items():
        ranking = [name for name, row in responses.items() if row["ranks"]]
        others = [n for n, r in responses.items() if not r["ranks"]]
        print(f"{fault}\n  ranked by {', '.join(ranking) or 'none'}\n  not by {', '.join(others)}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
