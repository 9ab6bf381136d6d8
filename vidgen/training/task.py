"""What a run trains: the interface between the loop and its tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vidgen.training.config import Phase


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
