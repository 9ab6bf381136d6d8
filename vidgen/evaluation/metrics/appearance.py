"""Features of a frame's appearance that need no network.

Axes: H W rows and columns, y x of cells, D values of a feature.
"""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

from vidgen.evaluation.metrics.flow import opencv
from vidgen.evaluation.metrics.vbench import DISTANCES, Feature, Figures, likeness
from vidgen.media.types import Frames

_CELLS, _ANGLES = 8, 8
_LEVELS = 6
_FLAT = 0.01  # levels per pixel, below what a step of one level leaves after downscaling


def gradient_feature(frame: Frames) -> NDArray[np.float64]:
    """Return a stand-in for DINO's feature, [512]: gradient angles in 8x8 cells.

    Each cell's histogram is weighted by gradient lengths (Dalal and Triggs 2005); square roots keep
    one strong edge from hiding the rest. A picture of a single colour, whose gradients are rounding
    errors, gives zeros.
    """
    cv2 = opencv()
    luma = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).astype(np.float32)
    luma = cv2.resize(luma, (_CELLS * 16, _CELLS * 16), interpolation=cv2.INTER_AREA)
    down, across = np.gradient(luma)
    lengths = np.hypot(down, across)
    if lengths.max() < _FLAT:
        return np.zeros(_CELLS * _CELLS * _ANGLES)
    bins = np.floor(np.arctan2(down, across) / (2 * np.pi) * _ANGLES).astype(int) % _ANGLES
    cells = np.arange(_CELLS * 16) // 16
    index = (cells[:, None] * _CELLS + cells) * _ANGLES + bins
    sums = np.bincount(index.ravel(), lengths.ravel(), _CELLS * _CELLS * _ANGLES)
    return np.asarray(np.sqrt(sums))


def color_feature(frame: Frames) -> NDArray[np.float64]:
    """Return a stand-in for CLIP's feature, [216]: a colour histogram of 6 levels per channel.

    Each pixel is distributed among its nearest levels, so that a change of one level isn't a new
    colour.
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
    return np.asarray(np.sqrt(sums))


def sharpness(frame: Frames) -> float:
    """Return the variance of the luma's Laplacian in squared levels; 0 for a flat picture."""
    cv2 = opencv()
    return float(cv2.Laplacian(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), cv2.CV_64F).var())


class IdentityDrift:
    """Meter of a clip's change of colours over 1 to 16 frames, regardless of place."""

    def __init__(self) -> None:
        self._features: deque[Feature] = deque(maxlen=max(DISTANCES) + 1)
        self._changes: dict[int, list[float]] = {distance: [] for distance in DISTANCES}

    def feed(self, feature: Feature) -> None:
        """Take the `color_feature` of the next frame."""
        self._features.append(feature)
        for distance, changes in self._changes.items():
            if len(self._features) > distance:
                changes.append(1 - likeness(self._features[-1 - distance], feature))

    def figures(self) -> Figures:
        """Return `identity_drift_D` of each distance D: mean of 100 (1 - cosine), or None."""
        return {
            f"identity_drift_{d}": 100 * float(np.mean(rows)) if rows else None
            for d, rows in self._changes.items()}
