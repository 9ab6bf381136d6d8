"""Meters of changes between frames; each takes all frames of a clip in order.

Axes: T frames, H W rows and columns of the working picture (short side 256 at most), N points.
"""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

from vidgen.evaluation.metrics import vbench
from vidgen.evaluation.metrics.flow import (
    Flow,
    FlowEstimator,
    Mask,
    Points,
    occluded,
    sample_flow,
    warp_error,
)
from vidgen.evaluation.metrics.vbench import Figures, mean_change
from vidgen.media.types import Frames

GRID = 20
UNMOVED_PIXELS, UNMOVED_SHARE = 0.5, 0.01
MOVING_SIDES, LOOKS_PER_S = 0.02, 2
"""Least speed of a moving clip's fastest twentieth, in short sides per second (5 pixels of 256),
sampled twice a second, since a tremble covers no distance in half a second."""


class Tracks:
    """A grid of 20x20 points that follow the flow; lost points restart at their first place."""

    def __init__(self, height: int, width: int) -> None:
        self._size, self._short = (width, height), min(height, width)
        xs = (np.arange(GRID) + 0.5) * width / GRID - 0.5
        ys = (np.arange(GRID) + 0.5) * height / GRID - 0.5
        self._home: Points = np.stack(np.meshgrid(xs, ys), axis=-1).reshape(-1, 2)
        self._places: deque[Points] = deque([self._home.copy()], maxlen=4)  # third differences
        self._age = np.zeros(len(self._home), dtype=np.int64)
        self._jerks: list[float] = []

    def advance(self, flow: Flow, hidden: Mask) -> None:
        """Move the points by a flow [H, W, 2] in pixels; restart those in `hidden` [H, W]."""
        before = self._places[-1]
        place = before + sample_flow(flow, before)
        limit = np.array(self._size) - 1
        column, row = np.clip(np.rint(before).astype(int), 0, limit).T
        lost = hidden[row, column] | ((place < 0) | (place > limit)).any(axis=1)
        self._age = np.where(lost, 0, self._age + 1)
        place[lost] = self._home[lost]
        self._places.append(place)
        if len(self._places) == 4 and (old := self._age >= 3).any():
            one, two, three, four = self._places
            jerk = (four - 3 * three + 3 * two - one)[old]
            self._jerks.append(float(np.hypot(*jerk.T).mean()) / self._short)

    @property
    def jerk(self) -> float | None:
        """Mean length of the points' third differences, in % of the short side per frame cubed."""
        return 100 * float(np.mean(self._jerks)) if self._jerks else None


class MotionMeter:
    """Meter of neighbouring frames: warp error, flicker of unmoved pixels, jerk, jumps, speed."""

    def __init__(self, estimator: FlowEstimator, fps: float) -> None:
        self._flows, self._fps, self._index = estimator, fps, 0
        self._frames: list[Frames] = []  # the last two
        self._grey: NDArray[np.uint8]
        self._looked_at: NDArray[np.uint8]
        self.flow: Flow | None = None  # between the last two
        self._errors: list[float] = []
        self._flickers: list[float] = []
        self._hidden: list[float] = []
        self._residues: list[float] = []
        self._looks = max(1, round(fps / LOOKS_PER_S))  # frames from one look to the next
        self._speeds: list[float] = []
        self.tracks: Tracks

    def feed(self, frame: Frames) -> None:
        """Take the next frame, uint8 [H, W, 3]."""
        grey = self._flows.grey(frame)
        if self._index:
            self._measure(frame, grey)
        else:
            self._looked_at, self.tracks = grey, Tracks(*grey.shape)
        self._grey, self._frames = grey, [*self._frames[-1:], frame]
        if self._index and self._index % self._looks == 0:
            self._look(self._looks)
        self._index += 1

    def _look(self, num_frames: int) -> None:
        """Measure the fastest twentieth's speed since the last look, in short sides per second."""
        pixels = vbench.top_speed(self._flows.flow(self._looked_at, self._grey), vbench.DYNAMIC_TOP)
        self._speeds.append(float(pixels / min(self._grey.shape) / (num_frames / self._fps)))
        self._looked_at = self._grey

    def _measure(self, frame: Frames, grey: NDArray[np.uint8]) -> None:
        before = self._frames[-1]
        flow, back = self._flows.flow(self._grey, grey), self._flows.flow(grey, self._grey)
        hidden = occluded(flow, self._flows.warp(back, flow))
        fetched = self._flows.warp(frame, flow)
        error = warp_error(before, fetched, hidden)
        if error is not None:
            self._errors.append(error)
        self._hidden.append(float(hidden.mean()))
        self._residues.append(mean_change(fetched, before))
        if self.flow is not None:
            self._add_flicker(frame, self.flow, flow)
        self.tracks.advance(flow, self._flows.widened(hidden))
        self.flow = flow

    def _add_flicker(self, frame: Frames, came: Flow, goes: Flow) -> None:
        unmoved: Mask = (np.hypot(*np.moveaxis(came, -1, 0)) < UNMOVED_PIXELS) & (
            np.hypot(*np.moveaxis(goes, -1, 0)) < UNMOVED_PIXELS)
        if unmoved.mean() < UNMOVED_SHARE:
            return
        one, middle, other = (
            picture[unmoved].astype(np.float32) for picture in (*self._frames, frame))
        self._flickers.append(float(np.abs(middle - (one + other) / 2).mean(dtype=np.float64)))

    def figures(self) -> Figures:
        """Return all measures of a clip of two frames or more; None for those that it lacks."""
        if not self._speeds:  # shorter than the interval of looks
            self._look(self._index - 1)
        usual = float(np.median(self._residues))
        rest = self._residues[1:]
        return {
            "motion_speed": float(np.mean(self._speeds)),
            "warp_error": 1e4 * float(np.mean(self._errors)) if self._errors else None,
            "flicker": float(np.mean(self._flickers)) if self._flickers else None,
            "track_jerk": self.tracks.jerk,
            "pops": 100 * (max(self._hidden) - float(np.median(self._hidden))),
            "seam": max(self._residues) - usual,
            "first_step": self._residues[0] / max(float(np.median(rest)), 0.1) if rest else None,
        }


def interpolate(estimator: FlowEstimator, one: Frames, other: Frames) -> Frames:
    """Return the frame [H, W, 3] between two: the mean of both, warped by half of the flow."""
    grey, grey_other = estimator.grey(one), estimator.grey(other)
    flow, back = estimator.flow(grey, grey_other), estimator.flow(grey_other, grey)
    halves = [
        estimator.warp(one, flow * np.float32(-0.5)).astype(np.float32),
        estimator.warp(other, back * np.float32(-0.5)).astype(np.float32)]
    return np.asarray(((halves[0] + halves[1]) / 2).round().astype(np.uint8))
