"""Which latent frames each rank decodes, and room for what isn't wanted yet."""

from __future__ import annotations

import os
import tempfile
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from vidgen.core.runtime import write_error
from vidgen.core.shapes import Tiles
from vidgen.models.vae_tiles import Room

IN_MEMORY = 64_000_000
"""Bytes that stay in memory; more lie in an unnamed file."""


def stretches(begin: int, end: int, num_ranks: int, look_back: int) -> list[tuple[int, int]]:
    """The latent frames of each rank, one stretch behind the other, all done at the same time.

    A rank decodes as many frames before its stretch as the decoder looks back, or as there are;
    the clip's first needs none, so its stretch is the longest.

    Args:
        begin: the first latent frame to decode.
        end: behind the last one.
        num_ranks: how many decode.
        look_back: latent frames before a frame that it depends on.

    Returns:
        [first, last) of each rank, empty for some where more ranks would not be faster.
    """
    places = [begin]
    for cost in range(1, end + 1):
        places = [begin]
        for _ in range(num_ranks):
            here = places[-1]
            places.append(here + max(0, min(cost - min(here, look_back), end - here)))
        if places[-1] == end:
            break
    return list(pairwise(places))


def room_for(num_bytes: int, num_rooms: int = 1) -> Tensor:
    """Zeros uint8 [num_bytes] on the CPU; in an unnamed file where they are many.

    Args:
        num_bytes: of this room.
        num_rooms: how many such rooms there are in all.

    Raises:
        OutputError: no space for it.
    """
    if num_bytes * num_rooms <= IN_MEMORY:
        return torch.zeros(num_bytes, dtype=torch.uint8)
    try:
        with tempfile.NamedTemporaryFile(prefix="vidgen-") as file:
            os.posix_fallocate(file.fileno(), 0, num_bytes)  # now, not as a fault when written
            return torch.from_file(file.name, shared=True, size=num_bytes, dtype=torch.uint8)
    except OSError as error:
        raise write_error(Path(tempfile.gettempdir(), "frames"), error) from error


def rooms_for(tiles: Tiles) -> Room:
    """Room for what each of these tiles keeps between its turns."""
    return partial(room_for, num_rooms=tiles.count)
