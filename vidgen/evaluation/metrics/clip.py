"""All measures of one clip, in one pass over its frames and in constant memory.

Axes: T frames, H W rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from itertools import chain
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from vidgen.evaluation.metrics import appearance, motion, vbench
from vidgen.evaluation.metrics.flow import FlowEstimator, check_flow_size
from vidgen.evaluation.metrics.vbench import PROXY
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
_STEADY = ("subject_consistency", "background_consistency", "motion_smoothness")


@dataclass(frozen=True)
class Measured:
    """Measures of one clip."""

    figures: vbench.Figures  # by measure; None for one that doesn't apply
    num_frames: int
    dynamic: bool  # whether the clip moves
    # of `i3d`, [K, D] of K segments of 16 frames, if that network is given
    features: list[list[float]] = field(default_factory=list)
    flat: bool = False  # whether each frame is of a single colour, without a subject


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
        self._sharpness.append(appearance.sharpness(working))
        if self._before is not None and look.moved is not None:
            self.changes.append(vbench.mean_change(frame, self._before))
            self._repeats += float(look.moved.max()) < STILL
        self._before = frame

    def figures(self) -> vbench.Figures:
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
        for feature in (appearance.gradient_feature, appearance.color_feature))
    stand_ins = vbench.Dimensions(
        rate, {"subject_consistency": subject, "background_consistency": background},
        {"i2v_subject": subject, "i2v_background": background},
        lambda one, other: flows.flow(flows.grey(one), flows.grey(other)),
        partial(motion.interpolate, flows))
    originals = _by_networks(networks, rate, image) if networks else None
    plain, identity = _Plain(rate, height, width), appearance.IdentityDrift()
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
    movement.finish()
    proxies = stand_ins.figures(plain.changes)
    dynamic = (movement.speed or 0.0) >= motion.MOVING_SIDES
    steady = [vbench.normalise(name, value) for name in _STEADY
              if (value := proxies[name]) is not None]
    figures: vbench.Figures = {
        **(originals.figures(plain.changes) if originals else {}),
        **{PROXY + name: value for name, value in proxies.items()},
        "steadiness": fmean(steady) if dynamic else 0.0,
        **movement.figures(), **identity.figures(), **plain.figures(),
        "first_frame_error": None if given is None else vbench.mean_change(given, first)}
    return Measured(figures, count, dynamic, features, flat=subject.is_blank)
