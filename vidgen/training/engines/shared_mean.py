"""The mean of gradients over CPU ranks of one machine, through memory that all of them see.

Through sockets gradients are copied into the system and out again, twice each way, by the core that
computes them. Here every rank lays a piece of them into the shared memory, takes the mean of its
own R-th of all ranks' pieces, and reads the whole. Pieces are small, so they stay in the caches.
"""

from __future__ import annotations

import os
import platform
import secrets
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from vidgen.training.engines.distributed import Place

SHARED_FOLDER = Path("/dev/shm")
PIECE_BYTES = 2 << 20
_COUNTS_BYTES = 4096  # in front, so that pieces begin with a page
_SPIN_S = 1e-3
_KEEPS_ORDER = platform.machine() in ("x86_64", "AMD64")
"""Whether other cores see writes in their order, so that a count vouches for what went before."""


class SharedMean:
    """Takes the ranks' mean of tensors that lie in each one's own memory.

    A rank that waits for one that is gone is ended by its `Lifeline`.

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
