"""Whether the model copies clips that it learned from: how near its clips come to them.

    python -m eval.toybox.memorisation -o memorisation.json [--clips 200] [--run RUN.yaml]

Clips are compared by five frames, spread over the clip, of 32x32 RGB: `distance` is the root mean
square difference in levels of 255. `ratio` is the distance of the nearest training clip by the mean
of the 50 next ones (after Carlini et al. 2023), which doesn't hang on how sharp a clip is: a copy
has a small one. Five groups of clips, each against the same training clips:

    generated   from captions of scenes that nobody trained on
    renders     the same scenes, rendered and passed through the VAE: what never saw training clips
    prompted    generated from the training clips' own captions, where a copy is likeliest
    retold      the training clips' scenes drawn anew, behind the VAE: how near the same words come
    copies      training clips themselves, passed through the VAE: what a copy looks like

Training clips are rendered anew from their seeds: those of the first cache of a run of
train/toybox/dit.py, by default the one that the released transformer learned from last. What is
measured stands in FILE.jsonl; a run that was killed goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.toybox.generation import generate_batch, round_trip
from eval.toybox.rates import Rate
from train.toybox.runs import load_run
from train.toybox.tasks.toybox_data import CacheConfig
from train.toybox.world.captions import caption
from train.toybox.world.render import render
from train.toybox.world.scenes import SEED_RANGES, WORLD_VERSION, Scene, sample_scenes
from vidgen.core.config import build
from vidgen.core.errors import InputError, exit_code
from vidgen.core.request import Request
from vidgen.core.runtime import atomic_write, check_output, fingerprint
from vidgen.core.store import ScoreLog
from vidgen.evaluation.statistics import mean_interval, paired_interval
from vidgen.pipeline.engine import Engine, load
from vidgen.pipeline.inputs import Inputs

FRAMES, SIDE = 5, 32
NEXT = 50
BATCH = 8
FRESH = SEED_RANGES["dev"][0] + (1 << 34)
"""Scene seed from which on `generated` and `renders` are drawn."""
RUN = "train/toybox/configs/dit_more.yaml"
Make = Callable[[Sequence[int]], Tensor]


def features(video: Tensor) -> Tensor:
    """Video [B, 3, T, H, W] in [-1, 1] as small pictures [B, D] in levels / sqrt(D)."""
    moments = torch.linspace(0, video.shape[2] - 1, FRAMES).round().long()
    small = F.interpolate(
        video[:, :, moments], size=(FRAMES, SIDE, SIDE), mode="area"
    ).flatten(1)  # fmt: skip
    return small * (127.5 / small.shape[1] ** 0.5)


def training_scenes(run: str) -> list[Scene]:
    """The scenes of the first cache that a run names.

    Raises:
        InputError: there is none, or it holds some of the world's scenes alone.
    """
    entries = load_run(run).get("caches")
    if not entries:
        raise InputError(f"{run} has no caches; give a run of train/toybox/dit.py")
    cache = build(CacheConfig, entries[0], run)
    if not cache.takes_all:
        raise InputError(f"the first cache of {run} holds chosen scenes; give a run whose first "
                         "one takes all that come")
    first = SEED_RANGES["train"][0] + cache.first_scene
    return sample_scenes(first, cache.shards * cache.shard_size, cache.mix, split="train")


def training_bank(scenes: Sequence[Scene], num_frames: int, fps: float) -> Tensor:
    """Features [N, D] of training clips, rendered at twice the features' size."""
    moments = torch.linspace(0, num_frames - 1, FRAMES).round().long().tolist()
    parts = []
    for start in range(0, len(scenes), 4 * BATCH):
        part = scenes[start : start + 4 * BATCH]
        shown = render(part, num_frames, 2 * SIDE, 2 * SIDE, fps, frames=moments)
        parts.append(features(shown.video))
        tell("training clips", start + len(part), len(scenes))
    return torch.cat(parts)


def nearest(rows: Tensor, bank: Tensor) -> list[dict[str, float]]:
    """Of each of B features its nearest training clip: `distance`, `ratio` and `index`."""
    distances = torch.cdist(rows, bank)
    best = distances.topk(NEXT + 1, largest=False)
    found = zip(best.values, best.indices[:, 0].tolist(), strict=True)
    return [{"distance": float(d[0]), "ratio": float(d[0] / d[1:].mean()), "index": index}
            for d, index in found]  # fmt: skip


class Groups:
    """The five groups of clips, made by index.

    Args:
        engine: the model.
        trained: scenes that it was trained on, as many as nobody trained on are drawn.
        options: steps and shift, None: the model's own.
    """

    def __init__(
        self, engine: Engine, trained: Sequence[Scene], options: dict[str, Any]
    ) -> None:
        self.engine, self.trained = engine, trained
        self.fresh = sample_scenes(FRESH, len(trained), split="train")
        self.retold = [replace(scene, seed=FRESH + i) for i, scene in enumerate(self.trained)]
        self.plan = engine.plan(Request.of("a cat bounces", {"seed": 0, **options}), Inputs())
        self.makers: dict[str, Make] = {
            "copies": lambda picks: self._shown(self.trained, picks),
            "renders": lambda picks: self._shown(self.fresh, picks),
            "retold": lambda picks: self._shown(self.retold, picks),
            "generated": lambda picks: self._generated(self.fresh, picks),
            "prompted": lambda picks: self._generated(self.trained, picks),
        }

    def _shown(self, scenes: Sequence[Scene], picks: Sequence[int]) -> Tensor:
        plan = self.plan
        size = plan.num_frames, plan.height, plan.width, float(plan.fps)
        return round_trip(self.engine, render([scenes[i] for i in picks], *size).video)

    def _generated(self, scenes: Sequence[Scene], picks: Sequence[int]) -> Tensor:
        texts = [caption(scenes[i], seed=0, detail="full") for i in picks]
        return generate_batch(self.engine, self.plan, texts, list(picks))


