"""Detectors of faults over time: flashes, spikes, freezes, colour drift.

Each tracker takes reduced frames in order and uses constant memory.

Axes: y x of cells, k colour channels and saturation.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from vidgen.media.cells import LUMA, Array

MAX_SPANS = 10
FLASH_STEP, FLASH_DARKER, FLASH_AREA = 0.1, 0.8, 0.25  # of relative luminance, of the picture
_JOIN_S = 0.5
STILL, MOVES = 2.5, 5.0  # levels, of the cell that changes most; H.264 moves a still one by 2
_SAME_SHOT = 0.5  # correlation of neighbouring frames' cells
IN_PLACE = 0.9  # least correlation of cells of two pictures that show the same in the same place


@dataclass
class Span:
    """Frames `first` to `last`, both included, with their worst value."""

    first: int
    last: int
    value: float


@dataclass
class Spans:
    """Marked frames as spans, merged if they are at most half a second apart.

    At most `longest` spans are kept; further marks extend the last one.
    """

    fps: float
    longest: int = MAX_SPANS
    found: list[Span] = field(default_factory=list)

    def mark(self, first: int, last: int, value: float) -> None:
        """Mark frames, which must not begin before those marked earlier."""
        if self.found:
            span = self.found[-1]
            if first - span.last <= _JOIN_S * self.fps or len(self.found) == self.longest:
                span.last, span.value = max(span.last, last), max(span.value, value)
                return
        self.found.append(Span(first, last, value))


class Flashes:
    """Detector of more flashes in a second than are safe (ITU-R BT.1702-3; WCAG 2.2, 2.3.1).

    A flash is a pair of opposite changes of at least a tenth of the highest relative luminance, the
    darker side below 0.8 of it, over at least a quarter of the picture at once. `red` follows
    saturated red instead of luminance (WCAG: a change of (R - G - B) by a sixteenth).
    """

    def __init__(self, fps: float, *, red: bool) -> None:
        self.spans = Spans(fps)
        self._red, self._second = red, max(2, round(fps))
        self._together = max(1, round(fps / 10))  # a change may take a tenth of a second
        self._step = 20 / 320 if red else FLASH_STEP
        self._low: Array | None = None
        self._changes: deque[int] = deque()
        self._last_way, self._turned = 0, -1000

    def feed(self, index: int, linear: Array) -> None:
        """Take a frame's cells [y, x, 3], linear light in [0, 1]."""
        if self._red:
            level = linear[..., 0] - linear[..., 1] - linear[..., 2]
            if self._low is None and float(level.max()) < self._step:
                return  # most clips have no saturated red
            level = np.maximum(level, 0)
        else:
            level = linear @ LUMA
        if self._low is None:
            self._low, self._high, self._way = level, level, np.zeros(level.shape, dtype=np.int8)
            self._when = np.full(level.shape, -self._second)
        high, low = np.maximum(self._high, level), np.minimum(self._low, level)
        if float((high - low).max()) < self._step and index >= self._turned + self._together:
            self._high, self._low = high, low  # no change: fast path of the usual case
            return
        dark = 1.0 if self._red else FLASH_DARKER
        falls = (self._way >= 0) & (high - level >= self._step) & (level < dark)
        rises = (self._way <= 0) & (level - low >= self._step) & (low < dark)
        turned = falls | rises
        if turned.any():
            self._turned = index
        elif index >= self._turned + self._together and len(self._changes) <= 2 * 3:
            self._high, self._low = high, low
            return
        self._way = np.where(falls, -1, np.where(rises, 1, self._way)).astype(np.int8)
        self._when = np.where(turned, index, self._when)
        self._high, self._low = np.where(turned, level, high), np.where(turned, level, low)
        fresh = self._way * (self._when > index - self._together)
        for way in (1, -1):
            if way != self._last_way and np.count_nonzero(fresh == way) >= FLASH_AREA * fresh.size:
                self._last_way = way
                self._changes.append(index)
                break
        while self._changes and self._changes[0] <= index - self._second:
            self._changes.popleft()
        if len(self._changes) > 2 * 3:
            self.spans.mark(self._changes[0], index, len(self._changes) / 2)


