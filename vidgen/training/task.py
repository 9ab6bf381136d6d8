"""The interface of training tasks, with their random draws and batches."""

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
    """The modules, optimisers, batches, loss and validation of a training run.

    Attributes:
        modules: modules to train, on the run's device.
        saves_frozen: whether checkpoints include frozen weights.
        alternates: whether some steps use only some of the parameters, such as one of two experts.
    """

    modules: dict[str, nn.Module]
    saves_frozen = True
    alternates = False

    @abstractmethod
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Return optimisers of the modules' parameters; each parameter group has a `peak_lr`."""

    def begin_step(self, step: int) -> bool:
        """Prepare a step; return True if the task changed weights itself: averages restart."""
        del step
        return False

    @abstractmethod
    def batch(self, step: int, micro: int) -> Any:
        """Make a micro-batch: a pure function of `step`, `micro` (from 0) and the run's seed.

        All R * `run.accumulate` ones of a step on R ranks have one shape; rank r takes r, r + R,
        and so on.
        """

    def files(self, batch: Any) -> list[str]:
        """Return the names of the files in a batch, for messages."""
        del batch
        return []

    @abstractmethod
    def loss(self, batch: Any, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and named scalars for the curve, of the same names on all ranks."""

    @abstractmethod
    def validate(self, step: int, folder: Path) -> dict[str, float]:
        """Return scores of the averaged weights on held-out data.

        All ranks make the same call. Files may be written to `folder`, which is kept on the main
        rank and temporary on the others.
        """


class Losses(nn.Module):
    """A task's loss as one module, so that DDP or DeepSpeed wraps all of the task's modules."""

    def __init__(self, task: Task, device: torch.device, *, bf16: bool) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(task.modules)
        self._device_type, self._bf16 = device.type, bf16
        self._loss = task.loss  # its modules are registered once, as `parts`

    def forward(self, batch: Any, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and named scalars of a micro-batch."""
        with torch.autocast(self._device_type, torch.bfloat16, enabled=self._bf16):
            return self._loss(batch, step)


def seed_of(*values: int | str) -> int:
    """Return an integer of 63 bits that is a pure function of the values."""
    return int.from_bytes(hashlib.sha256(repr(values).encode()).digest()[:8], "big") >> 1


def drawn(*values: int | str) -> float:
    """Return a number in [0, 1) that is a pure function of the values."""
    return seed_of(*values) / 2**63


def generator_of(*values: int) -> torch.Generator:
    """Return a CPU generator whose seed is a pure function of the values."""
    return torch.Generator().manual_seed(seed_of(*values))


class Batches:
    """The micro-batches of one rank; with `ahead` a thread makes the next one during a step.

    `ahead` is for GPUs: on a CPU the thread would compete with the step for the same cores.
    """

    def __init__(self, task: Task, run: RunConfig, place: Place, *, ahead: bool) -> None:
        self.task, self.run, self.place = task, run, place
        self.pool = ThreadPoolExecutor(1, "vidgen-batches") if ahead else None
        self.coming: dict[tuple[int, int], Future[Any]] = {}

    def get(self, step: int, micro: int) -> Any:
        """Return this rank's micro-batch `micro` (from 0) of a step."""
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
