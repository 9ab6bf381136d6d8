"""What computes the steps of a run: plain torch on one rank or several, or DeepSpeed.

The loop knows only `Engine`. All ranks call the same methods in the same order.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vidgen.core.errors import ModelError
from vidgen.core.runtime import choose_device
from vidgen.training import checkpoint
from vidgen.training.config import RunConfig
from vidgen.training.engines.distributed import Place
from vidgen.training.optim import EMA, named_parameters, set_lr
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

        Return their norm before clipping; if it isn't finite, nothing was changed.
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
def open_engine(task: Task, run: RunConfig, place: Place, source: Path | None) -> Iterator[Engine]:
    """The engine that a run asks for; `source` is the checkpoint that will be loaded, if any.

    Raises:
        InputError: an optimiser or a setting that the engine can't honour.
    """
    if run.engine.deepspeed is None:
        yield _TorchEngine(task, run, place)
        return
    from vidgen.training.engines.deepspeed import open_deepspeed

    with open_deepspeed(task, run, place, source) as engine:
        yield engine


class _TorchEngine:
    """Whole weights on every rank; where there are several, DDP takes the mean of gradients."""

    def __init__(self, task: Task, run: RunConfig, place: Place) -> None:
        self._task, self._place = task, place
        self._parameters = named_parameters(task.modules)
        self._optimizers = task.optimizers()
        self._max_norm = run.optim.grad_clip or math.inf
        device = choose_device(run.device)
        self._model: nn.Module = Losses(task, device, bf16=run.dtype == "bf16")
        if place.size > 1:
            # the search, which costs a CPU nothing, complains where it finds that all are used
            warnings.filterwarnings("ignore", "find_unused_parameters=True was specified")
            self._model = DistributedDataParallel(
                self._model, gradient_as_bucket_view=True,
                find_unused_parameters=device.type == "cpu" or getattr(task, "alternates", False))
        self.ema = EMA(self._parameters, run.ema_decay)  # of what all ranks have begun with
        self.averaged = self.ema.swapped

    def loss(self, batch: Any, step: int, *, last: bool) -> tuple[Tensor, dict[str, Tensor]]:
        apart: AbstractContextManager[None] = nullcontext()
        if isinstance(self._model, DistributedDataParallel) and not last:
            apart = self._model.no_sync()
        with apart:
            loss, named = self._model(batch, step)
        return loss, named

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def discard(self, loss: Tensor) -> None:
        del loss
        self._drop_gradients()

    def update(self, scale: float) -> float:
        set_lr(self._optimizers, scale)
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if norm > self._max_norm:  # else they would all be written again, times 1
            nn.utils.clip_grads_with_norm_(self._parameters.values(), self._max_norm, norm)
        if math.isfinite(norm):
            for optimizer in self._optimizers:
                optimizer.step()
        self._drop_gradients()
        return float(norm)

    def _drop_gradients(self) -> None:
        for parameter in self._parameters.values():
            parameter.grad = None

    def save(self, folder: Path) -> None:
        if not self._place.main:
            return
        tensors = {f"ema/{name}": value for name, value in self.ema.shadow.items()}
        tensors |= checkpoint.live_weights(self._task)
        for index, optimizer in enumerate(self._optimizers):
            for parameter, slots in optimizer.state_dict()["state"].items():
                for slot, value in slots.items():
                    tensors[f"optim/{index}/{parameter}/{slot}"] = torch.as_tensor(value)
        checkpoint.write_state(folder, tensors)

    def load(self, folder: Path) -> None:
        tensors = checkpoint.read_state(folder)
        for key, module in self._task.modules.items():
            frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
            kept = {name: t for name, t in module.state_dict().items() if name in frozen}
            try:
                module.load_state_dict(kept | checkpoint.below(tensors, f"model/{key}."))
            except RuntimeError as error:
                raise ModelError(
                    f"{folder} holds another {key} than this config: {error}") from error
        for name, shadow in self.ema.shadow.items():
            shadow.copy_(checkpoint.average_of(folder, tensors, name))
        for index, optimizer in enumerate(self._optimizers):
            state: dict[int, dict[str, Tensor]] = {}
            for name, value in checkpoint.below(tensors, f"optim/{index}/").items():
                parameter, slot = name.split("/")
                state.setdefault(int(parameter), {})[slot] = value
            groups = optimizer.state_dict()["param_groups"]  # rates and decay stay the config's
            optimizer.load_state_dict({"state": state, "param_groups": groups})
