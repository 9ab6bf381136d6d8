"""Runs in phases, stretches with one data shape each, and the laboratory's tasks in them.

The training loop knows steps alone; `train` gives it a task whose batches are of the step's phase.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from vidgen.core.errors import InputError
from vidgen.core.runtime import atomic_path, choose_device
from vidgen.core.values import check_number
from vidgen.training import loop
from vidgen.training.checkpoint import META, latest_checkpoint
from vidgen.training.config import MAX_RATE, RunConfig
from vidgen.training.engines.distributed import Place, current_place
from vidgen.training.task import Task

WORKERS = 14
"""Most processes that make a small network's batches: one batch takes as long as several steps."""


@dataclass(frozen=True)
class Phase:
    """A stretch of a run with one data shape.

    Args:
        steps: optimiser steps in this phase.
        num_frames: pixel frames of each sample (1 mod the VAE's temporal stride).
        batch_size: samples a micro-batch, on each rank.
        accumulate: micro-batches a step.
        warmup_steps: the rate rises again over so many steps, where the data change much.
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
        check_number("phase.lr_scale", self.lr_scale, 0, MAX_RATE)


@dataclass(frozen=True)
class PhasedRun(RunConfig):
    """A run whose steps and batches are those of its phases."""

    steps: int = field(init=False, default=0)
    batch_size: int = field(init=False, default=1)
    accumulate: int = field(init=False, default=1)
    phases: tuple[Phase, ...] = ()
    # another run's folder whose newest checkpoint this one starts from, in full
    branch_from: str | None = None

    def __post_init__(self) -> None:
        if not self.phases:
            raise InputError("phases is empty; a run needs at least one phase")
        object.__setattr__(self, "steps", sum(phase.steps for phase in self.phases))
        super().__post_init__()

    def phase_at(self, step: int) -> tuple[int, Phase]:
        """Return the index and the phase to which optimiser step `step` (from 0) belongs."""
        for index, phase in enumerate(self.phases):
            if step < phase.steps:
                return index, phase
            step -= phase.steps
        return len(self.phases) - 1, self.phases[-1]

    def begin_of(self, index: int) -> int:
        """Return the first step of a phase."""
        return sum(phase.steps for phase in self.phases[:index])

    def micro_batches(self, step: int) -> tuple[int, int]:
        """Return how many micro-batches a rank takes at `step`, and how many samples each has."""
        _, phase = self.phase_at(step)
        return phase.accumulate, phase.batch_size

    def lr_scale(self, step: int) -> float:
        """Return the factor of the peak rates at `step`: the schedule's times the phase's."""
        index, phase = self.phase_at(step)
        inside = step - self.begin_of(index)
        own = phase.lr_scale * min(1.0, (inside + 1) / max(1, phase.warmup_steps))
        return super().lr_scale(step) * own


class PhasedTask(Protocol):
    """What the laboratory trains: a `vidgen.training.task.Task` whose batches are of a phase.

    Three more are optional: `start_phase(index, phase)` is called before a phase's first step and
    gives True if it changed weights by hand; `alternates` is as in `Task`; `makes_on_cpu`, if True,
    says that `batch` needs no GPU, and `loss` brings it there.
    """

    modules: dict[str, nn.Module]

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """See `Task`."""

    def batch(self, phase: Phase, step: int, micro: int) -> Any:
        """Make a micro-batch of a step: a pure function of its arguments and the run's seed."""

    def loss(self, batch: Any, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Task`."""

    def validate(self, step: int, folder: Path) -> dict[str, float]:
        """See `Task`."""


class InPhases(Task):
    """A task as the training loop takes it.

    On a GPU batches that need none are made in processes while the steps before compute.

    Args:
        task: the laboratory's.
        run: with the phases.
        in_processes: whether batches are made in processes; None: as task and device ask for.
    """

    def __init__(
        self, task: PhasedTask, run: PhasedRun, *, in_processes: bool | None = None
    ) -> None:
        self._task, self._run, self.modules = task, run, task.modules
        self.alternates = getattr(task, "alternates", False)
        if in_processes is None:
            on_cpu = choose_device(run.device).type == "cpu"
            in_processes = getattr(task, "makes_on_cpu", False) and not on_cpu
        self._made = _InProcesses(self._make, run, current_place()) if in_processes else None

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Return the task's."""
        return self._task.optimizers()

    def begin_step(self, step: int) -> bool:
        """Start a phase with its first step; return whether weights were changed by hand."""
        index, phase = self._run.phase_at(step)
        change = getattr(self._task, "start_phase", None)
        if change is None or step != self._run.begin_of(index):
            return False
        return bool(change(index, phase))

    def batch(self, step: int, micro: int) -> Any:
        """Make a micro-batch of the step's phase."""
        return self._make(step, micro) if self._made is None else self._made.get(step, micro)

    def loss(self, batch: Any, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the task's."""
        return self._task.loss(batch, step)

    def validate(self, step: int, folder: Path) -> dict[str, float]:
        """Return the task's scores."""
        return self._task.validate(step, folder)

    def _make(self, step: int, micro: int) -> Any:
        return self._task.batch(self._run.phase_at(step)[1], step, micro)


class _ByKey(Dataset[Any]):
    """Micro-batches by (step, micro)."""

    def __init__(self, make: Callable[[int, int], Any]) -> None:
        self.make = make

    def __getitem__(self, key: tuple[int, int]) -> Any:
        return self.make(*key)


class _InProcesses:
    """A rank's micro-batches in their order, made in processes."""

    def __init__(self, make: Callable[[int, int], Any], run: PhasedRun, place: Place) -> None:
        self._batches, self._run, self._place = _ByKey(make), run, place
        self._coming: tuple[Iterator[tuple[int, int]], Iterator[Any]] | None = None

    def get(self, step: int, micro: int) -> Any:
        """Return a batch; where another than the next one is asked for, the processes restart."""
        if self._coming is None or next(self._coming[0], None) != (step, micro):
            keys = self._from(step, micro)
            next(keys)
            spare = (os.cpu_count() or 1) - 2
            loader = DataLoader(
                self._batches, batch_size=None, sampler=self._from(step, micro),
                num_workers=max(1, min(WORKERS, spare)), multiprocessing_context="fork",
                generator=torch.Generator(),  # else it would draw from the run's own
            )
            self._coming = keys, iter(loader)
        return next(self._coming[1])

    def _from(self, step: int, micro: int) -> Iterator[tuple[int, int]]:
        """Yield this rank's micro-steps from one on, to the end of the run."""
        size = self._place.data_size
        while step < self._run.steps:
            count, _ = self._run.micro_batches(step)
            for later in range(micro, count * size, size):
                yield step, later
            step, micro = step + 1, self._place.data_rank


_OF_RUN = {"sums", "count", "best", "best_of", "best_step"}
"""State of a trunk's curve and best checkpoint, which a branch begins without."""


def train(
    task: PhasedTask, run: PhasedRun, *, resume: bool = False, **options: Any
) -> loop.TrainResult:
    """Run a task through all phases; options as those of the training loop."""
    folder, place = Path(run.folder), current_place()
    begins = run.branch_from is not None and latest_checkpoint(folder) is None
    place.barrier()
    if begins and place.main:
        source = latest_checkpoint(Path(run.branch_from or ""))
        if source is None:
            raise InputError(f"branch_from {run.branch_from} holds no checkpoint")
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder / source.name) as copy:
            shutil.copytree(source, copy)
            meta = json.loads((copy / META).read_text())
            kept = {name: meta[name] for name in meta.keys() - _OF_RUN}
            (copy / META).write_text(json.dumps(kept))
    place.barrier()
    return loop.train(InPhases(task, run), run, resume=resume or begins, **options)
