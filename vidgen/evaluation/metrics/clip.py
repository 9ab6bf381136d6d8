"""All measures of one clip, in one pass over its frames and at constant memory.

Axes: T frames, H W rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any

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
#: dimension -> the network's feature; those of an image also take a picture that is given
_FEATURES = {"subject_consistency": "dino", "background_consistency": "clip"}
_IMAGE_FEATURES = {"i2v_subject": ("dino", "dino_i2v"), "i2v_background": ("dreamsim", "dreamsim")}
_STEADY = ("subject_consistency", "background_consistency", "motion_smoothness")


@dataclass(frozen=True)
class Measured:
    """Measures of one clip."""

    figures: motion.Figures  # by measure; None where one couldn't be taken
    histograms: list[list[float]]  # motion histograms [K, 16] of segments of 16 frames
    num_frames: int
    dynamic: bool  # whether the clip moves
    # of `i3d` [K, D] of segments of 16 frames, where that network is given
    features: list[list[float]] = field(default_factory=list)
    flat: bool = False  # whether each frame is of a single colour, without a subject


class _Plain:
    """Measures that need neither flow nor network."""

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
    """VBench's dimensions by its own networks, as far as these are given."""

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
    """Take all measures of a clip of frames uint8 [H, W, 3]; none of a single frame.

    The stand-ins see `image` [H, W, 3], the first frame that was asked for, at the clip's size, the
    networks as it is.

    Raises:
        InputError: no OpenCV, or a side under 16 pixels.
    """
    flows, rate = FlowEstimator(), float(fps)
    parts: _Parts | None = None
    for frame in frames:
        if parts is None:
            check_flow_size(*frame.shape[:2])
            parts = _Parts(flows, rate, frame, image, networks)
        parts.feed(frame)
    if parts is None or parts.num_frames < 2:
        return Measured({}, [], 0 if parts is None else 1, False)
    return parts.measured()


class _Parts:
    def __init__(
        self, flows: FlowEstimator, rate: float, first: Frames, image: Frames | None,
        networks: Networks | None,
    ) -> None:  # fmt: skip
        self._flows, self.num_frames = flows, 0
        self._plain = _Plain(rate, *first.shape[:2])
        self._motion = motion.MotionMeter(flows, rate)
        self._moves = motion.SampledMotion(self._speed, rate)
        self._smooth = motion.Smoothness(partial(motion.interpolate, flows))
        given = None if image is None else fit(image, *first.shape[:2])
        small = None if given is None else flows.working(given)
        features: dict[str, Callable[[Frames], Any]] = {
            "subject": appearance.gradient_feature, "background": appearance.color_feature}
        self._features = [
            (kind, feature, vbench.Consistency(None if small is None else feature(small)))
            for kind, feature in features.items()]
        self._identity = appearance.IdentityDrift()
        self._originals = _Originals(networks, rate, image) if networks else None
        self._mismatch = None if given is None else float(
            np.abs(np.subtract(given, first, dtype=np.float32)).mean(dtype=np.float64))

    def _speed(self, one: Frames, other: Frames) -> float:
        flow = self._flows.flow(self._flows.grey(one), self._flows.grey(other))
        return vbench.top_speed(flow, vbench.DYNAMIC_TOP)

    def feed(self, frame: Frames) -> None:
        working = self._flows.working(frame)
        self._plain.feed(frame, working)
        self._motion.feed(working)
        self._moves.feed(working)
        self._smooth.feed(working)
        for kind, feature, consistency in self._features:
            found = feature(working)
            consistency.feed(found)
            if kind == "background":
                self._identity.feed(found)
        if self._originals:
            self._originals.feed(frame)
        self.num_frames += 1

    def measured(self) -> Measured:
        self._motion.finish()
        stand_ins: motion.Figures = {}
        for kind, _, consistency in self._features:
            stand_ins[f"{kind}_consistency"] = consistency.score
            stand_ins[f"i2v_{kind}"] = consistency.image_score
        changes = self._plain.changes
        stand_ins |= {
            "temporal_flickering": vbench.stillness(changes) if self._motion.static else None,
            "motion_smoothness": self._smooth.score, "dynamic_degree": self._moves.score}
        dynamic = (self._motion.speed or 0.0) >= motion.MOVING_SIDES
        known = ((name, stand_ins[name]) for name in _STEADY)
        steady = [vbench.normalise(name, value) for name, value in known if value is not None]
        figures: motion.Figures = {
            **(self._originals.figures(changes) if self._originals else {}),
            **{PROXY + name: value for name, value in stand_ins.items()},
            "steadiness": fmean(steady) if dynamic else 0.0,
            **self._motion.figures(), **self._identity.figures(), **self._plain.figures(),
            "first_frame_error": self._mismatch}
        return Measured(
            figures, self._motion.tracks.histograms, self.num_frames, dynamic,
            self._originals.features if self._originals else [],
            flat=any(kind == "subject" and meter.is_blank for kind, _, meter in self._features))
