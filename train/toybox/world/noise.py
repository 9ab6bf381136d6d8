"""Uniform noise as arrays, addressed like `Draws` by (seed, stream, counter)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from train.toybox.world.scenes import Draws


def uniform_noise(seeds: Sequence[int], stream: int, count: int) -> NDArray[np.float32]:
    """Return numbers in [0, 1), [B, count]; splitmix64 (Steele et al. 2014) over the counters.

    Args:
        seeds: B of them; a row depends on its own.
        stream: of `Draws`, from which each row's start comes.
        count: numbers a row; more of them begin with the same ones.
    """
    first = [int(Draws(seed, stream=stream).uniform() * 2**53) << 11 for seed in seeds]
    steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    value = np.array(first, np.uint64)[:, None] + steps
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    value = value ^ (value >> np.uint64(31))
    shares: NDArray[np.float64] = (value >> np.uint64(40)).astype(np.float64) * 2.0**-24
    return shares.astype(np.float32)
