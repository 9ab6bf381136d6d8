"""Compute the steps of a run: `Engine` is plain torch on one rank or several.

DeepSpeed's engine derives from it. All ranks call the same methods in the same order.
"""

from __future__ import annotations

import math
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

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
from vidgen.weights.load import read_tensors


class Engine:
    """Weights, optimiser and averages of a task, whole on every rank.

    Several ranks take the mean of their gradients by DDP.

    Args:
        source: the checkpoint that will be loaded, if any.

    Raises:
        InputError: an optimiser or a setting that the engine can't honour.
    """

    ema: EMA

    def __init__(self, task: Task, run: RunConfig, place: Place, source: Path | None) -> None:
        self.task, self.place = task, place
        self.parameters = named_parameters(task.modules)
        self.model: nn.Module = Losses(task, choose_device(run.device), bf16=run.dtype == "bf16")
        self._open(run, source)

    def _open(self, run: RunConfig, source: Path | None) -> None:
        del source
        self._optimizers = self.task.optimizers()
        self._max_norm = run.optim.grad_clip or math.inf
        if self.place.size > 1:
            # In some steps experts, a token or control blocks have no part. The search for them
            # costs little, and complains where it finds none.
            warnings.filterwarnings("ignore", "find_unused_parameters=True was specified")
            self.model = DistributedDataParallel(
                self.model, gradient_as_bucket_view=True, find_unused_parameters=True)
        self.ema = EMA(self.parameters, run.ema_decay)  # of what all ranks have begun with

    def close(self) -> None:
        """End before the process group does."""

    def loss(self, batch: Any, step: int, *, last: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and named scalars of a micro-batch, the last of its step or not."""
        alone: AbstractContextManager[None] = nullcontext()
        if isinstance(self.model, DistributedDataParallel) and not last:
            alone = self.model.no_sync()
        with alone:
            loss, named = self.model(batch, step)
        return loss, named

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of the last `loss`; gradients are the ranks' mean."""
        loss.backward()

    def discard(self, loss: Tensor) -> None:
        """Drop the gradients so far, instead of the last `backward` of a step."""
        del loss
        self._drop_gradients()

    def update(self, scale: float) -> float:
        """Clip the gradients, step at `scale` times the peak rates, and drop them.

        Return their norm before clipping; if it isn't finite, nothing was changed.
        """
        set_lr(self._optimizers, scale)
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if norm > self._max_norm:  # else they would all be written again, times 1
            nn.utils.clip_grads_with_norm_(self.parameters.values(), self._max_norm, norm)
        if math.isfinite(norm):
            for optimizer in self._optimizers:
                optimizer.step()
        self._drop_gradients()
        return float(norm)

    def _drop_gradients(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    def averaged(self) -> AbstractContextManager[None]:
        """Give the modules the averaged weights inside the block."""
        return self.ema.swapped()

    def save(self, folder: Path) -> None:
        """Write this rank's part of a checkpoint into a folder that all ranks share."""
        if not self.place.main:
            return
        tensors = {f"ema/{name}": value for name, value in self.ema.shadow.items()}
        tensors |= checkpoint.live_weights(self.task, frozen=self.task.saves_frozen)
        for index, optimizer in enumerate(self._optimizers):
            for parameter, slots in optimizer.state_dict()["state"].items():
                for slot, value in slots.items():
                    tensors[f"optim/{index}/{parameter}/{slot}"] = torch.as_tensor(value)
        checkpoint.write_tensors(folder / checkpoint.STATE, tensors)

    def load(self, folder: Path) -> None:
        """Load all of a checkpoint but the random generators.

        Raises:
            ModelError: it is of other modules or shapes.
        """
        tensors = read_tensors(folder / checkpoint.STATE)
        for key, module in self.task.modules.items():
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
