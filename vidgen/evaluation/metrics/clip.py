"""All measures of one clip, in one pass over its frames and in constant memory.

Axes: T frames, H W rows and columns, D values of a feature.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from itertools import chain
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vidgen.evaluation.metrics import motion, vbench
from vidgen.evaluation.metrics.flow import FlowEstimator, check_flow_size, opencv
from vidgen.evaluation.metrics.vbench import DISTANCES, PROXY, Feature, Figures, likeness
from vidgen.media.cells import Looker
from vidgen.media.read import fit
from vidgen.media.trackers import STILL, Drifts
from vidgen.media.types import Frames

if TYPE_CHECKING:
    from vidgen.evaluation.metrics.networks import Networks

MEASURES_VERSION = 3
SEGMENT = 16
"""Frames of a feature of `i3d`."""
#: dimension -> name of the feature; those of an image: (network, feature), with a given picture
_FEATURES = {"subject_consistency": "dino", "background_consistency": "clip"}
_IMAGE_FEATURES = {"i2v_subject": ("dino", "dino_i2v"), "i2v_background": ("dreamsim", "dreamsim")}
_CELLS, _ANGLES, _LEVELS = 8, 8, 6  # of the features of a frame
_FLAT = 0.01  # levels per pixel, below what a step of one level leaves after downscaling
_STEADY = ("subject_consistency", "background_consistency", "motion_smoothness")


@dataclass(frozen=True)
class Measured:
    """Measures of one clip."""

    figures: Figures  # by measure; None for one that doesn't apply
    num_frames: int
    dynamic: bool  # whether the clip moves
    # of `i3d`, [K, D] of K segments of 16 frames, if that network is given
    features: list[list[float]] = field(default_factory=list)
    flat: bool = False  # whether each frame is of a single colour, without a subject


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


class _Plain:
    """Meter of measures that need neither optical flow nor a network."""

    def __init__(self, fps: float, height: int, width: int) -> None:
        self._looker, self._drifts = Looker(height, width), Drifts(fps)
        self._before: Frames | None = None
        self.changes: list[float] = []
        self._sharpness: list[float] = []
        self._repeats = 0

    def feed(self, frame: Frames, working: Frames) -> None:
        look = self._looker.look(frame)
        self._drifts.feed(len(self._sharpness), look.color)
        self._sharpness.append(sharpness(working))
        if self._before is not None and look.moved is not None:
            self.changes.append(vbench.mean_change(frame, self._before))
            self._repeats += float(look.moved.max()) < STILL
        self._before = frame

    def figures(self) -> Figures:
        self._drifts.finish()
        worst = self._drifts.worst
        fifth = max(1, len(self._sharpness) // 5)
        ends = [fmean(part) + 1.0 for part in (self._sharpness[:fifth], self._sharpness[-fifth:])]
        return {
            "sharpness_drift": abs(float(np.log2(ends[1] / ends[0]))),
            "color_drift": None if worst is None else 100 * worst.most,
            "frozen_share": 100 * self._repeats / max(1, len(self.changes))}


def _by_networks(networks: Networks, fps: float, image: Frames | None) -> vbench.Dimensions:
    """Return a meter of VBench's dimensions by its networks, as far as these are given."""
    likenesses = {} if image is None else {
        dimension: vbench.Consistency(feature := getattr(networks, name),
                                      feature(image, given=True))
        for dimension, (network, name) in _IMAGE_FEATURES.items() if network in networks}
    return vbench.Dimensions(
        fps, {dimension: vbench.Consistency(getattr(networks, feature))
              for dimension, feature in _FEATURES.items() if feature in networks},
        likenesses, networks.raft if "raft" in networks else None,
        networks.amt if "amt" in networks else None)


def measure_clip(
    frames: Iterable[Frames], fps: Fraction, *, image: Frames | None = None,
    networks: Networks | None = None,
) -> Measured:
    """Return all measures of a clip of frames uint8 [H, W, 3]; none of a single frame.

    `image` [H, W, 3] is the requested first frame. Stand-ins use it at the clip's size, networks at
    its own.

    Raises:
        InputError: OpenCV isn't installed, or a side is under 16 pixels.
    """
    rest, flows, rate = iter(frames), FlowEstimator(), float(fps)
    first = next(rest, None)
    if first is None:
        return Measured({}, 0, False)
    height, width, _ = first.shape
    check_flow_size(height, width)
    given = None if image is None else fit(image, height, width)
    small = None if given is None else flows.working(given)

    subject, background = (
        vbench.Consistency(feature, None if small is None else feature(small))
        for feature in (gradient_feature, color_feature))
    stand_ins = vbench.Dimensions(
        rate, {"subject_consistency": subject, "background_consistency": background},
        {"i2v_subject": subject, "i2v_background": background},
        lambda one, other: flows.flow(flows.grey(one), flows.grey(other)),
        partial(motion.interpolate, flows))
    originals = _by_networks(networks, rate, image) if networks else None
    plain, identity = _Plain(rate, height, width), IdentityDrift()
    movement, count = motion.MotionMeter(flows, rate), 0
    segment, features = list[Frames](), list[list[float]]()
    for frame in chain([first], rest):
        working = flows.working(frame)
        plain.feed(frame, working)
        movement.feed(working)
        stand_ins.feed(working, movement.flow)
        assert background.before is not None
        identity.feed(background.before)
        if originals:
            originals.feed(frame)
        if networks and "i3d" in networks:
            segment.append(frame)
            if len(segment) == SEGMENT:
                features.append(networks.i3d(segment).tolist())
                segment.clear()
        count += 1
    if count < 2:
        return Measured({}, count, False)
    proxies, moved = stand_ins.figures(plain.changes), movement.figures()
    dynamic = (moved["motion_speed"] or 0.0) >= motion.MOVING_SIDES
    steady = [vbench.normalise(name, value) for name in _STEADY
              if (value := proxies[name]) is not None]
    figures: Figures = {
        **(originals.figures(plain.changes) if originals else {}),
        **{PROXY + name: value for name, value in proxies.items()},
        "steadiness": fmean(steady) if dynamic else 0.0,
        **moved, **identity.figures(), **plain.figures(),
        "first_frame_error": None if given is None else vbench.mean_change(given, first)}
    return Measured(figures, count, dynamic, features, flat=subject.is_blank)
