"""The engine of plain torch, on one rank or several; DeepSpeed's derives from it.

All ranks call the same methods in the same order.
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


class TrainingEngine:
    """The weights, optimisers and averages of a task, complete on every rank.

    DDP averages the gradients of several ranks. `source` is the checkpoint to be loaded, if any.
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
            # Some steps leave experts, a token or control blocks without gradients. DDP's search
            # for those costs little, and warns where it finds none.
            warnings.filterwarnings("ignore", "find_unused_parameters=True was specified")
            self.model = DistributedDataParallel(
                self.model, gradient_as_bucket_view=True, find_unused_parameters=True)
        self.ema = EMA(self.parameters, run.ema_decay)  # after DDP has broadcast the weights

    def close(self) -> None:
        """Release what must be freed before the process group ends."""

    def loss(self, batch: Any, step: int, *, last: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Return loss and named scalars of a micro-batch; `last`: the last one of its step."""
        alone: AbstractContextManager[None] = nullcontext()
        if isinstance(self.model, DistributedDataParallel) and not last:
            alone = self.model.no_sync()
        with alone:
            loss, named = self.model(batch, step)
        return loss, named

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of a loss; after a step's last one they are the ranks' mean."""
        loss.backward()

    def discard(self, loss: Tensor) -> None:
        """Drop a step's gradients; called instead of its last `backward`."""
        del loss
        self._drop_gradients()

    def update(self, scale: float) -> float:
        """Clip the gradients, take a step at `scale` times the peak rates, and drop the gradients.

        Return the gradients' norm before clipping. Where it isn't finite, no weight is changed.
        """
        set_lr(self._optimizers, scale)
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if norm > self._max_norm:  # else it would multiply all gradients by 1
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
        """Put the averaged weights into the modules inside the block."""
        return self.ema.swapped()

    def save(self, folder: Path) -> None:
        """Write this rank's part of a checkpoint into a folder shared by all ranks."""
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
        """Load weights, averages and optimisers; raise ModelError if modules or shapes differ."""
        tensors = read_tensors(folder / checkpoint.STATE)
        for key, module in self.task.modules.items():
            frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
            kept = {name: t for name, t in module.state_dict().items() if name in frozen}
            try:
                module.load_state_dict(kept | checkpoint.below(tensors, f"model/{key}."))
            except RuntimeError as error:
                raise ModelError(
                    f"{folder} has a different {key} than this config: {error}") from error
        for name, shadow in self.ema.shadow.items():
            shadow.copy_(checkpoint.average_of(folder, tensors, name))
        for index, optimizer in enumerate(self._optimizers):
            state: dict[int, dict[str, Tensor]] = {}
            for name, value in checkpoint.below(tensors, f"optim/{index}/").items():
                parameter, slot = name.split("/")
                state.setdefault(int(parameter), {})[slot] = value
            groups = optimizer.state_dict()["param_groups"]  # keep the config's rates and decay
            optimizer.load_state_dict({"state": state, "param_groups": groups})
