"""A shot's frames, and shots of a scene matched in colour.

Mean and deviation of each channel of a shot (R'G'B', 0 to 255) move towards the scene's mean over
frames: Reinhard et al. 2001, "Color Transfer between Images", equations 10 and 11, in R'G'B'
instead of l-alpha-beta and within limits, since shots of different things differ rightly. A shot
near the scene stays unchanged, to the bit.

Axes: H W rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from vidgen.core.errors import InputError
from vidgen.media.types import Frames
from vidgen.media.video_reader import VideoReader

NEAR = 2.0
"""Most levels between the means of an unchanged shot and its scene."""
MAX_SHIFT, MAX_GAIN = 16.0, 1.15
"""Most levels by which a mean is moved, and factor by which a deviation is."""

Values: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class ShotFrames:
    """A shot's file."""

    path: Path
    num_frames: int
    table: Frames | None = None  # uint8 [3, 256], which replaces each channel's values; or None

    def frames(self) -> Iterator[Frames]:
        """Yield frames uint8 [H, W, 3], one at a time.

        Raises:
            InputError: the file ends too early, or is damaged.
        """
        count = 0
        with VideoReader(self.path) as reader:
            for frame in reader:
                count += 1
                yield frame if self.table is None else recoloured(frame, self.table)
        if count < self.num_frames:
            raise InputError(f"{self.path} ends after frame {count} of {self.num_frames}: it "
                             "was changed or damaged; remove it and render it again")


def recoloured(frame: Frames, table: Frames) -> Frames:
    """Replace each channel's values of a frame uint8 [H, W, 3] by a table uint8 [3, 256]."""
    made = np.empty_like(frame)
    for channel in range(3):
        np.take(table[channel], frame[..., channel], out=made[..., channel])
    return made


@dataclass
class Colours:
    """Mean and deviation [3] of the channels of frames."""

    count: int = 0
    histogram: Values = field(default_factory=lambda: np.zeros((3, 256)))

    def feed(self, frame: Frames) -> None:
        """Count the values of a frame uint8 [H, W, 3]."""
        self.count += 1
        for channel in range(3):
            self.histogram[channel] += np.bincount(frame[..., channel].ravel(), minlength=256)

    @property
    def mean(self) -> Values:
        """Mean of each channel, [3]."""
        return np.asarray(self.histogram @ np.arange(256) / self.histogram.sum(1))

    @property
    def deviation(self) -> Values:
        """Standard deviation of each channel, [3]."""
        squares = self.histogram @ np.arange(256) ** 2 / self.histogram.sum(1)
        return np.asarray(np.sqrt(np.maximum(0, squares - self.mean**2)))


def measured(frames: Iterable[Frames]) -> Colours:
    """Return the colours of frames uint8 [H, W, 3]."""
    colours = Colours()
    for frame in frames:
        colours.feed(frame)
    return colours


def spread(shots: Sequence[Colours]) -> float:
    """Return the root mean square distance of shots' means from the scene's."""
    means, target = np.stack([each.mean for each in shots]), _target(shots)[0]
    return float(np.sqrt(((means - target) ** 2).mean()))


def matching(shots: Sequence[Colours]) -> list[Frames | None]:
    """Return a table uint8 [3, 256] of new values for each shot of a scene; None: unchanged."""
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
    """Return mean and deviation [3] of a scene, its shots weighted by their frames."""
    weights = [each.count for each in shots]
    return (np.average([each.mean for each in shots], axis=0, weights=weights),
            np.average([each.deviation for each in shots], axis=0, weights=weights))
