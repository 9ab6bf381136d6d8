"""What steps are worth: step caches and few steps of the embedded model, against 25 whole ones.

    python -m eval.toybox.steps caches -o caches.json [--prompts 64] [--chart caches.png]
    python -m eval.toybox.steps few -o few.json [--prompts 1000]
    python -m eval.toybox.steps wide -o wide.json --schedule caches.json

`caches`: each method at some thresholds, a clip with it right after the same clip without: seconds
of denoising, PSNR and SSIM against that, and whether the judge finds in both what the prompt says.
`few`: solvers, step counts, noise schedules, guidance intervals and the model's student,
if it has one, by what the judge finds, each against the model's own settings on the same prompts
and seeds; intervals are paired bootstraps. `wide`: the schedule that `caches` found nearest to 30
dB, timed at the width of Wan 1.3B. Run it under `scripts/quiet` where seconds matter. A run that
was stopped goes on: each clip's figures are a line of OUTPUT.jsonl.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from eval.toybox.generation import generate_batch, sample_state
from eval.toybox.judge import Judge, embedded_judge
from eval.toybox.suite.judging import TASKS, grade
from train.toybox.initial import init_dit
from train.toybox.world.captions import prompts
from train.toybox.world.scenes import Scene
from vidgen.core.errors import InputError, exit_code
from vidgen.core.request import Request
from vidgen.core.runtime import atomic_path, atomic_write, fingerprint
from vidgen.core.store import ScoreLog
from vidgen.diffusion.cache import make_caches
from vidgen.evaluation.statistics import paired_interval
from vidgen.media.cells import psnr, ssim
from vidgen.models.dit import SpacetimeDiT
from vidgen.models.dit_types import DiTConfig
from vidgen.models.presets import DIT_PRESETS
from vidgen.pipeline.codec import to_frames
from vidgen.pipeline.denoise import denoising, sigmas_of
from vidgen.pipeline.engine import Engine, load, measure_magnitudes
from vidgen.pipeline.inputs import Inputs
from vidgen.pipeline.plan import THRESHOLDS, read_magnitudes, write_magnitudes
from vidgen.pipeline.types import NO_LORAS

LEVELS = {
    "first-block": (0.05, 0.1, 0.15, 0.2, 0.3, 0.45),
    "magnitude": (0.03, 0.05, 0.1, 0.2, 0.4),
    "forecast": (0.05, 0.1, 0.15, 0.2, 0.3, 0.5),
}
GOAL_DB = 30.0
MANY: dict[str, Any] = {"sampler": "unipc", "steps": 25, "shift": 3.0}
"""What step caches are measured against: by one path the embedded model gains nothing by more."""
REFERENCE, STUDENT = "default", "student"
FEW: dict[str, dict[str, Any]] = {REFERENCE: {}, "unipc 25 shift 3": MANY} | {
    f"{sampler} {steps} shift {shift:g}": {"sampler": sampler, "steps": steps, "shift": shift}
    for sampler, shifts in (("unipc", (3.0, 5.0, 7.0, 9.0)), ("euler", (3.0, 5.0)))
    for steps in (4, 6, 8, 12) for shift in shifts
} | {
    f"unipc 8 shift {shift:g} guided {low:g}..{high:g}": {
        "sampler": "unipc", "steps": 8, "shift": shift, "guidance_interval": (low, high)
    }
    for shift in (5.0, 7.0) for low, high in ((0.0, 0.95), (0.3, 1.0), (0.5, 1.0))
} | {
    f"ancestral {steps} shift 5": {"sampler": "ancestral", "steps": steps, "shift": 5.0}
    for steps in (4, 8, 10, 14, 24)  # 12 are the embedded model's own
}
BATCH = 8
RUNS, WARM_UP = 5, 1
COLOURS = {"first-block": "#c0392b", "magnitude": "#2471a3", "forecast": "#1e8449"}


@dataclass
class Bench:
    """What all parts share."""

    engine: Engine
    judge: Judge
    log: ScoreLog
    identity: list[str]
    items: list[tuple[Scene, str]]

    @classmethod
    def open(cls, args: argparse.Namespace) -> Bench:
        """Load model and judge, and what an earlier run has left."""
        engine, folder = load(args.model, dtype=args.dtype), embedded_judge()
        assert isinstance(engine, Engine)
        log = ScoreLog(args.output.with_name(args.output.name + ".jsonl"))
        identity = [engine.folder.content_hash, folder.sha256, engine.dtype]
        return cls(engine, folder.load(engine.device), log, identity,
                   list(prompts("dev", args.prompts)))

    def key(self, *what: Any) -> str:
        """Address of a line of the log."""
        return json.dumps([*self.identity, *what])

    def judged(self, video: Tensor, scenes: Sequence[Scene]) -> list[dict[str, bool]]:
        """What the judge finds right in video [B, 3, T, H, W]."""
        verdicts = self.judge.verdicts(video)
        return [grade(verdict, scene) for verdict, scene in zip(verdicts, scenes, strict=True)]


@torch.no_grad()
def timed_clip(
    bench: Bench, request: Request, contexts: list[tuple[Tensor, Tensor]]
) -> tuple[dict[str, Any], Tensor]:
    """Denoise one clip and decode it: its figures, and video [1, 3, T, H, W]."""
    engine = bench.engine
    plan = replace(engine.plan(request, Inputs()), temporal_upsampling=1)
    state, sigmas = engine.prepare(plan, request, Inputs()), sigmas_of(plan)
    caches = make_caches(plan.cache, sigmas, plan.guidance)
    with denoising(engine.loader, plan, state, contexts, NO_LORAS, 1.0, caches) as denoise:
        start = time.perf_counter()
        latents = sample_state(plan.sampler, denoise, state, sigmas)
        seconds = time.perf_counter() - start
    video = torch.cat([part.float().clamp(-1, 1) for part in engine.decode_video(latents)], dim=2)
    taken = [computed for _, computed in caches.taken] if caches else []
    return {"seconds": seconds, "schedule": "".join(".#"[one] for one in taken)}, video


def compare_clip(bench: Bench, index: int, names: Sequence[str]) -> None:
    """Score one prompt's clip without a cache and with each."""
    missing = [name for name in ("none", *names) if bench.key(index, name) not in bench.log.scores]
    if not missing:
        return
    scene, prompt = bench.items[index]
    request = Request(prompt=prompt, seed=index, **MANY)
    contexts = bench.engine.encode_prompt(bench.engine.plan(request, Inputs()))
    if index == 0:  # kernels are chosen and compiled at first use
        timed_clip(bench, request, contexts)
    plain, rows = None, {}
    for name in ["none", *missing]:
        row, video = timed_clip(bench, request.replace(cache=name), contexts)
        frames = to_frames(video[0]).numpy()
        plain = frames if plain is None else plain
        row["psnr"] = statistics.fmean(map(psnr, frames, plain))
        row["ssim"] = statistics.fmean(map(ssim, frames, plain))
        row["right"] = bench.judged(video, [scene])[0]
        rows[name] = row
    bench.log.add((bench.key(index, name), row) for name, row in rows.items())


