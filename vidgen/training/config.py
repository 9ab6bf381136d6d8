"""Settings of a training run, read strictly from YAML and dumped with every result."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vidgen.core.config import flattened
from vidgen.core.errors import InputError
from vidgen.core.runtime import best_dtype, choose_device
from vidgen.core.values import check_number

MAX_RATE = 100
"""Limit of learning rates, their factors and weight decay, far above any usable value."""
MAX_SEED = 2**32 - 1


@dataclass(frozen=True)
class OptimConfig:
    """Hold the settings of the optimiser and its learning-rate schedule.

    The rate is constant after a linear warm-up, and decays to zero as 1 - sqrt(progress) from the
    step `decay_from` on (Hagele et al. 2024, sec. 3).
    """

    lr: float = 5e-4  # peak rate of AdamW; Muon uses `muon_lr` (its update has AdamW's RMS)
    muon_lr: float | None = None
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    warmup_steps: int = 200
    # step at which the decay starts; None keeps the rate constant
    decay_from: int | None = None
    decay_steps: int = 0  # length of the decay
    grad_clip: float = 1.0  # largest global gradient norm; 0 switches clipping off

    def __post_init__(self) -> None:
        for name in ("lr", "muon_lr", "weight_decay"):
            check_number(f"optim.{name}", getattr(self, name), 0, MAX_RATE)
        for name in ("warmup_steps", "decay_from", "decay_steps"):
            check_number(f"optim.{name}", getattr(self, name))
        check_number("optim.grad_clip", self.grad_clip, infinite=True)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"optim.betas is {list(self.betas)}; give two numbers in [0, 1)")
        if (self.decay_from is None) != (self.decay_steps == 0):
            raise InputError(
                f"optim.decay_from is {self.decay_from} and optim.decay_steps {self.decay_steps}; "
                "give both, the step at which the decay begins and its length, or neither")

    def scale_at(self, step: int) -> float:
        """Return the factor of the peak rates at `step`, from 0 to 1."""
        scale = min(1.0, (step + 1) / max(1, self.warmup_steps))
        if self.decay_from is not None and step >= self.decay_from:
            progress = (step - self.decay_from + 1) / max(1, self.decay_steps)
            scale *= max(0.0, 1.0 - min(1.0, progress) ** 0.5)
        return scale


@dataclass(frozen=True)
class EngineConfig:
    """Hold settings for several ranks, or for little memory on one."""

    # a DeepSpeed JSON with ZeRO's stage, offload and buckets: a path, or a name below
    # `train/deepspeed`; None: plain torch
    deepspeed: str | None = None
    # ranks that share each sample's tokens (DeepSpeed-Ulysses); divides the number of ranks
    sequence: int = 1

    def __post_init__(self) -> None:
        check_number("engine.sequence", self.sequence, 1, whole=True)


@dataclass(frozen=True)
class RunConfig:
    """Hold the settings of a run that apply to every task: folder, length, rates, engine."""

    folder: str  # run folder: checkpoints, `curve.jsonl`, sheets, the resolved config, `pid`
    steps: int = 1000  # optimiser steps
    batch_size: int = 1  # samples per micro-batch and rank
    accumulate: int = 1  # micro-batches per step and rank
    optim: OptimConfig = field(default_factory=OptimConfig)
    seed: int = 0
    device: str = "auto"
    # of the computation; weights are float32. `auto` is bf16 where the device supports it; it is
    # replaced by the chosen dtype, so that the run's record names that.
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    ema_decay: float = 0.999
    # wall-clock limit of one process, after which it writes a checkpoint and ends
    minutes: float | None = None
    log_every: int = 20
    validate_every: int = 500
    checkpoint_minutes: float = 4.0
    keep: int = 2  # number of newest checkpoints that are kept
    # a validation score; the checkpoint with the lowest one is also kept, and exported
    best: str | None = None
    # a loss above this multiple of its running mean is unusable, as NaN is; .inf: no such limit
    spike_factor: float = 20.0
    on_bad: Literal["skip", "stop"] = "skip"  # the effect of an unusable step
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "keep", "log_every", "validate_every"):
            check_number(f"run.{name}", getattr(self, name), 1, whole=True)
        check_number("seed", self.seed, 0, MAX_SEED)
        check_number("checkpoint_minutes", self.checkpoint_minutes, infinite=True)
        check_number("minutes", self.minutes, above=True, infinite=True)
        check_number("spike_factor", self.spike_factor, 1, above=True, infinite=True)
        if not 0 <= self.ema_decay < 1:
            raise InputError(f"ema_decay is {self.ema_decay}; give a number in [0, 1)")
        if self.dtype == "auto":
            object.__setattr__(self, "dtype", self._fastest_dtype())

    def _fastest_dtype(self) -> str:
        if self.device.startswith("cuda"):  # this machine may only plan the run, without a GPU
            return "bf16"
        return best_dtype(choose_device(self.device))

    def micro_batches(self, _step: int) -> tuple[int, int]:
        """Return the number of micro-batches per rank at a step, and of samples in each."""
        return self.accumulate, self.batch_size

    def lr_scale(self, step: int) -> float:
        """Return the factor of the peak rates at `step`."""
        return self.optim.scale_at(step)


_FREE = ("run.folder", "run.minutes", "run.log_every", "run.validate_every", "run.best",
         "run.checkpoint_minutes", "run.keep", "run.on_bad", "run.device", "run.engine",
         "run.steps", "validation.", "output.", "tensorboard")
"""Prefixes of keys that may change when a run resumes, as they don't affect its weights."""


def refuse_changes(path: Path, record: dict[str, Any]) -> None:
    """Raise InputError if a run would resume with another config than that in `task.json`."""
    try:
        began = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}, the config of the run so far, can't be read: {error}; restore "
                         "it, or confirm with --accept-changes") from None
    before, now = flattened(began), flattened(record)
    changed = [f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
               for key in sorted(before.keys() | now.keys())
               if before.get(key) != now.get(key) and not key.startswith(_FREE)]
    if changed:
        raise InputError(
            f"the run in {path.parent} began with another config: {'; '.join(changed[:8])}"
            f"{'; ...' if len(changed) > 8 else ''}; restore that one, choose another folder, or "
            "confirm with --accept-changes")
