"""What computes the steps of a run: plain torch on one rank or several, or DeepSpeed.

The loop knows only the protocol here. All ranks call the same methods in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vidgen.core.runtime import choose_device
from vidgen.training.checkpoint import read_state, restore, restore_averages, write_state
from vidgen.training.config import RunConfig
from vidgen.training.ema import EMA, named_parameters
from vidgen.training.engines.distributed import Place
from vidgen.training.engines.shared_mean import open_shared_mean
from vidgen.training.optim import load_optimizer, set_lr
from vidgen.training.task import Losses, Task


class Engine(Protocol):
    """Holds weights, optimiser and averages: whole, or this rank's share of them."""

    ema: EMA

    def loss(self, batch: Any, step: int, *, last: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and named scalars of this rank's micro-batch, the last of its step or not."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of what `loss` gave last; gradients are the ranks' mean."""

    def discard(self, loss: Tensor) -> None:
        """Instead of the last `backward` of a step: drop the gradients so far."""

    def update(self, scale: float) -> float:
        """Clip the gradients, step at `scale` times the peak rates, and drop them.

        Returns:
            The gradients' norm before clipping; if it isn't finite, nothing was changed.
        """

    def averaged(self) -> AbstractContextManager[None]:
        """Within the block the modules hold the averaged weights."""

    def save(self, folder: Path) -> None:
        """Write this rank's part of a checkpoint into a folder that all ranks share."""

    def load(self, folder: Path) -> None:
        """Put a checkpoint back, all but the random generators.

        Raises:
            ModelError: it is of other modules or shapes.
        """


@contextmanager
def open_engine(
    task: Task, run: RunConfig, place: Place, source: Path | None
) -> Iterator[Engine]:
    """The engine that a run asks for, for as long as the block lasts.

    Args:
        task: whose modules it takes over.
        run: says which.
        place: of this process.
        source: the checkpoint that will be loaded, if any.

    Raises:
        InputError: an optimiser or a setting that the engine can't honour.
    """
    if run.engine.deepspeed is None:
        yield TorchEngine(task, run, place)
        return
    from vidgen.training.engines.deepspeed import DeepSpeedEngine

    engine = DeepSpeedEngine(task, run, place, source)
    try:
        yield engine
    finally:
        engine.close()


def live_weights(task: Task, *, frozen: bool | None = None) -> dict[str, Tensor]:
    """A task's weights and buffers by the names that checkpoints give them.

    Args:
        task: whose.
        frozen: whether with those that aren't trained; None: as the task says.
    """
    if frozen is None:
        frozen = getattr(task, "saves_frozen", True)
    tensors = {}
    for key, module in task.modules.items():
        left = set() if frozen else {n for n, p in module.named_parameters() if not p.requires_grad}
        for name, value in module.state_dict().items():
            if name not in left:
                tensors[f"model/{key}.{name}"] = value
    return tensors


class TorchEngine:
    """Whole weights on every rank.

    Where there are several, DDP takes the mean of gradients; among CPU ranks of one machine, ours.

    Args:
        task: what is trained.
        run: device, dtype, clipping, decay of the averages.
        place: of this process.
    """

    def __init__(self, task: Task, run: RunConfig, place: Place) -> None:
        self._task, self._place = task, place
        self._parameters = named_parameters(task.modules)
        self.optimizers = task.optimizers()
        self._max_norm = run.optim.grad_clip or math.inf
        device = choose_device(run.device)
        model: nn.Module = Losses(task, device, bf16=run.dtype == "bf16")
        self._mean = open_shared_mean(place) if place.size > 1 and device.type == "cpu" else None
        if self._mean is not None:
            for value in live_weights(task, frozen=True).values():
                dist.broadcast(value, src=0)
        elif place.size > 1:
            model = DistributedDataParallel(
                model, gradient_as_bucket_view=True,
                find_unused_parameters=getattr(task, "alternates", False),
            )
        self._model = model
        self.ema = EMA(self._parameters, run.ema_decay)  # of what all ranks have begun with

    def loss(self, batch: Any, step: int, *, last: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Engine`."""
        apart: AbstractContextManager[None] = nullcontext()
        if isinstance(self._model, DistributedDataParallel) and not last:
            apart = self._model.no_sync()
        with apart:
            loss, named = self._model(batch, step)
        return loss, named

    def backward(self, loss: Tensor) -> None:
        """See `Engine`."""
        loss.backward()

    def discard(self, loss: Tensor) -> None:
        """See `Engine`."""
        del loss
        self._drop_gradients()

    def update(self, scale: float) -> float:
        """See `Engine`."""
        set_lr(self.optimizers, scale)
        if self._mean is not None:
            self._mean.take_gradients(self._parameters.values())
        norm = self._clip()
        if math.isfinite(norm):
            for optimizer in self.optimizers:
                optimizer.step()
        self._drop_gradients()
        return norm

    def averaged(self) -> AbstractContextManager[None]:
        """See `Engine`."""
        return self.ema.swapped()

    def save(self, folder: Path) -> None:
        """See `Engine`."""
        if not self._place.main:
            return
        tensors = {f"ema/{name}": value for name, value in self.ema.shadow.items()}
        tensors |= live_weights(self._task)
        for index, optimizer in enumerate(self.optimizers):
            for parameter, slots in optimizer.state_dict()["state"].items():
                for slot, value in slots.items():
                    tensors[f"optim/{index}/{parameter}/{slot}"] = torch.as_tensor(value)
        write_state(folder, tensors)

    def load(self, folder: Path) -> None:
        """See `Engine`."""
        tensors = read_state(folder)
        restore(folder, self._task.modules, tensors)
        restore_averages(folder, self.ema.shadow, tensors)
        for index, optimizer in enumerate(self.optimizers):
            load_optimizer(optimizer, tensors, f"optim/{index}/")

    def _clip(self) -> float:
        """Bring the gradients' norm below its limit; returns what it was."""
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if norm > self._max_norm:  # else they would all be written again, times 1
            nn.utils.clip_grads_with_norm_(self._parameters.values(), self._max_norm, norm)
        return float(norm)

    def _drop_gradients(self) -> None:
        for parameter in self._parameters.values():
            parameter.grad = None
