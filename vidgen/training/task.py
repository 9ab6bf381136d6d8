"""The interface between the loop and a task: its modules, losses, random draws and batches."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vidgen.training.config import RunConfig
from vidgen.training.engines.distributed import Place


class Task(ABC):
    """Define what is trained. Modules are on the run's device when the loop begins.

    Attributes:
        saves_frozen: whether checkpoints hold frozen weights, too.
        alternates: whether some parameters have no part in some steps, such as an expert.
    """

    modules: dict[str, nn.Module]
    saves_frozen = True
    alternates = False

    @abstractmethod
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Return optimisers over the modules' parameters, each group with its `peak_lr`."""

    def begin_step(self, step: int) -> bool:
        """Prepare a step; return whether weights were changed by hand."""
        del step
        return False

    @abstractmethod
    def batch(self, step: int, micro: int) -> Any:
        """Make a micro-batch of a step: a pure function of its arguments and the run's seed.

        On R ranks a step has R times `run.accumulate` of them, of one shape; rank r is asked for
        r, r + R, ...
        """

    def files(self, batch: Any) -> list[str]:
        """Name the files that a batch was made of, for messages."""
        del batch
        return []

    @abstractmethod
    def loss(self, batch: Any, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and named scalars for the curve; the names depend on the step alone."""

    @abstractmethod
    def validate(self, step: int, folder: Path) -> dict[str, float]:
        """Score the averaged weights on held-out data; sheets may be written to `folder`.

        All ranks call it at once and do the same; the folder of all but the first is thrown away.
        """


class Losses(nn.Module):
    """A task's loss as one module, so that engines wrap all of the task's modules at once."""

    def __init__(self, task: Task, device: torch.device, *, bf16: bool) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(task.modules)
        self._device_type, self._bf16 = device.type, bf16
        self._loss = task.loss  # a bound method, so the task is no part of this module

    def forward(self, batch: Any, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and named scalars of a micro-batch."""
        with torch.autocast(self._device_type, torch.bfloat16, enabled=self._bf16):
            return self._loss(batch, step)


def seed_of(*values: int | str) -> int:
    """Return 63 bits that depend on all of the values and on nothing else."""
    return int.from_bytes(hashlib.sha256(repr(values).encode()).digest()[:8], "big") >> 1


def drawn(*values: int | str) -> float:
    """Return a number in [0, 1) that depends on all of the values and on nothing else."""
    return seed_of(*values) / 2**63


def generator_of(*values: int) -> torch.Generator:
    """Return a CPU generator whose draws depend on all of the values and on nothing else."""
    return torch.Generator().manual_seed(seed_of(*values))


class Batches:
    """This rank's micro-batches; if `ahead`, the next one is made in a thread during the step.

    That is for GPUs: on a CPU making and computing would compete for the same cores.
    """

    def __init__(self, task: Task, run: RunConfig, place: Place, *, ahead: bool) -> None:
        self.task, self.run, self.place = task, run, place
        self.pool = ThreadPoolExecutor(1, "vidgen-batches") if ahead else None
        self.coming: dict[tuple[int, int], Future[Any]] = {}

    def get(self, step: int, micro: int) -> Any:
        """Return the batch of this rank's micro-step `micro` (from 0) of a step."""
        if self.pool is None:
            return self._make(step, micro)
        future = self.coming.pop((step, micro), None) or self.pool.submit(self._make, step, micro)
        batch = future.result()
        is_last = micro + 1 == self.run.micro_batches(step)[0]
        following = (step + 1, 0) if is_last else (step, micro + 1)
        if following[0] < self.run.steps:
            self.coming[following] = self.pool.submit(self._make, *following)
        return batch

    def _make(self, step: int, micro: int) -> Any:
        return self.task.batch(step, micro * self.place.data_size + self.place.data_rank)
