"""VBench's temporal dimensions as formulas on features, flows and pictures (Huang et al. 2024).

Constants and steps are those of the published package. Features, flows and interpolated pictures
come from its networks or from stand-ins. `MEASURES` describes these dimensions and all others.

Axes: T frames, P pairs of frames, D values of a feature, H W rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vidgen.evaluation.metrics.flow import Flow
from vidgen.media.types import Frames

Better = Literal["more", "less", "neither"]
Feature: TypeAlias = NDArray[np.floating[Any]]
Figures: TypeAlias = dict[str, float | None]
PROXY = "proxy_"
DISTANCES = (1, 2, 4, 8, 16)
"""Distances of the measures of identity drift, in frames."""

DYNAMIC_TOP, DYNAMIC_PIXELS, DYNAMIC_FPS = 0.05, 6.0, 8
STATIC_TOP, STATIC_PIXELS = 0.02, 3.0


@dataclass(frozen=True)
class Measure:
    """Description of a measure."""

    better: Better  # direction; "neither" gets no verdict
    unit: str
    about: str  # meaning, one line
    possible: tuple[float, float] = (-math.inf, math.inf)  # range of a clip's values
    yes_no: bool = False  # whether a clip's value is 0 or 1
    counts_still: bool = False  # whether comparisons include clips that don't move
    # of VBench's dimensions: least and most by which a value is normalised, None for others;
    # weight in the temporal subtotal; whether a folder's value is a mean over frames, not clips
    scale: tuple[float, float] | None = None
    weight: float = 0.0
    by_frames: bool = False


_SHARE, _PERCENT, _SIZE = (0.0, 1.0), (0.0, 100.0), (0.0, math.inf)
_DIMENSIONS = {
    "subject_consistency": Measure(
        "more", "", "the subject stays what it is", _SHARE, scale=(0.1462, 1.0), weight=1.0,
        by_frames=True),
    "background_consistency": Measure(
        "more", "", "the background stays what it is", _SHARE, scale=(0.2615, 1.0), weight=1.0,
        by_frames=True),
    "temporal_flickering": Measure(
        "more", "", "neighbouring frames are alike, in clips that pass the static filter", _SHARE,
        counts_still=True, scale=(0.6293, 1.0), weight=1.0),
    "motion_smoothness": Measure(
        "more", "", "odd frames follow from even ones", _SHARE, scale=(0.706, 0.9975), weight=1.0),
    "dynamic_degree": Measure(
        "neither", "", "whether there is large motion", _SHARE, yes_no=True, counts_still=True,
        scale=(0.0, 1.0), weight=0.5),
    "i2v_subject": Measure(
        "more", "", "the subject of the image is kept", _SHARE, scale=(0.1462, 1.0)),
    "i2v_background": Measure(
        "more", "", "the look of the image is kept", _SHARE, scale=(0.2615, 1.0)),
}
MEASURES: dict[str, Measure] = {
    **_DIMENSIONS,
    **{PROXY + name: replace(measure, about=f"stand-in: {measure.about}")
       for name, measure in _DIMENSIONS.items()},
    "steadiness": Measure(
        "more", "", "mean of the normalised consistencies and smoothness; 0 where nothing moves",
        counts_still=True),
    "motion_speed": Measure(
        "neither", "sides/s", "what moves fastest, in short sides a second", _SIZE,
        counts_still=True),
    "warp_error": Measure(
        "less", "x1e-4", "mean squared error of what the flow carries along", _SIZE),
    "flicker": Measure(
        "less", "levels", "second difference in time of pixels that don't move", _SIZE),
    "track_jerk": Measure(
        "less", "%", "third difference of tracked points, of the short side", _SIZE),
    **{f"identity_drift_{d}": Measure(
        "less", "%", f"the picture's colours change over {d} frames", _PERCENT)
       for d in DISTANCES},
    "sharpness_drift": Measure(
        "less", "octaves", "sharpness of the last fifth against the first", _SIZE),
    "color_drift": Measure("less", "%", "colours change while the picture stays", _SIZE),
    "frozen_share": Measure("less", "%", "frames that repeat the one before", _PERCENT),
    "pops": Measure("less", "%", "most that appears or vanishes at once, over the usual", _SIZE),
    "seam": Measure("less", "levels", "largest jump between frames, over the usual", _SIZE),
    "first_step": Measure("less", "x", "first step between frames by the usual step", _SIZE),
    "first_frame_error": Measure(
        "less", "levels", "first frame against the image given", (0.0, 255.0)),
}  # fmt: skip


def likeness(one: Feature, other: Feature) -> float:
    """Return the cosine of two features [D], at least 0; 0 if one of them is all zeros."""
    a, b = one.astype(np.float64).ravel(), other.astype(np.float64).ravel()
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return max(0.0, float(a @ b) / scale) if scale else 0.0


@dataclass(eq=False)
class Consistency:
    """Meter of the likeness of a clip's features to the first and to the previous one."""

    feature: Callable[[Frames], Feature]  # [D] of a frame uint8 [H, W, 3]
    image: Feature | None = None  # feature of the requested first frame, or None
    before: Feature | None = field(default=None, init=False)  # feature of the last frame
    _first: Feature | None = None
    _sums: list[float] = field(default_factory=list)
    _neighbours: list[float] = field(default_factory=list)
    _nearest: float = 0.0
    is_blank: bool = field(default=True, init=False)
    """Whether all features are zeros, so that likeness is undefined."""

    def feed(self, frame: Frames) -> None:
        """Take the next frame, uint8 [H, W, 3]."""
        feature = self.feature(frame)
        self.is_blank &= not feature.any()
        if self.image is not None:
            self._nearest = max(self._nearest, likeness(self.image, feature))
        if self._first is None or self.before is None:
            self._first = feature
        else:
            near = likeness(self.before, feature)
            self._neighbours.append(near)
            self._sums.append((near + likeness(self._first, feature)) / 2)
        self.before = feature

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


