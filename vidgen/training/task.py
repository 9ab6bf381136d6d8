"""The interface between the loop and what it trains: tasks, what a step draws, its batches."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from vidgen.training.config import Phase, RunConfig
from vidgen.training.engines.distributed import Place

WORKERS = 14
"""Most processes that make a small network's batches: one batch takes as long as several steps."""

_Key = tuple[int, int]


class Task(Protocol):
    """What is trained. Modules are on the run's device when the loop begins.

    Five more are optional: `start_phase(index, phase)` is called before a phase's first step, once,
    and gives True if it changed weights by hand; `files(batch)` names what a batch was made of, for
    messages; `saves_frozen`, if False, keeps frozen weights out of checkpoints; `alternates`, if
    True, tells that some parameters have no part in some steps, such as an expert or what makes
    sound; `makes_on_cpu`, if True, that `batch` needs no GPU, and `loss` brings it there.
    """

    modules: dict[str, nn.Module]

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Optimisers over the modules' parameters, each group with its `peak_lr`."""

    def batch(self, phase: Phase, step: int, micro: int) -> Any:
        """A micro-batch of a step: a pure function of its arguments and the run's seed.

        On R ranks a step has R times `phase.accumulate` of them, of one shape; rank r is asked for
        r, r + R, ...
        """

    def loss(self, batch: Any, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss and named scalars for the curve; the names depend on the step alone."""

    def validate(self, step: int, folder: Path) -> dict[str, float]:
        """Scores of the averaged weights on held-out data; may write sheets to `folder`.

        All ranks call it at once and do the same; the folder of all but the first is thrown away.
        """


class Losses(nn.Module):
    """A task's loss as one module, so that what wraps modules wraps all of the task's at once."""

    def __init__(self, task: Task, device: torch.device, *, bf16: bool) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(task.modules)
        self._device_type, self._bf16 = device.type, bf16
        self._loss = task.loss  # a bound method, so the task is no part of this module

    def forward(self, batch: Any, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and named scalars of a micro-batch."""
        with torch.autocast(self._device_type, torch.bfloat16, enabled=self._bf16):
            return self._loss(batch, step)


def seed_of(*values: int) -> int:
    """63 bits that depend on all of the values and on nothing else."""
    digest = hashlib.sha256(repr(values).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator_of(*values: int) -> torch.Generator:
    """A CPU generator whose draws depend on all of the values and on nothing else."""
    return torch.Generator().manual_seed(seed_of(*values))


class _ByKey(Dataset[Any]):
    """Micro-batches by (step, micro)."""

    def __init__(self, make: Callable[[int, int], Any]) -> None:
        self.make = make

    def __getitem__(self, key: _Key) -> Any:
        return self.make(*key)


class Batches:
    """This rank's micro-batches; if `ahead`, the next ones are made beside the step.

    That is for GPUs: on a CPU making and computing would compete for the same cores. What a task
    makes on the CPU is made in processes, all else in one thread.
    """

    def __init__(self, task: Task, run: RunConfig, place: Place, *, ahead: bool) -> None:
        self.task, self.run, self.place = task, run, place
        forks = ahead and getattr(task, "makes_on_cpu", False)
        self.pool = ThreadPoolExecutor(1, "vidgen-batches") if ahead and not forks else None
        self.loader = _ByKey(self._make) if forks else None
        self.coming: dict[_Key, Future[Any]] = {}
        self.stream: tuple[Iterator[_Key], Iterator[Any]] | None = None

    def get(self, step: int, micro: int) -> Any:
        """The batch of this rank's micro-step `micro` (from 0) of a step."""
        if self.loader is not None:
            return self._loaded(self.loader, step, micro)
        if self.pool is None:
            return self._make(step, micro)
        future = self.coming.pop((step, micro), None)
        future = future or self.pool.submit(self._make, step, micro)
        batch = future.result()
        following = next(islice(self._from(step, micro), 1, None), None)
        if following is not None:
            self.coming[following] = self.pool.submit(self._make, *following)
        return batch

    def _loaded(self, batches: _ByKey, step: int, micro: int) -> Any:
        """The next one of the processes, which begin anew where another one is asked for."""
        if self.stream is None or next(self.stream[0], None) != (step, micro):
            keys = self._from(step, micro)
            next(keys)
            spare = (os.cpu_count() or 1) - 2
            loader = DataLoader(
                batches, batch_size=None, sampler=self._from(step, micro),
                num_workers=max(1, min(WORKERS, spare)), multiprocessing_context="fork",
                generator=torch.Generator(),  # else it would draw from the run's own
            )
            self.stream = keys, iter(loader)
        return next(self.stream[1])

    def _from(self, step: int, micro: int) -> Iterator[_Key]:
        """Micro-steps from one on, to the end of the run."""
        while step < self.run.num_steps:
            for later in range(micro, self.run.phase_at(step)[1].accumulate):
                yield step, later
            step, micro = step + 1, 0

    def _make(self, step: int, micro: int) -> Any:
        phase: Phase = self.run.phase_at(step)[1]
        return self.task.batch(phase, step, micro * self.place.data_size + self.place.data_rank)