def run_caches(args: argparse.Namespace, tell: Callable[[str], None]) -> dict[str, Any]:
    """Speed and likeness of each method and threshold, and the pick of each method."""
    bench = Bench.open(args)
    if read_magnitudes(bench.engine.folder) is None:
        write_magnitudes(measure_magnitudes(bench.engine), bench.engine.folder)
    names = [f"{method}:{level:g}" for method, levels in LEVELS.items() for level in levels]
    for index in range(len(bench.items)):
        compare_clip(bench, index, names)
        tell(f"clip {index + 1} of {len(bench.items)}")
    rows = {
        name: [bench.log.scores[bench.key(i, name)] for i in range(len(bench.items))]
        for name in ("none", *names)
    }
    table = {name: cache_figures(rows[name], rows["none"]) for name in names}
    picks = {}
    for method in LEVELS:
        good = [name for name in names if name.startswith(method)
                and table[name]["psnr"] >= GOAL_DB]
        picks[method] = max(good, key=lambda name: table[name]["speed"], default=None)
    if args.chart:
        draw_chart(table, args.chart)
    return {"caches": table, "picks": picks, "defaults": THRESHOLDS}


def cache_figures(rows: list[dict[str, Any]], plain: list[dict[str, Any]]) -> dict[str, Any]:
    """Of one threshold: speed, likeness, judged loss in points with its interval, schedule."""
    ratios = sorted(row["psnr"] for row in rows)
    figures = {
        "speed": sum(row["seconds"] for row in plain) / sum(row["seconds"] for row in rows),
        "psnr": statistics.fmean(ratios), "psnr_10th": ratios[len(ratios) // 10],
        "ssim": statistics.fmean(row["ssim"] for row in rows),
        "computed": statistics.fmean(
            row["schedule"].count("#") / len(row["schedule"]) for row in rows),
        "schedule": statistics.mode(row["schedule"] for row in rows),
    }
    return {**figures, "points": points([r["right"] for r in rows], [r["right"] for r in plain])}


def points(
    rights: Sequence[dict[str, bool]], others: Sequence[dict[str, bool]]
) -> dict[str, dict[str, float]]:
    """Accuracy in points, and by how much it differs from the others', task by task and in all."""
    found = {}
    for task in (*TASKS, "all"):
        mine, theirs = ([100 * _share(right, task) for right in each] for each in (rights, others))
        low, high = paired_interval(mine, theirs)
        mean = statistics.fmean(mine)
        found[task] = {"value": mean, "change": mean - statistics.fmean(theirs),
                       "low": low, "high": high}  # fmt: skip
    return found


def _share(right: dict[str, bool], task: str) -> float:
    return statistics.fmean(right[each] for each in TASKS) if task == "all" else float(right[task])


def run_few(args: argparse.Namespace, tell: Callable[[str], None]) -> dict[str, Any]:
    """Accuracy of every way to take few steps, against many."""
    bench = Bench.open(args)
    student = bench.engine.folder.few_step
    known = FEW | ({} if student is None else {STUDENT: {"steps": student.num_steps}})
    ways = {name: known[name] for name in known if name == REFERENCE or _is_asked(name, args.only)}
    rights = {}
    for name, options in ways.items():
        rights[name] = list(judge_way(bench, name, options))
        tell(f"{name}: {points(rights[name], rights[REFERENCE])['all']['change']:+.1f} points")
    table = {name: points(each, rights[REFERENCE]) for name, each in rights.items()}
    return {"few": table, "options": {name: ways[name] for name in table}}


def _is_asked(name: str, only: Sequence[str] | None) -> bool:
    """Whether a way is named by one of `only`: by all of its name, or by part of it."""
    return not only or any(part == name or (part not in FEW and part in name) for part in only)


def judge_way(bench: Bench, name: str, options: dict[str, Any]) -> Iterator[dict[str, bool]]:
    """What is right in each prompt's clip, made with some options."""
    engine = bench.engine
    plan = engine.plan(Request(prompt="a cat", seed=0, **options), Inputs())
    for first in range(0, len(bench.items), BATCH):
        part = bench.items[first : first + BATCH]
        keys = [bench.key(first + i, name, options) for i in range(len(part))]
        if any(key not in bench.log.scores for key in keys):
            seeds = range(first, first + len(part))
            video = generate_batch(engine, plan, [text for _, text in part], list(seeds))
            found = bench.judged(video, [scene for scene, _ in part])
            bench.log.add(zip(keys, ({"right": each} for each in found), strict=True))
        for key in keys:
            yield bench.log.scores[key]["right"]


class Scheduled:
    """A step cache that follows a schedule: what a pass costs, whatever it would decide.

    Args:
        lead: as of the method that the schedule is from.

    Attributes:
        computed: whether the pass at hand is.
    """

    def __init__(self, lead: int) -> None:
        self.lead, self.computed = lead, True
        self._start: Tensor | None = None
        self._added: Tensor | None = None

    def recall(self, _: Tensor, tokens: Tensor) -> Tensor | None:
        """See `StepCache`."""
        self._start = tokens
        return None if self.computed or self._added is None else tokens + self._added

    def keep(self, tokens: Tensor) -> None:
        """See `StepCache`."""
        assert self._start is not None
        self._added = tokens - self._start


@torch.no_grad()
def run_wide(args: argparse.Namespace, tell: Callable[[str], None]) -> dict[str, Any]:
    """The picked schedules timed at the width of Wan 1.3B, four layers, random weights, bf16."""
    picked = json.loads(args.schedule.read_text())
    config = DiTConfig(**{**vars(DIT_PRESETS["wan-1.3b"]), "num_layers": 4})
    model = SpacetimeDiT(config).to(torch.bfloat16).eval()
    init_dit(model)
    latents = torch.randn(1, config.in_channels, 6, 32, 32)  # 1,536 tokens
    context, timestep = torch.randn(1, 64, config.text_dim).bfloat16(), torch.tensor([700.0])

    def seconds(cache: Scheduled | None, computed: bool = True) -> float:
        if cache is not None:
            cache.computed = computed
        start = time.perf_counter()
        model(latents, timestep, context, context_lengths=[64], step_cache=cache)
        return time.perf_counter() - start

    found = {}
    for method, name in picked["picks"].items():
        if name is None:
            continue
        cache, taken = Scheduled(int(method == "first-block")), []
        for _ in range(RUNS + WARM_UP):  # in turns, so that other programs weigh on all alike
            taken.append((seconds(None), seconds(cache), seconds(cache, computed=False)))
        plain, full, spared = (statistics.median(each) for each in
                               zip(*taken[WARM_UP:], strict=True))
        schedule = picked["caches"][name]["schedule"]
        count = schedule.count("#")
        whole = count * full + (len(schedule) - count) * spared
        found[name] = {
            "schedule": schedule, "pass_s": plain, "computed_s": full, "spared_s": spared,
            "speed": len(schedule) * plain / whole,
        }
        tell(f"{name}: {found[name]['speed']:.2f}x")
    return {"wide": found, "layers": config.num_layers, "tokens": 1536}


def draw_chart(table: dict[str, dict[str, Any]], path: Path) -> None:
    """Speed against PSNR, a line for each method."""
    width, height, left, fastest = 720, 420, 50, 4.0
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)

    def place(speed: float, ratio: float) -> tuple[float, float]:
        x = left + (min(speed, fastest) - 1) / (fastest - 1) * (width - left - 20)
        return x, height - 30 - (min(max(ratio, 20), 55) - 20) / 35 * (height - 60)

    for ratio in range(20, 56, 5):
        draw.line([place(1, ratio), place(fastest, ratio)],
                  "#999999" if ratio == GOAL_DB else "#dddddd")
        draw.text((6, place(1, ratio)[1] - 6), f"{ratio} dB", "black")
    for tenth in range(10, 41, 5):
        draw.text((place(tenth / 10, 20)[0] - 8, height - 20), f"{tenth / 10:g}x", "black")
    for row, (method, colour) in enumerate(COLOURS.items()):
        marks = [place(one["speed"], one["psnr"]) for name, one in table.items()
                 if name.startswith(method)]
        draw.line(marks, colour, 2)
        for x, y in marks:
            draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colour)
        draw.text((width - 120, 10 + 16 * row), method, colour)
    with atomic_path(path) as temporary:
        image.save(temporary, "PNG")


PARTS = {"caches": run_caches, "few": run_few, "wide": run_wide}


def main() -> None:
    """Run a part and write its figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("part", choices=PARTS)
    add("-o", "--output", type=Path, required=True, metavar="FILE", help="figures as JSON")
    add("--prompts", type=int, default=64, metavar="N", help="default %(default)s")
    add("--model", default="toybox")
    add("--dtype", choices=("fp32", "bf16"))
    add("--only", action="append", metavar="TEXT", help="of `few`: a way, or part of their names")
    add("--schedule", type=Path, metavar="FILE", help="of `wide`: what `caches` wrote")
    add("--chart", type=Path, metavar="PNG", help="of `caches`: speed against PSNR")
    args = parser.parse_args()
    if args.prompts < 2:
        raise InputError(f"prompts is {args.prompts}; give 2 or more")
    if args.part == "wide" and args.schedule is None:
        parser.error("wide needs --schedule, what `caches` wrote")
    found = PARTS[args.part](args, lambda text: print(text, flush=True))
    data = {**found, "prompts": args.prompts, "model": args.model, "machine": fingerprint()}
    atomic_write(args.output, json.dumps(data, indent=1).encode())


if __name__ == "__main__":
    sys.exit(exit_code(main))
