"""Measure what chaining clips does to a picture: drift, flicker at the joins, identity.

    python -m eval.toybox.extension --seeds 50 --windows 8 --workers 2 -o e.json --sheet e.png

Each seed is a benchmark prompt of the Toybox world whose motion and camera can go on for ever (what
moves left is gone after one window; `--scenes any` takes all), made as one clip of K windows in
four ways:
    pixels   each window begins with the last frames of the one before, decoded and encoded again
    latents  windows hand over latents (`vidgen extend` with --set colour_hold=0 --set anchor=false)
    held     the same, colours held to the first window's (--set anchor=false)
    anchored the same, and each window is shown the clip's first frame (as by default, in models
             that were taught to keep to it)
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
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from eval.toybox.chains import TRUTH, WAYS, ChainJob, ChainSettings, ChainWork, windows_of
from eval.toybox.judge import embedded_judge
from eval.toybox.metrics.drift import LOOKS
from eval.toybox.rates import Rate
from eval.toybox.suite.items import endless_prompts
from vidgen.core.errors import exit_code
from vidgen.core.runtime import atomic_path, atomic_write, fingerprint
from vidgen.core.store import ScoreLog
from vidgen.evaluation.statistics import mean_interval
from vidgen.media.grid import contact_sheet
from vidgen.pipeline.settings import SETTINGS
from vidgen.pipeline.tail import ANCHOR_TASK
from vidgen.pipeline.workers.scheduler import run_jobs
from vidgen.pipeline.workers.types import Job, Patience, WorkerOptions

COLOURS = {TRUTH: "#888888", "pixels": "#d62728", "latents": "#1f77b4", "held": "#2ca02c",
           "anchored": "#9467bd"}
SHEET_SEEDS = 6


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Make and score all clips, draw the sheet; the result as JSON data."""
    output: Path = options.output
    work = ChainWork(ChainSettings(
        options.model, options.windows, options.start, options.steps, options.overlap,
        options.hold, options.dtype,
    )).settled()  # fmt: skip
    settings, folder = asdict(work.settings) | {"scenes": options.scenes}, work.engine.folder
    identity = settings | {"sha256": folder.content_hash, "judge": embedded_judge().sha256}
    lacking = {"anchored": ANCHOR_TASK not in folder.tasks}
    ways = [TRUTH, *(way for way in options.way or WAYS if not lacking.get(way))]
    jobs = {
        json.dumps([identity, seed, way]):
            ChainJob(seed, scene, text, way, options.sheet is not None and seed < SHEET_SEEDS)
        for seed, (scene, text) in enumerate(endless_prompts(options.scenes, options.seeds))
        for way in ways
    }
    workers = WorkerOptions(options.workers, threads=options.threads,
                            patience=Patience(stall=math.inf))
    log = ScoreLog(output.with_name(output.name + ".jsonl"))
    pictures = make(jobs, work, workers, log)
    found = {way: [log.scores[key] for key, job in jobs.items() if job.way == way] for way in ways}
    if options.sheet is not None:
        draw_sheet(jobs, pictures, options.sheet)
        draw_chart({way: [one["curves"] for one in ones] for way, ones in found.items()},
                   windows_of(work.engine, work.settings).joins,
                   options.sheet.with_name(f"{options.sheet.stem}-chart.png"))
    return {"settings": settings | {"seeds": options.seeds}, "identity": identity,
            "threads": workers.num_threads,
            "results": {way: summarise(ones) for way, ones in found.items()},
            "machine": fingerprint()}


def make(
    jobs: Mapping[str, ChainJob], work: ChainWork, workers: WorkerOptions, log: ScoreLog
) -> dict[str, list[Any]]:
    """Have the clips made and measured that the log lacks, and those to be shown; their frames."""
    missing = {key: job for key, job in jobs.items() if key not in log.scores or job.shown}
    begun, pictures = time.monotonic(), dict[str, list[Any]]()
    todo = (Job(key, job, name=f"seed {job.seed} {job.way}") for key, job in missing.items())
    for done, outcome in enumerate(run_jobs(todo, work, workers, tell), start=1):
        if outcome.error is not None:
            raise outcome.error
        figures, pictures[outcome.job.key] = outcome.result
        log.add([(outcome.job.key, figures)])
        left = (time.monotonic() - begun) / done * (len(missing) - done) / 60
        print(f"{outcome.job.name}: {len(jobs) - len(missing) + done}/{len(jobs)}, "
              f"{left:.0f} min left", flush=True)
    return pictures


def tell(event: Mapping[str, Any]) -> None:
    """Show notes on stderr."""
    if event["event"] == "note":
        print(event["text"], file=sys.stderr)


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


def draw_sheet(
    jobs: Mapping[str, ChainJob], pictures: Mapping[str, Sequence[Any]], path: Path
) -> None:
    """A row of frames for each clip that is shown: its start, behind each join, its end."""
    rows = [(job, pictures[key]) for key, job in jobs.items() if job.shown]
    labels = [f"{job.seed} {job.way} {place}" for job, row in rows
              for place in ("start", *(f"join {k}" for k in range(1, len(row) - 1)), "end")]
    contact_sheet([frame for _, row in rows for frame in row], path, columns=len(rows[0][1]),
                  labels=labels)


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
    add("--overlap", type=int, default=SETTINGS["overlap"].off,
        help="latent frames; default %(default)s")
    add("--hold", type=float, default=SETTINGS["colour_hold"].off,
        help="of `held`; default %(default)s")
    add("--dtype", choices=("fp32", "bf16", "fp16"))
    add("--workers", type=int, help="clips beside each other")
    add("--threads", type=int, help="that each worker computes on")
    add("-o", "--output", type=Path, required=True, help="JSON")
    add("--sheet", type=Path, help="PNG of the first seeds at the joins, with NAME-chart.png")
    options = parser.parse_args()
    result = measure(options)
    atomic_write(options.output, (json.dumps(result, indent=1) + "\n").encode())
    print(table(result["results"]))


if __name__ == "__main__":
    sys.exit(exit_code(main))