class Dimensions:
    """Meter of VBench's dimensions of one clip, by its networks or by stand-ins.

    Args:
        fps: of the clip.
        consistencies: meters, by dimension, that compare the frames of the clip.
        likenesses: meters, by dimension, that compare them with the given image, too.
        flow: flow [H, W, 2] from one frame to another; None leaves its dimensions out.
        between: frame between two others; None leaves smoothness out.
    """

    def __init__(
        self, fps: float, consistencies: Mapping[str, Consistency],
        likenesses: Mapping[str, Consistency], flow: Callable[[Frames, Frames], Flow] | None = None,
        between: Callable[[Frames, Frames], Frames] | None = None,
    ) -> None:
        self._consistencies, self._likenesses = consistencies, likenesses
        self._flow, self._between, self._step = flow, between, sampling_step(fps)
        self._index = 0
        self._first: Frames
        self._before: Frames
        self._sampled: Frames  # about 8 a second
        self._even: Frames
        self._speeds: list[float] = []  # between sampled frames
        self._static_speeds: list[float] = []  # between neighbours
        self._odd_changes: list[float] = []  # from odd frames to those interpolated

    def feed(self, frame: Frames, flow: Flow | None = None) -> None:
        """Take the next frame, uint8 [H, W, 3], and the flow from the previous one if known."""
        for meter in {*self._consistencies.values(), *self._likenesses.values()}:
            meter.feed(frame)
        if self._index == 0:
            self._first = self._sampled = self._even = frame
        elif self._flow:
            flow = self._flow(self._before, frame) if flow is None else flow
            self._static_speeds.append(top_speed(flow, STATIC_TOP))
            if self._index % self._step == 0:
                self._speeds.append(top_speed(self._flow(self._sampled, frame), DYNAMIC_TOP))
                self._sampled = frame
        if self._between and self._index and self._index % 2 == 0:
            self._odd_changes.append(mean_change(self._between(self._even, frame), self._before))
            self._even = frame
        self._before, self._index = frame, self._index + 1

    def figures(self, changes: Sequence[float]) -> Figures:
        """Return the scores; `changes` are mean absolute differences of neighbours, in levels."""
        found = {name: meter.score for name, meter in self._consistencies.items()}
        found |= {name: meter.image_score for name, meter in self._likenesses.items()}
        if self._flow:
            short, pair = min(self._first.shape[:2]), (self._first, self._before)
            is_moving = is_dynamic(self._speeds, short)
            found["dynamic_degree"] = float(is_moving) if self._speeds else None
            ends = [top_speed(self._flow(*way), STATIC_TOP) for way in (pair, pair[::-1])]
            static = is_static(self._static_speeds, ends, short)
            found["temporal_flickering"] = stillness(changes) if static else None
        if self._between:
            found["motion_smoothness"] = stillness(self._odd_changes)
        return found


def mean_change(one: NDArray[Any], other: NDArray[Any]) -> float:
    """Return the mean absolute difference of two pictures, in levels."""
    return float(np.abs(np.subtract(one, other, dtype=np.float32)).mean(dtype=np.float64))


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
    """Return a score normalised by its dimension's scale; not clipped, as in VBench."""
    scale = MEASURES[dimension].scale
    assert scale is not None
    return (value - scale[0]) / (scale[1] - scale[0])


def temporal_subtotal(scores: Mapping[str, float | None], prefix: str = "") -> float | None:
    """Return the weighted mean of the five normalised temporal dimensions; None if one is missing.

    `prefix` is that of their names in the scores. It is not VBench's total, which includes picture
    quality and meaning.
    """
    total = 0.0
    weights = {name: kind.weight for name, kind in _DIMENSIONS.items() if kind.weight}
    for name, weight in weights.items():
        value = scores.get(prefix + name)
        if value is None:
            return None
        total += weight * normalise(name, value)
    return total / sum(weights.values())
