"""Shots of a scene brought near each other's colours, measured before and after.

Method: mean and deviation of each channel of a shot, over all its pixels as they go into the film
(R'G'B', 0 to 255), are moved towards the scene's, which is the mean over its frames: Reinhard et
al. 2001, "Color Transfer between Images", equations 10 and 11, in R'G'B' instead of l-alpha-beta
and within limits, since shots of different things differ rightly. A shot that is near already
stays as it is, to the bit.

Axes: H W rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from vidgen.media.types import Frames

NEAR = 2.0
"""Levels by which no mean of a shot that stays as it is differs from its scene's."""
MAX_SHIFT, MAX_GAIN = 16.0, 1.15
"""Most levels by which a mean is moved, and factor by which a deviation is."""

Values: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]


@dataclass
class Colours:
    """Mean and deviation of the channels of frames, gathered one frame after the other."""

    count: int = 0
    histogram: Values = field(default_factory=lambda: np.zeros((3, 256)))

    def feed(self, frame: Frames) -> None:
        """See a frame uint8 [H, W, 3]."""
        self.count += 1
        for channel in range(3):
            self.histogram[channel] += np.bincount(frame[..., channel].ravel(), minlength=256)

    @property
    def mean(self) -> Values:
        """Of each channel, [3]."""
        return np.asarray(self.histogram @ np.arange(256) / self.histogram.sum(1))

    @property
    def deviation(self) -> Values:
        """Of each channel, [3]."""
        squares = self.histogram @ np.arange(256) ** 2 / self.histogram.sum(1)
        return np.asarray(np.sqrt(np.maximum(0, squares - self.mean**2)))


def measured(frames: Iterable[Frames]) -> Colours:
    """The colours of frames uint8 [H, W, 3]."""
    colours = Colours()
    for frame in frames:
        colours.feed(frame)
    return colours


def spread(shots: Sequence[Colours]) -> float:
    """How far shots lie apart: root mean square of their means' distances from the scene's."""
    means, target = np.stack([each.mean for each in shots]), _target(shots)[0]
    return float(np.sqrt(((means - target) ** 2).mean()))


def matching(shots: Sequence[Colours]) -> list[Frames | None]:
    """For each shot of a scene a table uint8 [3, 256] of new values, or None if it stays."""
    mean, deviation = _target(shots)
    tables: list[Frames | None] = []
    for each in shots:
        if np.abs(each.mean - mean).max() <= NEAR:
            tables.append(None)
            continue
        gain = np.clip(deviation / np.maximum(each.deviation, 1), 1 / MAX_GAIN, MAX_GAIN)
        shift = np.clip(mean - each.mean, -MAX_SHIFT, MAX_SHIFT)
        values = np.arange(256)[None] - each.mean[:, None]
        moved = values * gain[:, None] + (each.mean + shift)[:, None]
        tables.append(np.rint(moved).clip(0, 255).astype(np.uint8))
    return tables


def _target(shots: Sequence[Colours]) -> tuple[Values, Values]:
    """Mean and deviation [3] of a scene: the shots', each by its number of frames."""
    weights = [each.count for each in shots]
    return (np.average([each.mean for each in shots], axis=0, weights=weights),
            np.average([each.deviation for each in shots], axis=0, weights=weights))
