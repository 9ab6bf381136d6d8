"""Measure what chaining clips does to a picture: drift, flicker at the joins, identity.

    python eval/extension.py --seeds 50 --windows 8 -o extension.json --sheet extension.png

Each seed is a benchmark prompt of the Toybox world whose motion and camera can go on for ever (what
moves left is gone after one window; `--scenes any` takes all), made as one clip of K windows in
five ways:
    pixels   each window begins with the last frames of the one before, decoded and encoded again
    latents  windows hand over latents (`vidgen extend` with --colour-hold 0 --no-anchor)
    held     the same, colours held to the first window's (--no-anchor)
    anchored the same, and each window is shown the clip's first frame (as by default, in models
             that were taught to keep to it)
    rolled   the model's roller, turn by turn, beside them
All ways share the first window: made from the prompt, or rendered (`--start render`) so that what
follows shows how a true picture is kept. `truth` is a render as long as the clips: what moving
sprites and cameras do to the same figures by themselves.

Figures of a clip, in units of the range: `brightness`, `contrast`, `saturation` and `sharpness`,
each the mean of its last window less that of its first; `joins`, the mean change from the frame
before a join to the one behind it over that between other latent frames of the windows; `same`,
whether the judge names the same sprite in the first and in the last window; `right`, whether the
last window shows the prompt's sprites. A run that was killed goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from vidgen.core.request import Request
from vidgen.core.runtime import atomic_path, atomic_write, fingerprint
from vidgen.diffusion.oversampling import Pace
from vidgen.evaluation.rulers.drift import LOOKS, Windows, looks, measure_drift
from vidgen.evaluation.score_log import ScoreLog
from vidgen.evaluation.statistics import Rate, mean_interval
from vidgen.evaluation.toybox.items import endless_prompts
from vidgen.media.clip import Clip
from vidgen.media.sheet import contact_sheet
from vidgen.pipeline.inputs import Inputs, as_video
from vidgen.pipeline.long.extend import COLOUR_HOLD, OVERLAP, LongClip, window_size
from vidgen.pipeline.long.tail import ANCHOR_TASK, TAIL_FRAMES, Beginning, colours_of
from vidgen.pipeline.video import Engine, load, to_frames
from vidgen.toybox.judge import Judge, embedded_judge
from vidgen.toybox.render import render
from vidgen.toybox.scenes import Scene
from vidgen.training.program import exit_code

WAYS = ("pixels", "latents", "held", "anchored", "rolled")
COLOURS = {"truth": "#888888", "pixels": "#d62728", "latents": "#1f77b4", "held": "#2ca02c",
           "anchored": "#9467bd", "rolled": "#ff7f0e"}
SHEET_SEEDS = 6


@dataclass(frozen=True)
class Settings:
    """What a run measures; all of it addresses its scores."""

    model: str
    seeds: int
    windows: int
    start: str
    scenes: str
    steps: int | None
    overlap: int
    hold: float
    dtype: str | None


class Chain:
    """Makes one seed's clip in each way."""

    def __init__(self, engine: Engine, settings: Settings, seed: int, scene: Scene, text: str):
        self.engine, self.settings, self.scene = engine, settings, scene
        self.t = engine.vae_config.strides.t
        self.size = window_size(engine.folder, engine.vae_config.strides)
        self.windows = Windows(self.size, settings.overlap, settings.windows, self.t)
        self.request = Request.of(text, {
            "seed": seed, "steps": settings.steps, "overlap": settings.overlap,
            "frames": self.windows.num_frames,
        })  # fmt: skip
        self.plan = engine.plan(self.request, Inputs())
        self.contexts = engine.encode_prompt(self.plan)

    @cached_property
    def first(self) -> Tensor:
        """Latents of the first window."""
        if self.settings.start == "render":
            return self.encode(self.truth(self.windows.length))
        span = replace(self.plan.latents, num_frames=self.size)
        plan = replace(self.plan, latents=span, num_frames=self.windows.length)
        return self.sample(plan, self.engine.prepare(plan, self.request, Inputs())).cpu()

    def sample(self, plan: Any, state: Any) -> Tensor:
        """Denoise one window."""
        return self.engine.sample(plan, state, self.contexts)

    def make(self, way: str) -> Tensor:
        """The whole clip, [1, 3, T, H, W] in [-1, 1] on the CPU."""
        if way == "truth":
            return self.truth(self.plan.num_frames)
        if way == "pixels":
            return self.by_pixels()
        if way == "rolled":
            return self.rolled()
        hold = 0.0 if way == "latents" else self.settings.hold
        request = replace(self.request, colour_hold=hold, anchor=way == "anchored")
        long = LongClip(self.engine, self.plan, request, Inputs())
        return self.decode(long.sample(self.sample, done=self.first))

    def by_pixels(self) -> Tensor:
        """Chain as most programs do: the last frames, as a file holds them, are encoded again."""
        video = self.decode(self.first)
        request = replace(self.request, colour_hold=0.0, anchor=False)
        while video.shape[2] < self.plan.num_frames:
            count = 1 + (min(TAIL_FRAMES, self.size) - 1) * self.t
            ending = (((video[:, :, -count:] + 1) * 127.5).round() / 127.5) - 1
            latents = self.encode(ending)
            shown = video.shape[2]
            begun = Beginning(
                latents, shown, 1 + (shown - 1) // self.t, 0, colours_of(latents), "pixels",
                pace=Pace(self.plan.oversampling),
            )
            stop = shown + (self.size - self.settings.overlap) * self.t
            long = LongClip(
                self.engine, replace(self.plan, kept_frames=stop), request, Inputs(), begun
            )
            video = torch.cat([video, self.decode(long.sample(self.sample))[:, :, count:]], dim=2)
        return video

    def rolled(self) -> Tensor:
        """Have the model's roller make a clip as long."""
        request = replace(self.request, roll=True, overlap=None, steps=None)
        clip = self.engine.generate(request)
        assert isinstance(clip, Clip)
        return as_video(clip.frames)

    def encode(self, video: Tensor) -> Tensor:
        """Latents at the rate that clips are drawn at, on the CPU."""
        return self.engine.encode_video(video, oversampling=self.plan.oversampling).cpu()

    def decode(self, latents: Tensor) -> Tensor:
        """Video [1, 3, T, H, W] in [-1, 1] on the CPU."""
        parts = self.engine.decode_video(latents, oversampling=self.plan.oversampling)
        return torch.cat([part.float().clamp(-1, 1).cpu() for part in parts], dim=2)

    def truth(self, num_frames: int) -> Tensor:
        """The prompt's scene, rendered."""
        size = self.plan.height, self.plan.width
        return render([self.scene], num_frames, *size, fps=float(self.plan.fps)).video.cpu()


