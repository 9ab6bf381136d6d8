"""What a frame looks like, in a few numbers and without weights.

Axes: H W rows and columns, y x of cells, D width of a feature.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vidgen.evaluation.metrics.flow import opencv
from vidgen.media.encode import Frames

_CELLS, _ANGLES = 8, 8
_LEVELS = 6


def gradient_feature(frame: Frames) -> NDArray[np.float64]:
    """Histograms of gradient angles in 8x8 cells (Dalal and Triggs 2005), [512].

    The stand-in for DINO. Each cell's histogram is weighted by the lengths of the gradients; roots
    are taken, so that one strong edge doesn't hide all the rest.
    """
    cv2 = opencv()
    luma = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).astype(np.float32)
    luma = cv2.resize(luma, (_CELLS * 16, _CELLS * 16), interpolation=cv2.INTER_AREA)
    down, across = np.gradient(luma)
    lengths = np.hypot(down, across)
    bins = np.floor(np.arctan2(down, across) / (2 * np.pi) * _ANGLES).astype(int) % _ANGLES
    cells = np.arange(_CELLS * 16) // 16
    index = (cells[:, None] * _CELLS + cells) * _ANGLES + bins
    sums = np.bincount(index.ravel(), lengths.ravel(), _CELLS * _CELLS * _ANGLES)
    feature: NDArray[np.float64] = np.sqrt(sums)
    return feature


def color_feature(frame: Frames) -> NDArray[np.float64]:
    """Histogram of colours, 6 levels a channel, shared out between the nearest levels, [216].

    The stand-in for CLIP. Sharing out keeps a change of one level from looking like a new colour.
    """
    cv2 = opencv()
    small = cv2.resize(frame, (64, 64), interpolation=cv2.INTER_AREA)
    place = small.reshape(-1, 3).astype(np.float64) / 255 * (_LEVELS - 1)
    low = np.minimum(place.astype(int), _LEVELS - 2)
    part = place - low
    sums = np.zeros(_LEVELS**3)
    for corner in np.ndindex(2, 2, 2):
        level = low + corner
        weight = np.prod(np.where(corner, part, 1 - part), axis=1)
        index = (level[:, 0] * _LEVELS + level[:, 1]) * _LEVELS + level[:, 2]
        sums += np.bincount(index, weight, _LEVELS**3)
    feature: NDArray[np.float64] = np.sqrt(sums)
    return feature


def sharpness(frame: Frames) -> float:
    """Variance of the luma's Laplacian in squared levels; 0 of a flat picture."""
    cv2 = opencv()
    luma = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
    return float(cv2.Laplacian(luma, cv2.CV_64F).var())


def colors_at(frame: Any, points: NDArray[np.float64]) -> NDArray[np.float32]:
    """Mean colours [N, 3] of the 3x3 pixels around points [N, 2] (x, y), in levels."""
    cv2 = opencv()
    x, y = points.astype(np.float32).T
    found: NDArray[np.float32] = cv2.remap(
        cv2.blur(frame, (3, 3)).astype(np.float32), x[:, None], y[:, None], cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REPLICATE,
    )[:, 0]  # fmt: skip
    return found