def measure(
    model: str, clips: int, run: str, log: ScoreLog, **options: Any
) -> dict[str, Any]:
    """All groups against the training clips.

    Args:
        model: name or folder.
        clips: of each group.
        run: YAML file of a run, whose clips to compare with.
        log: what is known.
        options: steps and shift of what is generated; None is the model's own.

    Raises:
        InputError: too few clips, or fewer training clips than are prompted with.
    """
    scenes = training_scenes(run)
    if clips < 2 or len(scenes) < max(clips, NEXT + 1):
        raise InputError(f"clips is {clips}, and {run} has {len(scenes)} to compare with; give 2 "
                         f"clips or more, and a run with at least as many, {NEXT + 1} or more")
    engine = load(model)
    groups = Groups(engine, scenes[:clips], options)
    plan = groups.plan
    bank = training_bank(scenes, plan.num_frames, float(plan.fps))
    settings = {
        "model": {"name": engine.folder.name, "sha256": engine.folder.content_hash},
        "dtype": engine.dtype, "first_trained": scenes[0].seed, "training_clips": len(scenes),
        "clips": clips,
        "frames": FRAMES, "side": SIDE, "next": NEXT, "first_fresh": FRESH,
        "world_version": WORLD_VERSION,
        "num_frames": plan.num_frames, "size": [plan.width, plan.height],
        "num_steps": plan.num_steps, "guidance": asdict(plan.guidance), "shift": plan.shift,
        "sampler": plan.sampler,
    }  # fmt: skip
    shaping = json.dumps({k: v for k, v in settings.items() if k != "clips"}, sort_keys=True)
    rows = {
        name: measure_group(name, make, clips, bank, log, shaping)
        for name, make in groups.makers.items()
    }
    return {**settings, **summary(rows), "machine": fingerprint()}


def measure_group(
    name: str, make: Make, clips: int, bank: Tensor, log: ScoreLog, shaping: str
) -> list[dict[str, Any]]:
    """A group's rows, in order; makes only what the log hasn't."""
    keys = [hashlib.sha256(f"{shaping} {name} {i}".encode()).hexdigest() for i in range(clips)]
    for start in range(0, clips, BATCH):
        picks = [i for i in range(start, min(start + BATCH, clips)) if keys[i] not in log.scores]
        if picks:
            found = nearest(features(make(picks)), bank)
            log.add((keys[i], row) for i, row in zip(picks, found, strict=True))
        tell(name, min(start + BATCH, clips), clips)
    return [log.scores[key] for key in keys]


def summary(rows: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Figures by group, what is generated less what is rendered, and how many clips are copies."""
    limit = max(row["distance"] for row in rows["copies"])
    groups: dict[str, Any] = {}
    for name, found in rows.items():
        figures = {what: [row[what] for row in found] for what in ("distance", "ratio")}
        groups[name] = {
            what: _figure(values) | {"least": min(values)} for what, values in figures.items()
        }
        groups[name]["as_near_as_copies"] = _rate(d <= limit for d in figures["distance"])
        if name in ("copies", "prompted", "retold"):
            own = (row["index"] == i for i, row in enumerate(found))
            groups[name]["own_clip_nearest"] = _rate(own)
    differences = {}
    for what in ("distance", "ratio"):
        ones, others = ([row[what] for row in rows[name]] for name in ("generated", "renders"))
        low, high = paired_interval(ones, others)
        differences[what] = {"value": sum(ones) / len(ones) - sum(others) / len(others),
                             "low": low, "high": high, "total": len(ones)}  # fmt: skip
    return {"groups": groups, "generated_less_renders": differences, "copy_limit": limit}


def _figure(values: Sequence[float]) -> dict[str, Any]:
    low, high = mean_interval(values)
    return {"value": sum(values) / len(values), "low": low, "high": high, "total": len(values)}


def _rate(outcomes: Any) -> dict[str, Any]:
    rate = Rate.of(outcomes)
    low, high = rate.interval
    return {"value": rate.rate, "low": low, "high": high, "total": rate.total}


def tell(what: str, done: int, total: int) -> None:
    """Say how far it is."""
    print(f"{what}: {done}/{total}", file=sys.stderr, flush=True)


def main() -> int:
    """Measure, write the results, show the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("-o", "--output", required=True, metavar="JSON")
    parser.add_argument("--model", default="toybox", metavar="NAME|FOLDER")
    parser.add_argument("--clips", type=int, default=200, metavar="N", help="of each group")
    parser.add_argument("--run", default=RUN, metavar="YAML", help="of the training clips")
    parser.add_argument("--steps", type=int, metavar="N", help="default the model's, as shift")
    parser.add_argument("--shift", type=float, metavar="X")
    parser.add_argument("--overwrite", action="store_true")
    args = parser.parse_args()

    def work() -> None:
        check_output(args.output, overwrite=args.overwrite)
        log = ScoreLog(Path(f"{args.output}.jsonl"))
        result = measure(
            args.model, args.clips, args.run, log, steps=args.steps, shift=args.shift
        )
        atomic_write(args.output, (json.dumps(result, indent=1) + "\n").encode())
        for name, group in result["groups"].items():
            line = "  ".join(
                f"{what} {group[what]['value']:.3f} ({group[what]['low']:.3f} to "
                f"{group[what]['high']:.3f}, least {group[what]['least']:.3f})"
                for what in ("distance", "ratio")
            )
            print(f"{name:<10} {line}")

    return exit_code(work)


if __name__ == "__main__":
    raise SystemExit(main())