def score(video: Tensor, chain: Chain, judge: Judge) -> dict[str, Any]:
    """All figures of one clip, and its looks by frame for the chart."""
    figures = measure_drift(video, chain.windows, chain.scene, judge)
    curves = {name: [round(v, 4) for v in told.tolist()] for name, told in looks(video).items()}
    return {**figures, "curves": curves}


def summarise(scores: list[dict[str, Any]]) -> dict[str, Any]:
    """One way's figures over all seeds: means with 95% intervals, rates."""
    result: dict[str, Any] = {}
    for name in (*LOOKS, "joins"):
        values = [one[name] for one in scores]
        result[name] = {"mean": sum(values) / len(values), "interval": mean_interval(values)}
        if name in LOOKS:
            result[name]["mean_size"] = sum(map(abs, values)) / len(values)
    for name in ("same", "right"):
        rate = Rate.of(one[name] for one in scores)
        result[name] = {"rate": rate.rate, "interval": rate.interval}
    return result


def table(results: dict[str, Any]) -> str:
    """The figures as Markdown: drift in % of range, its mean size and its mean."""
    lines = ["| way | " + " | ".join(LOOKS) + " | joins | same sprite | right sprite |",
             "|---|" + "---|" * (len(LOOKS) + 3)]
    for way, figures in results.items():
        drift = [
            f"{100 * figures[name]['mean_size']:.2f} ({100 * figures[name]['mean']:+.2f})"
            for name in LOOKS
        ]
        rates = [f"{100 * figures[name]['rate']:.0f}%" for name in ("same", "right")]
        lines.append("| " + " | ".join([way, *drift, f"{figures['joins']['mean']:.2f}x", *rates])
                     + " |")
    return "\n".join(lines)


