"""What a training run is told: read strictly from YAML, dumped beside every result."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vidgen.core.config import flattened
from vidgen.core.errors import InputError
from vidgen.core.runtime import best_dtype, choose_device

MAX_RATE = 100
"""Of learning rates, their factors and weight decay: far beyond what any run survives."""
MAX_SEED = 2**32 - 1


def check_number(
    name: str, value: float | None, *, least: float = 0, most: float = math.inf
) -> None:
    """Raise InputError for a number outside of its range, or for NaN."""
    if value is not None and not least <= value <= most:
        limit = f"from {least} to {most}" if most < math.inf else f"of at least {least}"
        raise InputError(f"{name} is {value}; give a number {limit}")


@dataclass(frozen=True)
class Phase:
    """A stretch of a run with one data shape.

    Args:
        steps: optimiser steps in this phase.
        num_frames: pixel frames of each sample (1 mod the VAE's temporal stride).
        batch_size: samples a micro-batch, on each rank.
        accumulate: micro-batches a step.
        warmup_steps: the rate rises anew over so many steps, where the data change much.
        lr_scale: factor of the rates in this phase.
    """

    steps: int
    num_frames: int
    batch_size: int
    accumulate: int = 1
    warmup_steps: int = 0
    lr_scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("steps", "num_frames", "batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise InputError(f"phase.{name} is {getattr(self, name)}; it must be at least 1")
        check_number("phase.warmup_steps", self.warmup_steps)
        check_number("phase.lr_scale", self.lr_scale, most=MAX_RATE)


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser and learning-rate schedule.

    The trunk runs at a constant rate after a linear warm-up; a release is a short branch that
    decays to zero as 1 - sqrt(progress) (Hagele et al. 2024, sec. 3), so a run that is cut
    loses nothing.

    Args:
        lr: peak rate of AdamW; Muon uses `muon_lr` (update scaled to AdamW's RMS).
        decay_from: step at which the decay branch starts; None keeps the rate constant.
        decay_steps: length of that branch.
        grad_clip: largest global gradient norm; 0 switches clipping off.
    """

    lr: float = 5e-4
    muon_lr: float | None = None
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    warmup_steps: int = 200
    decay_from: int | None = None
    decay_steps: int = 0
    grad_clip: float = 1.0

    def __post_init__(self) -> None:
        for name in ("lr", "muon_lr", "weight_decay"):
            check_number(f"optim.{name}", getattr(self, name), most=MAX_RATE)
        for name in ("warmup_steps", "decay_from", "decay_steps", "grad_clip"):
            check_number(f"optim.{name}", getattr(self, name))
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"optim.betas is {list(self.betas)}; give two shares below 1")
        if (self.decay_from is None) != (self.decay_steps == 0):
            raise InputError(
                f"optim.decay_from is {self.decay_from} and optim.decay_steps {self.decay_steps}; "
                "give both, the step at which the decay begins and its length, or neither"
            )


@dataclass(frozen=True)
class EngineConfig:
    """What computes the steps where there are several ranks, or too little memory for one.

    Args:
        deepspeed: a DeepSpeed JSON that says ZeRO's stage, offload and buckets, by its path or by
            its name below `train/deepspeed`; None: plain torch.
        sequence: ranks that share each sample's tokens (DeepSpeed-Ulysses); divides the ranks.
    """

    deepspeed: str | None = None
    sequence: int = 1

    def __post_init__(self) -> None:
        if self.sequence < 1:
            raise InputError(f"engine.sequence is {self.sequence}; it must be at least 1")


