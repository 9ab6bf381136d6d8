"""Whether a bounce obeys a parabola, and whether gravity is one and the same throughout a clip.

Between two landings nothing but gravity acts, so height over time is a parabola, and the bend of
every arc of a clip is the same.

Axes: T frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from torch import Tensor

from eval.toybox.judge import Judge
from eval.toybox.metrics.bounces import SQUASH_S, heights, landings
from eval.toybox.metrics.tracking import Array, asked_camera
from train.toybox.world.scenes import Scene

FEWEST = 5  # frames that an arc needs, two more than a parabola has freedom
_UNSURE = 0.1  # of its gravity, by which an arc's may be unsure and still be compared


@dataclass(frozen=True)
class Fall:
    """How a bouncing clip's arcs fall.

    Attributes:
        arcs: between landings, and before the first and behind the last, long enough to be fitted.
        residual: root mean square distance of heights to their arcs' parabolas, in shares of the
            frame's height; None without arcs.
        gravity: mean gravity of the arcs whose own is known well enough, in frame heights a second
            squared; None without one.
        spread: their standard deviation in shares of the mean; None with fewer than two.
    """

    arcs: int
    residual: float | None
    gravity: float | None
    spread: float | None


def measure_fall(judge: Judge, clip: Tensor, scene: Scene, fps: float) -> Fall:
    """Measure a clip [3, T, H, W] in [-1, 1] of one bouncing actor; its asked zoom is taken out."""
    _, num_frames, height, width = clip.shape
    camera, sides = asked_camera(scene, num_frames, height, width, fps)
    course = (heights(judge, clip) - 0.5) / camera.zoom + camera.y / sides[1] + 0.5
    return fit_arcs(course, fps)


def fit_arcs(course: Array, fps: float) -> Fall:
    """Fit a parabola to every arc of a course of heights [T], counted downwards from the top."""
    times = np.arange(len(course)) / fps
    touches = landings(course, fps)
    if not len(touches):
        return Fall(0, None, None, None)
    falls: list[float] = []
    arcs, count, squares = 0, 0, 0.0
    first, last = _ends(course, times, touches)
    for start, end in pairwise([first, *touches, last]):
        inside = (times > start + SQUASH_S) & (times < end - SQUASH_S)
        if inside.sum() < FEWEST:
            continue
        off, bend, error = _parabola(times[inside], course[inside])
        squares, count, arcs = squares + off, count + int(inside.sum()), arcs + 1
        if bend > 0 and error <= _UNSURE * bend:
            falls.append(2 * bend)
    if not arcs:
        return Fall(0, None, None, None)
    mean = float(np.mean(falls)) if falls else None
    spread = float(np.std(falls, ddof=1) / np.mean(falls)) if len(falls) > 1 else None
    return Fall(arcs, float(np.sqrt(squares / count)), mean, spread)


def _ends(course: Array, times: Array, touches: Array) -> tuple[float, float]:
    """When the first arc begins and the last one ends, should they touch the floor once more.

    Too near to the clip's ends a landing isn't found; the lowest frame beyond the arc's top is it.
    """
    before, after = times < touches[0], times > touches[-1]
    rising = course[before][: int(course[before].argmin()) + 1] if before.any() else course[:0]
    first = times[rising.argmax()] if len(rising) > 1 else -np.inf
    top = int(course[after].argmin()) if after.any() else 0
    falling = course[after][top:]
    last = times[after][top + falling.argmax()] if len(falling) > 1 else np.inf
    return float(first), float(last)


def _parabola(times: Array, course: Array) -> tuple[float, float, float]:
    """Least squares: the sum of squared distances, the bend, and the bend's standard error."""
    middle = times - times.mean()
    matrix = np.stack([np.ones_like(middle), middle, middle**2], axis=1)
    fitted = np.linalg.lstsq(matrix, course, rcond=None)[0]
    squares = float(np.square(matrix @ fitted - course).sum())
    noise = squares / (len(times) - 3)
    error = float(np.sqrt(noise * np.linalg.inv(matrix.T @ matrix)[2, 2]))
    return squares, float(fitted[2]), error
