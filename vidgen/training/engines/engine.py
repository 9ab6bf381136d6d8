"""What computes the steps of a run: plain torch on one rank or several, or DeepSpeed.

The loop knows only the protocol here. All ranks call the same methods in the same order.
"""

from __future__ import annotations

import math
import os
import platform
import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vidgen.core.runtime import choose_device
from vidgen.training.checkpoint import (
    live_weights,
    read_state,
    restore,
    restore_averages,
    write_state,
)
from vidgen.training.config import RunConfig
from vidgen.training.engines.distributed import Place
from vidgen.training.optim import EMA, load_optimizer, named_parameters, set_lr
from vidgen.training.task import Losses, Task

SHARED_FOLDER = Path("/dev/shm")
PIECE_BYTES = 2 << 20
_COUNTS_BYTES = 4096  # in front, so that pieces begin with a page
_SPIN_S = 1e-3
_KEEPS_ORDER = platform.machine() in ("x86_64", "AMD64")
"""Whether other cores see writes in their order, so that a count vouches for what went before."""


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


class SharedMean:
    """Takes the mean of gradients over CPU ranks of one machine, in memory that all of them see.

    Through sockets gradients are copied into the system and out again, twice each way, by the core
    that computes them. Here every rank writes a piece of them into the shared memory, takes the
    mean of its own R-th of all ranks' pieces, and reads the whole. Pieces are small, so they stay
    in the caches. A rank that waits for one that is gone is ended by its `Lifeline`.

    Args:
        place: of this process.
        memory: uint8 [`bytes_for`(R)], zeros at first, that all ranks see: how often each of them
            has met the others, their pieces, the mean.
    """

    def __init__(self, place: Place, memory: Tensor) -> None:
        self._place = place
        self._counts = memory[:_COUNTS_BYTES].view(torch.int64)[: place.size]
        self._rows = memory[_COUNTS_BYTES:].view(place.size + 1, -1)
        self._met = 0

    def take_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give all ranks the mean gradients; one that no rank has stays away."""
        parameters = list(parameters)
        given = self._place.any(*(parameter.grad is not None for parameter in parameters))
        for parameter, has_gradient in zip(parameters, given, strict=True):
            if not has_gradient:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            flat = parameter.grad.flatten()
            self.take(flat)
            if flat.data_ptr() != parameter.grad.data_ptr():  # other strides, so it's a copy
                parameter.grad.copy_(flat.view(parameter.shape))

    def take(self, values: Tensor) -> None:
        """Put the ranks' mean in the place of `values` [N], which all ranks give at once."""
        rank, size, rows = self._place.rank, self._place.size, self._rows.view(values.dtype)
        for piece in values.split(rows.shape[1]):
            pieces, mean = rows[:size, : len(piece)], rows[size, : len(piece)]
            own = slice(rank * len(piece) // size, (rank + 1) * len(piece) // size)
            torch.div(piece, size, out=pieces[rank])
            self._meet()  # all have read the last mean, and laid down their piece
            torch.add(pieces[0, own], pieces[1, own], out=mean[own])
            for other in range(2, size):
                mean[own] += pieces[other, own]
            self._meet()  # all parts of the mean are there
            piece.copy_(mean)

    def _meet(self) -> None:
        """Wait for all ranks: mostly a moment, so without a word to the system at first."""
        self._met += 1
        self._counts[self._place.rank] = self._met
        patience = time.perf_counter() + _SPIN_S
        while int(self._counts.min()) < self._met:
            if time.perf_counter() > patience:
                time.sleep(_SPIN_S / 10)


def bytes_for(size: int) -> int:
    """How much memory so many ranks share."""
    return _COUNTS_BYTES + (size + 1) * PIECE_BYTES


def open_shared_mean(place: Place) -> SharedMean | None:
    """Shared memory of all ranks, or None where they don't see the same, or it has no room.

    All ranks call it at once. The memory has no name any more on return, so that nothing is left
    behind however the ranks end.
    """
    path, size = SHARED_FOLDER / f"vidgen-{secrets.token_hex(8)}", bytes_for(place.size)
    memory = None
    fits = _KEEPS_ORDER and place.size <= _COUNTS_BYTES // 8
    try:
        made = place.main and fits and _reserve(path, size)
        told = place.said(str(path) if made else "")
        if told and Path(told).exists():
            memory = torch.from_file(told, shared=True, size=size, dtype=torch.uint8)
        [missed] = place.any(memory is None)
    finally:
        if place.main:
            path.unlink(missing_ok=True)
    return None if missed or memory is None else SharedMean(place, memory)


def _reserve(path: Path, size: int) -> bool:
    """Make a file that has its room for certain: of a hole a write could be the end."""
    if not hasattr(os, "posix_fallocate"):
        return False
    try:
        with open(path, "xb", opener=partial(os.open, mode=0o600)) as file:
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError:
        return False
    return True