class Spikes:
    """Detector of one to three frames in which at least half the picture jumps and comes back.

    The value is the cells' median distance from both neighbours to the same side, as a share of the
    range: moving objects cover less than half the picture, and a cut does not come back.
    """

    def __init__(self, fps: float, limit: float) -> None:
        self.spans, self._limit = Spans(fps), limit
        self._recent: deque[Array] = deque(maxlen=5)

    def feed(self, index: int, luma: Array) -> None:
        """Take a frame's cells [y, x], 0 to 255."""
        last = self._recent[-1] if self._recent else luma
        self._recent.append(luma)
        if 2 * np.count_nonzero(np.abs(luma - last) >= self._limit * 255) < luma.size:
            return  # nothing comes back
        for length in range(1, len(self._recent) - 1):
            before, *odd, after = list(self._recent)[-length - 2 :]
            up = np.min([np.minimum(frame - before, frame - after) for frame in odd], axis=0)
            down = np.min([np.minimum(before - frame, after - frame) for frame in odd], axis=0)
            off = np.maximum(up, down)
            if 2 * np.count_nonzero(off >= self._limit * 255) >= off.size:
                self.spans.mark(index - length, index - 1, float(np.median(off)) / 255)
                return


class Runs:
    """Detector of runs of at least `shortest` frames that share a flaw."""

    def __init__(self, fps: float, shortest: int = 1) -> None:
        self.spans, self._shortest = Spans(fps), shortest
        self._run: Span | None = None

    def feed(self, index: int, has_flaw: bool, value: float) -> None:
        """Take a frame, with the value that shows its flaw."""
        if has_flaw:
            self._run = self._run or Span(index, index, value)
            self._run.last, self._run.value = index, max(self._run.value, value)
        else:
            self.finish()

    def finish(self) -> None:
        """End the run."""
        run, self._run = self._run, None
        if run and run.last - run.first + 1 >= self._shortest:
            self.spans.mark(run.first, run.last, run.value)


class Freezes:
    """Detector of frames that repeat in the middle of a movement.

    A clip may be still, come to rest, or lose its subject intentionally. A freeze is a run of at
    least `shortest` changes below `STILL`, next to two consecutive changes of at least `MOVES`, the
    nearer of which isn't at an edge of the picture, as by a subject that leaves or enters.
    """

    def __init__(self, fps: float, shortest: int) -> None:
        self.spans, self._shortest = Spans(fps), shortest
        self._run: Span | None = None  # of frames that repeat the previous one
        self._broke_off = False
        self._edges: deque[bool] = deque(maxlen=2)  # of consecutive changes: whether at an edge

    def feed(self, index: int, moved: Array) -> None:
        """Take a frame's change of each cell [y, x], in levels."""
        most = float(moved.max())
        if most < STILL:
            if self._edges:  # after a run: a cut, then a still picture
                self._settle()
            if self._run is None:
                self._run = Span(index, index, most)
                self._broke_off = len(self._edges) == 2 and not self._edges[1]
            self._run.last, self._run.value = index, max(self._run.value, most)
            self._edges.clear()
        elif most < MOVES:
            self._edges.clear()
            self._settle()
        else:
            self._edges.append(_at_edge(moved >= MOVES))
            if len(self._edges) == 2:
                self._settle(resumed=not self._edges[0])

    def finish(self) -> None:
        """End the run."""
        self._settle()

    def _settle(self, resumed: bool = False) -> None:
        run, self._run = self._run, None
        if run and (self._broke_off or resumed) and run.last - run.first + 1 >= self._shortest:
            self.spans.mark(run.first, run.last, run.value)


def _at_edge(changed: np.ndarray[Any, np.dtype[np.bool_]]) -> bool:
    """Return True if all changed cells [y, x] are in the outer fifth at one side."""
    for where, count in zip(np.nonzero(changed), changed.shape, strict=True):
        if where.max() < 0.2 * count or where.min() >= 0.8 * count:
            return True
    return False


@dataclass(frozen=True)
class Drift:
    """Change of colour from a shot's start to its end, as shares of the range.

    Attributes:
        color: [3] red, green, blue.
        saturation: most minus least of the three.
        contrast: standard deviation of the luma; None if the view changed too much.
        slack: factor by which the sum over a long shot may be off, 1 for up to 4 s.
    """

    first: int
    last: int
    color: Array
    saturation: float
    contrast: float | None
    slack: float

    @property
    def most(self) -> float:
        """Largest of the changes, over the slack."""
        # Under a moving camera saturation, no linear channel, is known half as well as colour.
        saturation = self.saturation / 1.5 if self.contrast is None else self.saturation
        changes = [*map(float, self.color), saturation, self.contrast or 0.0]
        return max(map(abs, changes)) / self.slack

    def text(self) -> str:
        """Return the three largest changes as text, such as "red +9%", the largest first."""
        changes = dict(zip(("red", "green", "blue"), map(float, self.color), strict=True))
        changes |= {"saturation": self.saturation, "contrast": self.contrast or 0.0}
        ranked = sorted(changes.items(), key=lambda item: -abs(item[1]))
        return ", ".join(f"{name} {value:+.0%}" for name, value in ranked[:3])


