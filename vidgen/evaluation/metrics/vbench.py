"""VBench's temporal dimensions as formulas on features, flows and pictures (Huang et al. 2024).

Constants and steps are those of the published package. Features may come from its networks or from
stand-ins.

Axes: T frames, P pairs of frames, D values of a feature, H W rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Feature = NDArray[np.floating[Any]]

DIMENSIONS = {
    "subject_consistency": (0.1462, 1.0, "the subject stays what it is"),
    "background_consistency": (0.2615, 1.0, "the background stays what it is"),
    "temporal_flickering": (
        0.6293, 1.0, "neighbouring frames are alike, in clips that pass the static filter"),
    "motion_smoothness": (0.706, 0.9975, "odd frames follow from even ones"),
    "dynamic_degree": (0.0, 1.0, "whether there is large motion"),
    "i2v_subject": (0.1462, 1.0, "the subject of the image is kept"),
    "i2v_background": (0.2615, 1.0, "the look of the image is kept"),
}
"""{dimension: least and most by which a score is normalised, meaning of a high score}."""
#: dimension -> its weight among the five that make the temporal subtotal.
WEIGHTS = {
    "subject_consistency": 1.0, "background_consistency": 1.0, "temporal_flickering": 1.0,
    "motion_smoothness": 1.0, "dynamic_degree": 0.5,
}  # fmt: skip
DYNAMIC_TOP, DYNAMIC_PIXELS, DYNAMIC_FPS = 0.05, 6.0, 8
STATIC_TOP, STATIC_PIXELS = 0.02, 3.0


def likeness(one: Feature, other: Feature) -> float:
    """Return the cosine of two features [D], at least 0; 0 if one of them is all zeros."""
    a, b = one.astype(np.float64).ravel(), other.astype(np.float64).ravel()
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return max(0.0, float(a @ b) / scale) if scale else 0.0


@dataclass
class Consistency:
    """Meter of the likeness of a clip's features to the first and to the previous one."""

    image: Feature | None = None  # feature of the requested first frame, or None
    _first: Feature | None = None
    _before: Feature | None = None
    _sums: list[float] = field(default_factory=list)
    _neighbours: list[float] = field(default_factory=list)
    _nearest: float = 0.0
    is_blank: bool = field(default=True, init=False)
    """Whether all features are zeros, so that likeness is undefined."""

    def feed(self, feature: Feature) -> None:
        """Take the feature [D] of the next frame."""
        self.is_blank &= not feature.any()
        if self.image is not None:
            self._nearest = max(self._nearest, likeness(self.image, feature))
        if self._first is None or self._before is None:
            self._first = feature
        else:
            near = likeness(self._before, feature)
            self._neighbours.append(near)
            self._sums.append((near + likeness(self._first, feature)) / 2)
        self._before = feature

    @property
    def score(self) -> float | None:
        """Mean of (cos to the previous + cos to the first) / 2; None for one or blank frames."""
        return float(np.mean(self._sums)) if self._sums and not self.is_blank else None

    @property
    def image_score(self) -> float | None:
        """0.4 best likeness to the image + 0.3 mean + 0.3 least of neighbours (VBench-I2V).

        None for one frame, or if the image is blank.
        """
        if self.image is None or not self.image.any() or not self._neighbours:
            return None
        least, mean = min(self._neighbours), float(np.mean(self._neighbours))
        return 0.4 * self._nearest + 0.3 * mean + 0.3 * least


def stillness(differences: Iterable[float]) -> float | None:
    """Return (255 - mean) / 255 of mean absolute differences in levels; None without any.

    This is temporal flickering for neighbouring frames, and motion smoothness for interpolated and
    real ones.
    """
    known = list(differences)
    return (255.0 - float(np.mean(known))) / 255.0 if known else None


def top_speed(flow: NDArray[np.float32], share: float) -> float:
    """Return the mean length of the longest `share` of a flow's vectors [H, W, 2], in pixels."""
    lengths = np.hypot(flow[..., 0], flow[..., 1]).ravel()
    count = int(lengths.size * share)
    if count == 0:
        return 0.0
    return float(np.partition(lengths, lengths.size - count)[-count:].mean(dtype=np.float64))


def sampling_step(fps: float) -> int:
    """Return the distance of frames sampled for dynamic degree, about 8 a second."""
    return max(1, round(fps / DYNAMIC_FPS))


def is_dynamic(speeds: Sequence[float], short_side: int) -> bool:
    """Return whether a clip moves: enough pairs exceed 6 pixels of 256.

    `speeds` are `top_speed(flow, DYNAMIC_TOP)` of each pair of sampled frames; `short_side`
    is that of the flow's picture, in pixels.
    """
    limit = DYNAMIC_PIXELS * short_side / 256
    # at least one pair must move, even if the count rounds to 0
    return sum(speed > limit for speed in speeds) >= max(1, round(4 * (len(speeds) + 1) / 16))


def is_static(speeds: Sequence[float], ends: Sequence[float], short_side: int) -> bool:
    """Return whether a clip passes VBench's static filter, so that its flickering is measured.

    `speeds` are `top_speed(flow, STATIC_TOP)` of each pair of neighbours, `ends` from the first
    frame to the last and back; `short_side` is that of the flow's picture, in pixels.
    """
    limit = STATIC_PIXELS * short_side / 256
    allowed = round(2 * (len(speeds) + 1) / 16)
    few = sum(speed > limit for speed in speeds) <= allowed
    return few and all(speed <= limit * allowed * 2 for speed in ends)


def normalise(dimension: str, value: float) -> float:
    """Return a score normalised by its dimension's range; not clipped, as in VBench."""
    least, most, _ = DIMENSIONS[dimension]
    return (value - least) / (most - least)


def temporal_subtotal(scores: Mapping[str, float | None]) -> float | None:
    """Return the weighted mean of the five normalised temporal dimensions; None if one is missing.

    It is not VBench's total, which includes picture quality and meaning.
    """
    total = 0.0
    for name, weight in WEIGHTS.items():
        value = scores.get(name)
        if value is None:
            return None
        total += weight * normalise(name, value)
    return total / sum(WEIGHTS.values())
