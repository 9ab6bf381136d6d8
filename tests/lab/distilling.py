"""A tiny model that is taught a student: its run's YAML, with clips and trajectories made."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models import DEFAULTS, build_tiny_model
from tests.programs import load_program
from train.toybox.distillation.config import DistilRun
from train.toybox.distillation.data import open_shards
from train.toybox.model_files import INT8_FROM, in_int8
from train.toybox.tasks.toybox_data import ToyboxCache, load_vae
from vidgen.core.config import build
from vidgen.weights.folder import write_model_info


def make_settings(folder: Path) -> dict[str, Any]:
    """A run's YAML; its teacher makes sound, too."""
    model = build_tiny_model(folder / "models" / "tiny", sound=True)
    settings = {
        "teacher": str(model),
        "caches": [{"folder": str(folder / "latents"), "vae": str(model / "vae"), "shards": 1,
                    "shard_size": 6, "height": 32, "width": 32}],
        "trajectories": {"folder": str(folder / "trajectories"), "shards": 2, "shard_size": 4,
                         "held_out": 2, "num_frames": 9, "num_steps": 2, "shift": 5.0,
                         "guidance_scale": 3.0, "image_guidance_scale": 2.0, "seed": 3},
        "delta": {"rank": 4, "targets": ["self_attn", "cross_attn", "ffn", "head.proj"]},
        "run": {
            "folder": str(folder / "run"), "device": "cpu", "dtype": "fp32", "log_every": 1,
            "validate_every": 100, "checkpoint_minutes": 9, "ema_decay": 0.5,
            "optim": {"lr": 1e-2, "warmup_steps": 1, "weight_decay": 0.0},
            "phases": [{"steps": 24, "num_frames": 9, "batch_size": 4}],
        },
    }  # fmt: skip
    config = build(DistilRun, settings, "run")
    cache = ToyboxCache(config.caches[0])
    cache.make(0, load_vae(config.caches[0].vae, torch.device("cpu")), torch.device("cpu"))
    make_trajectories(config)
    return settings


def make_trajectories(config: DistilRun) -> None:
    """What `train/toybox/trajectories.py` makes."""
    shards = open_shards(config)
    teacher = shards.teacher(torch.float32)
    for index in shards.missing():
        shards.make(index, teacher)


def with_run(settings: dict[str, Any], folder: Path, **changes: Any) -> DistilRun:
    """The run of a YAML in another folder, with other settings of `run`."""
    return build(DistilRun, {**settings, "run": {**settings["run"], "folder": str(folder),
                                                 **changes}}, "run")


def as_stored(factor: torch.Tensor) -> torch.Tensor:
    """A factor of a delta as a release holds it: in int8, where it is large enough."""
    stored = in_int8({"factor": factor.bfloat16()}, INT8_FROM)
    if "factor_scale" not in stored:
        return stored["factor"]
    return (stored["factor"] * stored["factor_scale"]).bfloat16()


def released(
    run: Path, model: Path, folder: Path, boundary: float | None = None, upsampling: int = 1
) -> Path:
    """A copy of a model with the delta that a run taught, and its own defaults again."""
    shutil.copytree(model, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["release.py", "student", "--run", str(run), "--out",
                                    str(folder)])
        assert load_program("train/toybox/release.py").main() == 0
    info = json.loads((folder / "model.json").read_text())
    write_model_info(folder, name="tiny", family="toybox", license_name="Apache-2.0",
                     tasks=tuple(info["tasks"]), defaults=replace(
                         DEFAULTS, boundary=boundary, settings={"temporal_upsampling": upsampling}))
    return folder
