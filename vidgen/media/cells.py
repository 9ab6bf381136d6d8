"""Frames reduced for checks: mean colours of about 256 square cells, and a few statistics.

Axes: H W rows and columns of pixels, h w of sampled pixels, y x of cells.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from vidgen.media.types import Frames

Array: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]

LUMA = np.array([0.2126, 0.7152, 0.0722], dtype=np.float32)  # BT.709
_NUM_CELLS = 256
_NUM_PIXELS = 6_000  # sampled: enough to detect half a pixel's motion of a small sprite's edge


@dataclass(frozen=True)
class Look:
    """One reduced frame.

    Attributes:
        color: [y, x, 3] mean colour of each cell, 0 to 255.
        luma: [y, x] mean luma of each cell, 0 to 255.
        moved: [y, x] mean absolute change of each cell's pixels since the previous frame, in
            levels; None for the first frame.
        spread: standard deviation of the pixels' green in levels; if that is below 1, of the
            channel that varies most.
        dark: share of pixels below 10% of the range.
        bright: share of pixels above 90% of the range.
        roughness: variance between neighbouring pixels over that of all: 0 smooth, 1 white noise.
    """

    color: Array
    luma: Array
    moved: Array | None
    spread: float
    dark: float
    bright: float
    roughness: float


class Looker:
    """A reducer of frames of one size, fed in order, whose cost hardly grows with the size.

    `before` is the previous frame's luma [h, w]; None before the first frame.
    """

    def __init__(self, height: int, width: int) -> None:
        self.stride = max(1, round((height * width / _NUM_PIXELS) ** 0.5))
        rows, columns = -(-height // self.stride), -(-width // self.stride)
        side = (rows * columns / _NUM_CELLS) ** 0.5
        self._down = _means(max(2, round(rows / side)), rows)
        self._across = _means(max(2, round(columns / side)), columns)
        self.before: Array | None = None

    def look(self, frame: Frames) -> Look:
        """Return a frame uint8 [H, W, 3] reduced."""
        step = self.stride
        height, width = (-(-size // step) for size in frame.shape[:2])
        planes = np.empty((4, height, width), dtype=np.float32)  # three colours and the change
        pixels = planes[:3]
        pixels[...] = frame[::step, ::step].transpose(2, 0, 1)
        grey: Array = np.dot(LUMA, pixels.reshape(3, -1)).reshape(height, width)
        if self.before is None:
            cells, moved = self._pool(pixels), None
        else:
            np.abs(np.subtract(grey, self.before, out=planes[3]), out=planes[3])
            cells = self._pool(planes)
            moved = cells[3]
        self.before = grey
        color = cells[:3].transpose(1, 2, 0)
        green = (pixels[1] - pixels[1].mean()).ravel()
        variance = float(np.dot(green, green)) / green.size
        spread = variance**0.5 if variance >= 1 else float(pixels.std(axis=(1, 2)).max())
        right = frame[::step, 1::step, 1]
        pairs = (pixels[1, :, : right.shape[1]] - right).ravel()
        rough = float(np.dot(pairs, pairs)) / max(1, pairs.size) / 2
        return Look(color=color, luma=color @ LUMA, moved=moved, spread=spread,
                    dark=np.count_nonzero(grey < 25.5) / grey.size,
                    bright=np.count_nonzero(grey > 229.5) / grey.size,
                    roughness=rough / variance if variance > 1 else 0.0)

    def _pool(self, pixels: Array) -> Array:
        return (self._down @ pixels @ self._across.T).astype(np.float32, copy=False)


def _means(count: int, size: int) -> Array:
    """Return a matrix [count, size] that takes means of `count` groups of `size` values."""
    count = min(count, size)
    groups = np.arange(size) * count // size
    weights = (groups == np.arange(count)[:, None]).astype(np.float32)
    means: Array = weights / weights.sum(axis=1, keepdims=True, dtype=np.float32)
    return means


def psnr(frame: Frames, reference: Frames) -> float:
    """Return 10 log10(peak^2 / MSE) in dB of pictures uint8 [H, W, 3], 100 at most."""
    error = np.subtract(frame, reference, dtype=np.float32)
    return psnr_of(float(np.square(error).mean()))


def psnr_of(error: float) -> float:
    """Return the signal-to-noise ratio in dB of a mean squared error in levels, 100 at most."""
    return min(100.0, 10 * math.log10(255**2 / max(error, 1e-12)))


def ssim(frame: Frames, reference: Frames) -> float:
    """Return the luma's structural similarity over blocks of 8x8 (Wang et al. 2004, eq. 13)."""
    def blocks(picture: Frames) -> Array:
        luma = picture @ LUMA
        height, width = (max(1, size // 8) for size in luma.shape)
        luma = luma[: height * 8, : width * 8]
        return luma.reshape(height, luma.shape[0] // height, width, -1).swapaxes(1, 2)

    a, b = blocks(frame), blocks(reference)
    mean_a, mean_b = a.mean((2, 3)), b.mean((2, 3))
    covariance = (a * b).mean((2, 3)) - mean_a * mean_b
    one, two = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    likeness = (2 * mean_a * mean_b + one) * (2 * covariance + two)
    likeness /= (mean_a**2 + mean_b**2 + one) * (a.var((2, 3)) + b.var((2, 3)) + two)
    return float(likeness.mean())
