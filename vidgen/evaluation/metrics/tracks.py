"""Points carried along by the flow: how smoothly they move, and which way.

Axes: N points, A angles, K segments.
"""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

from vidgen.evaluation.metrics.flow import Flow, Mask, Points, sample_flow

GRID = 20
SEGMENT = 16
ANGLES = 8


class Tracks:
    """A grid of 20x20 points that follow the flow; lost ones begin anew where they came from.

    What is kept is bounded, but for one histogram of each segment of 16 frames.

    Args:
        height: rows of the frames.
        width: their columns.
    """

    def __init__(self, height: int, width: int) -> None:
        self._size, self._short = (width, height), min(height, width)
        xs = (np.arange(GRID) + 0.5) * width / GRID - 0.5
        ys = (np.arange(GRID) + 0.5) * height / GRID - 0.5
        self._home: Points = np.stack(np.meshgrid(xs, ys), axis=-1).reshape(-1, 2)
        self._places: deque[Points] = deque([self._home.copy()], maxlen=4)  # third differences
        self._age = np.zeros(len(self._home), dtype=np.int64)
        self._jerks: list[float] = []
        self._velocity = np.zeros(ANGLES)
        self._acceleration = np.zeros(ANGLES)
        self._in_segment = 0
        self.histograms: list[list[float]] = []

    def advance(self, flow: Flow, hidden: Mask) -> None:
        """Follow a flow to the next frame.

        Args:
            flow: to it, [H, W, 2] in pixels.
            hidden: [H, W] pixels of the frame before that it doesn't show.
        """
        before = self._places[-1]
        place = before + sample_flow(flow, before)
        limit = np.array(self._size) - 1
        column, row = np.clip(np.rint(before).astype(int), 0, limit).T
        lost = hidden[row, column] | ((place < 0) | (place > limit)).any(axis=1)
        self._age = np.where(lost, 0, self._age + 1)
        place[lost] = self._home[lost]
        self._places.append(place)
        self._measure()

    def _measure(self) -> None:
        places = list(self._places)
        fresh = self._age >= 1
        way = (places[-1] - places[-2])[fresh]
        _vote(self._velocity, way, self._short)
        if len(places) >= 3 and (old := self._age >= 2).any():
            turn = (places[-1] - 2 * places[-2] + places[-3])[old]
            _vote(self._acceleration, turn, self._short)
        if len(places) == 4 and (old := self._age >= 3).any():
            jerk = (places[3] - 3 * places[2] + 3 * places[1] - places[0])[old]
            self._jerks.append(float(np.hypot(*jerk.T).mean()) / self._short)
        self._in_segment += 1
        if self._in_segment == SEGMENT - 1:
            self._end_segment()

    def _end_segment(self) -> None:
        both = np.concatenate([self._velocity, self._acceleration]) / (self._in_segment or 1)
        self.histograms.append([float(value) for value in both])
        self._velocity[:], self._acceleration[:], self._in_segment = 0, 0, 0

    @property
    def jerk(self) -> float | None:
        """Mean length of the points' third differences, in % of the short side a frame cubed."""
        return 100 * float(np.mean(self._jerks)) if self._jerks else None


def _vote(histogram: NDArray[np.float64], vectors: Points, short_side: int) -> None:
    """Add vectors [N, 2] to a histogram of angles, each by its length (Liu et al. 2024, FVMD)."""
    if not len(vectors):
        return
    lengths = np.hypot(vectors[:, 0], vectors[:, 1]) / short_side * 100
    turns = np.arctan2(vectors[:, 1], vectors[:, 0]) / (2 * np.pi) * ANGLES
    bins = np.rint(turns).astype(int) % ANGLES
    histogram += np.bincount(bins, lengths, ANGLES) / len(vectors)