@dataclass(frozen=True)
class RunConfig:
    """How long, how often, where: everything that is not the task's own.

    Args:
        folder: run folder: checkpoints, `curve.jsonl`, sheets, the resolved config, `pid`.
        branch_from: another run's folder whose newest checkpoint this one starts from, in full.
        minutes: wall-clock limit of one sitting; the run ends cleanly with a checkpoint.
        keep: newest checkpoints that are kept.
        dtype: of the computation; weights are float32. `auto` is bf16 where the device has it and
            becomes what it stands for here, so that the run's record says so.
        best: a validation score; the checkpoint where it was lowest is kept besides, and is what
            fine-tuning exports.
        spike_factor: a loss beyond this multiple of its running mean is as unusable as NaN.
        on_bad: what an unusable step leads to: it is skipped; the newest checkpoint is loaded again
            and the step left out; or the run stops.
    """

    folder: str
    phases: tuple[Phase, ...]
    optim: OptimConfig = field(default_factory=OptimConfig)
    seed: int = 0
    device: str = "auto"
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    ema_decay: float = 0.999
    branch_from: str | None = None
    minutes: float | None = None
    log_every: int = 20
    validate_every: int = 500
    checkpoint_minutes: float = 4.0
    keep: int = 2
    best: str | None = None
    spike_factor: float = 20.0
    on_bad: Literal["skip", "rollback", "stop"] = "skip"
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        if not self.phases:
            raise InputError("phases is empty; a run needs at least one phase")
        for name in ("keep", "log_every", "validate_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        check_number("seed", self.seed, most=MAX_SEED)
        check_number("checkpoint_minutes", self.checkpoint_minutes)
        for name, least in (("minutes", 0), ("spike_factor", 1)):
            value = getattr(self, name)
            if value is not None and not value > least:
                raise InputError(f"{name} is {value}; give a number above {least}")
        if not 0 <= self.ema_decay < 1:
            raise InputError(f"ema_decay is {self.ema_decay}; give a share below 1")
        if self.dtype == "auto":
            object.__setattr__(self, "dtype", self._fastest_dtype())

    def _fastest_dtype(self) -> str:
        if self.device.startswith("cuda"):  # which needn't be here where a run is only planned
            return "bf16"
        return best_dtype(choose_device(self.device))

    @property
    def num_steps(self) -> int:
        """Steps of all phases together."""
        return sum(phase.steps for phase in self.phases)

    def phase_at(self, step: int) -> tuple[int, Phase]:
        """Index and phase to which optimiser step `step` (from 0) belongs."""
        for index, phase in enumerate(self.phases):
            if step < phase.steps:
                return index, phase
            step -= phase.steps
        return len(self.phases) - 1, self.phases[-1]

    def phase_rate(self, step: int) -> float:
        """Factor of the rates at `step` that its phase asks for."""
        index, phase = self.phase_at(step)
        inside = step - sum(earlier.steps for earlier in self.phases[:index])
        return phase.lr_scale * min(1.0, (inside + 1) / max(1, phase.warmup_steps))


_FREE = ("run.folder", "run.minutes", "run.log_every", "run.validate_every", "run.best",
         "run.checkpoint_minutes", "run.keep", "run.on_bad", "run.device", "run.engine",
         "run.steps", "validation.", "output.", "tensorboard")
"""Beginnings of keys that may change when a run goes on, as they don't change what it learns."""


def refuse_changes(path: Path, record: dict[str, Any]) -> None:
    """Refuse to go on under another config than the one that a run began with.

    The length of the last phase may change: a run may go on for longer.

    Args:
        path: `task.json` of the run's folder.
        record: the resolved config now.

    Raises:
        InputError: names the keys that differ, with both values.
    """
    try:
        began = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}, the config that the run began with, can't be read: {error}; put "
                         "it back, or confirm with --accept-changes") from None
    before, now = flattened(began), flattened(record)
    free = (*_FREE, f"run.phases.{len(record['run'].get('phases', ())) - 1}.steps")
    changed = [
        f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not key.startswith(free)
    ]
    if changed:
        raise InputError(
            f"the run in {path.parent} began with another config: {'; '.join(changed[:8])}"
            f"{'; ...' if len(changed) > 8 else ''}; put that back, name another folder, or "
            "confirm with --accept-changes"
        )