def draw_chart(curves: dict[str, list[dict[str, Any]]], joins: list[int], path: Path) -> None:
    """Each look less its start, the mean over seeds, frame by frame; grey lines are joins."""
    width, height, left = 900, 180, 60
    image = Image.new("RGB", (width, height * len(LOOKS)), "white")
    draw = ImageDraw.Draw(image)
    for row, name in enumerate(LOOKS):
        lines = {way: _mean([one[name] for one in ones]) for way, ones in curves.items()}
        span = max(0.005, *(abs(v) for line in lines.values() for v in line)) * 1.1
        middle = row * height + height / 2
        length = max(map(len, lines.values()))

        def place(i: int, v: float, middle: float = middle, span: float = span,
                  length: int = length) -> tuple[float, float]:
            return left + i / length * (width - left - 10), middle - v / span * (height / 2 - 16)

        for join in joins:
            draw.line([place(join, span), place(join, -span)], "#dddddd")
        draw.line([place(0, 0.0), place(length, 0.0)], "#bbbbbb")
        draw.text((4, middle - 6), f"{name}\n±{100 * span:.1f}%", "black")
        for way, line in lines.items():
            draw.line([place(i, v) for i, v in enumerate(line)], COLOURS[way], 2)
    for index, way in enumerate(curves):
        draw.text((left + 90 * index, 2), way, COLOURS[way])
    with atomic_path(path) as temporary:
        image.save(temporary, "PNG")


def _mean(rows: list[list[float]]) -> list[float]:
    return [sum(v) / len(v) for v in zip(*([x - row[0] for x in row] for row in rows), strict=True)]


def measure(
    settings: Settings, ways: Sequence[str], output: Path, sheet: Path | None,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Make and score all clips; the result as JSON data."""
    engine, folder = load(settings.model, dtype=settings.dtype), embedded_judge()
    assert isinstance(engine, Engine)
    judge, log = folder.load(engine.device), ScoreLog(output.with_name(output.name + ".jsonl"))
    identity = {
        **asdict(settings), "seeds": None, "sha256": engine.folder.content_hash,
        "judge": folder.sha256,
    }
    if ANCHOR_TASK not in engine.folder.tasks:
        ways = [way for way in ways if way != "anchored"]
    if engine.folder.roller is None:
        ways = [way for way in ways if way != "rolled"]
    scores: dict[str, list[dict[str, Any]]] = {way: [] for way in ("truth", *ways)}
    pictures, labels, joins = [], list[str](), list[int]()
    for seed, (scene, text) in enumerate(endless_prompts(settings.scenes, settings.seeds)):
        chain = Chain(engine, settings, seed, scene, text)
        joins = chain.windows.joins
        for way, ones in scores.items():
            key = json.dumps([identity, seed, way])
            shown = sheet is not None and seed < SHEET_SEEDS
            if key not in log.scores or shown:
                video = chain.make(way)
                log.add([(key, score(video, chain, judge))])
                if shown:
                    at = [0, *(join + 1 for join in joins), video.shape[2] - 1]
                    pictures += [*to_frames(video[0][:, at]).numpy()]
                    labels += [f"{seed} {way} {frame}" for frame in at]
            ones.append(log.scores[key])
            tell(f"seed {seed} {way}")
    if sheet is not None:
        contact_sheet(pictures, sheet, columns=len(joins) + 2, labels=labels)
        curves = {way: [one["curves"] for one in ones] for way, ones in scores.items()}
        draw_chart(curves, joins, sheet.with_name(f"{sheet.stem}-chart.png"))
    results = {way: summarise(ones) for way, ones in scores.items()}
    return {"settings": asdict(settings), "identity": identity, "results": results,
            "machine": fingerprint()}


def main() -> None:
    """Read the command line, measure, write, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="toybox", help="name or folder; default %(default)s")
    add("--seeds", type=int, default=50, help="clips of each way; default %(default)s")
    add("--windows", type=int, default=8, help="windows of a clip; default %(default)s")
    add("--way", action="append", choices=WAYS, help="may be repeated; default all")
    add("--start", choices=("text", "render"), default="text", help="how the first window is made")
    add("--scenes", choices=("endless", "any"), default="endless", help="default %(default)s")
    add("--steps", type=int, help="denoising steps; default the model's")
    add("--overlap", type=int, default=OVERLAP, help="latent frames; default %(default)s")
    add("--hold", type=float, default=COLOUR_HOLD, help="of `held`; default %(default)s")
    add("--dtype", choices=("fp32", "bf16", "fp16"))
    add("-o", "--output", type=Path, required=True, help="JSON")
    add("--sheet", type=Path, help="PNG of the first seeds at the joins, with NAME-chart.png")
    args = vars(parser.parse_args())
    output, sheet, ways = args.pop("output"), args.pop("sheet"), args.pop("way") or WAYS
    result = measure(Settings(**args), ways, output, sheet, lambda line: print(line, flush=True))
    atomic_write(output, (json.dumps(result, indent=1) + "\n").encode())
    print(table(result["results"]))


if __name__ == "__main__":
    sys.exit(exit_code(main))
