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
from vidgen.evaluation.metrics.registry import PROXY
from vidgen.media.cells import Looker
from vidgen.media.read import fit
from vidgen.media.trackers import STILL, Drifts
from vidgen.media.types import Frames

if TYPE_CHECKING:
    from vidgen.evaluation.metrics.networks import Networks

MEASURES_VERSION = 3
#: dimension -> name of the feature; those of an image: (network, feature), with a given picture
_FEATURES = {"subject_consistency": "dino", "background_consistency": "clip"}
_IMAGE_FEATURES = {"i2v_subject": ("dino", "dino_i2v"), "i2v_background": ("dreamsim", "dreamsim")}
_STEADY = ("subject_consistency", "background_consistency", "motion_smoothness")


@dataclass(frozen=True)
class Measured:
    """Measures of one clip."""

    figures: motion.Figures  # by measure; None for one that doesn't apply
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
            change = np.subtract(frame, self._before, dtype=np.float32)
            self.changes.append(float(np.abs(change).mean(dtype=np.float64)))
            self._repeats += float(look.moved.max()) < STILL
        self._before = frame

    def figures(self) -> motion.Figures:
        self._drifts.finish()
        worst = self._drifts.worst
        fifth = max(1, len(self._sharpness) // 5)
        ends = [fmean(part) + 1.0 for part in (self._sharpness[:fifth], self._sharpness[-fifth:])]
        return {
            "sharpness_drift": abs(float(np.log2(ends[1] / ends[0]))),
            "color_drift": None if worst is None else 100 * worst.most,
            "frozen_share": 100 * self._repeats / max(1, len(self.changes))}


class _Originals:
    """Meter of VBench's dimensions by its own networks, as far as these are given."""

    def __init__(self, networks: Networks, fps: float, image: Frames | None) -> None:
        self._networks = networks
        self._consistencies = {
            dimension: (getattr(networks, feature), vbench.Consistency())
            for dimension, feature in _FEATURES.items() if feature in networks}
        self._likenesses = {} if image is None else {
            dimension: (feature := getattr(networks, name),
                        vbench.Consistency(feature(image, given=True)))
            for dimension, (network, name) in _IMAGE_FEATURES.items() if network in networks}
        self._moves = motion.SampledMotion(
            lambda a, b: vbench.top_speed(networks.raft(a, b), vbench.DYNAMIC_TOP), fps
        ) if "raft" in networks else None  # fmt: skip
        self._smooth = motion.Smoothness(networks.amt) if "amt" in networks else None
        self._speeds: list[float] = []
        self._first: Frames | None = None
        self._before: Frames | None = None
        self._segment: list[Frames] = []
        self.features: list[list[float]] = []

    def feed(self, frame: Frames) -> None:
        for feature, meter in (*self._consistencies.values(), *self._likenesses.values()):
            meter.feed(feature(frame))
        if self._moves:
            self._moves.feed(frame)
            if self._before is not None:
                self._speeds.append(self._static_speed(self._before, frame))
        if self._smooth:
            self._smooth.feed(frame)
        if "i3d" in self._networks:
            self._segment.append(frame)
            if len(self._segment) == motion.SEGMENT:
                self.features.append(self._networks.i3d(self._segment).tolist())
                self._segment.clear()
        self._first = frame if self._first is None else self._first
        self._before = frame

    def _static_speed(self, one: Frames, other: Frames) -> float:
        return vbench.top_speed(self._networks.raft(one, other), vbench.STATIC_TOP)

    def figures(self, changes: list[float]) -> motion.Figures:
        found = {name: meter.score for name, (_, meter) in self._consistencies.items()}
        found |= {name: meter.image_score for name, (_, meter) in self._likenesses.items()}
        if self._moves and self._first is not None and self._before is not None:
            found["dynamic_degree"] = self._moves.score
            pair = (self._first, self._before)
            ends = [self._static_speed(*way) for way in (pair, pair[::-1])]
            static = vbench.is_static(self._speeds, ends, min(self._first.shape[:2]))
            found["temporal_flickering"] = vbench.stillness(changes) if static else None
        if self._smooth:
            found["motion_smoothness"] = self._smooth.score
        return found


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

    def speed(one: Frames, other: Frames) -> float:
        return vbench.top_speed(flows.flow(flows.grey(one), flows.grey(other)), vbench.DYNAMIC_TOP)

    features = appearance.gradient_feature, appearance.color_feature
    subject, background = (
        vbench.Consistency(None if small is None else feature(small)) for feature in features)
    plain, identity = _Plain(rate, height, width), appearance.IdentityDrift()
    movement, moves = motion.MotionMeter(flows, rate), motion.SampledMotion(speed, rate)
    smooth = motion.Smoothness(partial(motion.interpolate, flows))
    originals = _Originals(networks, rate, image) if networks else None
    count = 0
    for frame in chain([first], rest):
        working = flows.working(frame)
        plain.feed(frame, working)
        for meter in (movement, moves, smooth):
            meter.feed(working)
        edges, colors = (feature(working) for feature in features)
        subject.feed(edges)
        background.feed(colors)
        identity.feed(colors)
        if originals:
            originals.feed(frame)
        count += 1
    if count < 2:
        return Measured({}, count, False)
    movement.finish()
    stand_ins: motion.Figures = {
        "subject_consistency": subject.score, "i2v_subject": subject.image_score,
        "background_consistency": background.score, "i2v_background": background.image_score,
        "temporal_flickering": vbench.stillness(plain.changes) if movement.static else None,
        "motion_smoothness": smooth.score, "dynamic_degree": moves.score}
    dynamic = (movement.speed or 0.0) >= motion.MOVING_SIDES
    steady = [vbench.normalise(name, value) for name in _STEADY
              if (value := stand_ins[name]) is not None]
    figures: motion.Figures = {
        **(originals.figures(plain.changes) if originals else {}),
        **{PROXY + name: value for name, value in stand_ins.items()},
        "steadiness": fmean(steady) if dynamic else 0.0,
        **movement.figures(), **identity.figures(), **plain.figures(),
        "first_frame_error": None if given is None else float(
            np.abs(np.subtract(given, first, dtype=np.float32)).mean(dtype=np.float64))}
    return Measured(figures, count, dynamic, originals.features if originals else [],
                    flat=subject.is_blank)