class Drifts:
    """Meter of a shot's change of colour, robust to motion.

    Between looks an eighth of a second apart each channel's change is fitted by an offset, a gain,
    a shift and a zoom (the generalised dynamic image model of Negahdaripour, PAMI 1998), robustly;
    the offsets add up to the drift. A start and an end that show the same in the same place are
    compared directly. A cut ends a shot and begins the next.
    """

    def __init__(self, fps: float) -> None:
        self._fps, self._hop = fps, max(1, round(fps / 8))
        self.worst: Drift | None = None
        self._start: Array | None = None
        self._last: Array

    def feed(self, index: int, color: Array) -> None:
        """Take a frame's cells [y, x, 3], 0 to 255."""
        if index % self._hop or min(color.shape[:2]) < 2:  # a single row or column has no gradient
            return
        saturation = color.max(axis=-1) - color.min(axis=-1)
        channels = np.concatenate([color.transpose(2, 0, 1), saturation[None]])
        if self._start is None or likeness(self._last, channels) < _SAME_SHOT:
            self.finish()
            self._start, self._first, self._sum = channels, index, np.zeros(4)
        else:
            self._sum += _change(self._last, channels)[0]
        self._last, self._index = channels, index

    def finish(self) -> None:
        """End the shot; ignore one under half a second."""
        if self._start is None or self._index - self._first < self._fps / 2:
            return
        offsets, gain = self._sum, None
        slack = max(1.0, (self._index - self._first) / self._fps / 4) ** 0.5
        if likeness(self._start, self._last) >= IN_PLACE:
            offsets, gains = _change(self._start, self._last)
            gain, slack = float(gains[:3].mean() * self._start[:3].std() / 255), 1.0
        shares: Array = (offsets / 255).astype(np.float32)
        found = Drift(self._first, self._index, shares[:3], float(shares[3]), gain, slack)
        if self.worst is None or found.most > self.worst.most:
            self.worst = found


def likeness(one: Array, other: Array) -> float:
    """Return the correlation of the first 3 channels of pictures [k, y, x]; 1 if both are flat."""
    a, b = ((x[:3] - x[:3].mean(axis=(1, 2), keepdims=True)).ravel() for x in (one, other))
    noise = float(a.size)  # a level or so
    powers = (float(np.dot(a, a)) + noise) * (float(np.dot(b, b)) + noise)
    return float((np.dot(a, b) + noise) / powers**0.5)


def _change(one: Array, other: Array) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return the offset at the mean, in levels, and gain [k] from one picture to another."""
    count, height, width = one.shape
    ys, xs, ridge = _grid(height, width)
    middle = (one + other).astype(np.float64) / 2
    down, across = np.gradient(middle, axis=(1, 2))
    # the terms of the fit, then the change to fit
    rows = np.empty((count, 6, height, width))
    rows[:, 0] = 1
    rows[:, 1] = (middle - middle.mean(axis=(1, 2), keepdims=True)) / 64
    rows[:, 2], rows[:, 3] = down / 16, across / 16
    rows[:, 4] = (across * xs + down * ys) / 64
    rows[:, 5] = other - one
    rows = rows.reshape(count, 6, -1)
    terms, change, half = rows[:, :5], rows[:, 5], height * width // 2
    weighted, columns = terms, rows.transpose(0, 2, 1)
    for last in (False, False, True):  # reweighted: moving objects count less
        sums = weighted @ columns
        solved = np.linalg.solve(sums[..., :5] + ridge, sums[..., 5:])
        if last:
            break
        off = change - (solved.transpose(0, 2, 1) @ terms)[:, 0]
        scale = 1.48 * np.partition(np.abs(off), half, axis=1)[:, half, None] + 0.05
        weighted = terms / (1 + np.square(off / (2 * scale)))[:, None]
    return solved[:, 0, 0], solved[:, 1, 0] / 64


@lru_cache(maxsize=4)
def _grid(height: int, width: int) -> tuple[np.ndarray[Any, Any], ...]:
    """Return distances of rows and columns from the middle, and a ridge for flat pictures."""
    ys = np.linspace(-1, 1, height)[:, None] * height / 2
    xs = np.linspace(-1, 1, width) * width / 2
    return ys, xs, np.diag([0, 1, 1, 1, 1]) * 1e-5 * height * width
