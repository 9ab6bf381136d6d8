"""When a bounce meets the floor, from the pictures alone and between frames.

The judge's FrameNet tells where a sprite is, looking four times, a quarter of a cell apart; arcs of
free fall on both sides of a landing are fitted together, and where they meet is the landing. A
generated sprite may be seen in two places at once where it lands, so a single frame that is off
makes no landing and hides none, and the lowest frame only says near which one it is.

Axes: B clips, T frames, H W pixels, R rows of quarter cells, w columns of cells.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from eval.toybox.judge import CELL, Judge, to_frame_size

Array = NDArray[np.float64]

_SHIFTS = 4  # looks at each frame, `CELL` / 4 pixels apart
_DEPTH = 0.08  # of the frame's height that a sprite must fall before a landing, and rise after it
SQUASH_S = 0.05  # around a landing sprites are squashed, and off the arc
_ASTRAY = 0.15  # of the frame's height that a frame may be off its neighbours; else it is left out
_SHORTEST = 2  # frames that an arc needs on either side
_STEPS = np.arange(-1.5, 1.5, 0.02)  # frames around the lowest one at which a landing is tried


@torch.no_grad()
def bounce_times(judge: Judge, video: Tensor, fps: float) -> list[Array]:
    """Times in seconds at which the sprite of each clip meets the floor.

    Args:
        judge: the judge; only its FrameNet is asked.
        video: [B, 3, T, H, W] in [-1, 1].
        fps: frames a second; frame 0 is at 0.
    """
    return [landings(heights(judge, clip), fps) for clip in video.unbind(0)]


@torch.no_grad()
def heights(judge: Judge, clip: Tensor) -> Array:
    """How far below the frame's top the sprite's middle is, as a share of the height, [T].

    Args:
        judge: the judge.
        clip: [3, T, H, W] in [-1, 1].
    """
    frames = to_frame_size(clip.transpose(0, 1).float().clamp(-1, 1))
    step, looks = CELL // _SHIFTS, []
    for shift in reversed(range(0, CELL, step)):
        moved = F.pad(frames, (0, 0, shift, CELL - shift), mode="replicate")
        looks.append(1 - judge.frames(moved).cells.softmax(1)[:, -1])
    seen = torch.stack(looks, 2).flatten(1, 2).double().cpu()  # [T, R, w]
    rows = (step * torch.arange(seen.shape[1]) + CELL / 2 - CELL + step) / frames.shape[2]
    return _middles(seen, rows).numpy()


def _middles(seen: Tensor, rows: Tensor) -> Tensor:
    """Mean row of what is seen around the surest place of each frame, [T]."""
    high, wide = seen.shape[1:]
    size = (2 * _SHIFTS + 1, 3)
    blurred = F.avg_pool2d(seen[:, None], size, 1, (size[0] // 2, size[1] // 2))[:, 0]
    best = blurred.flatten(1).argmax(1)
    row, column = best // wide, best % wide
    near = (torch.arange(high) - row[:, None]).abs() <= 2 * _SHIFTS + 2
    beside = (torch.arange(wide) - column[:, None]).abs() <= 2
    weights = seen * near[:, :, None] * beside[:, None]
    return (weights.sum(2) * rows).sum(1) / weights.sum((1, 2)).clamp(min=1e-9)


def landings(height: Array, fps: float) -> Array:
    """Times in seconds of the landings in a course of heights [T], as of `heights`."""
    steadied = _steadied(height)
    lows = _lowest(steadied)
    marks = [0.0, *lows, len(height) - 1.0]
    trusted = np.where(np.abs(height - steadied) <= _ASTRAY, height, np.nan)
    found = []
    for index, low in enumerate(lows, start=1):
        at = _meet(trusted, marks[index - 1], low, marks[index + 1], SQUASH_S * fps)
        if at is not None:
            found.append(at / fps)
    return np.array(found)


def _steadied(height: Array) -> Array:
    """The median of each frame's height and its neighbours'."""
    padded = np.pad(height, 1, mode="edge")
    steadied: Array = np.median([padded[:-2], height, padded[2:]], axis=0)
    return steadied


def _lowest(height: Array) -> list[float]:
    """Frames where the sprite is lowest between two rises of `_DEPTH` at least.

    Where it is equally low for some frames, which a median often makes of a low, their middle.
    """
    lows: list[float] = []
    top, low = float(height[0]), 0  # highest point since the last low; lowest frame since the top
    falling = False
    for frame, now in enumerate(height):
        if not falling:
            top = min(top, float(now))
            if now - top >= _DEPTH:
                falling, low = True, frame
        if falling:
            low = frame if now > height[low] else low
            if height[low] - now >= _DEPTH:
                lows.append((low + int(np.argmax(height[low:] < height[low])) - 1 + low) / 2)
                falling, top = False, float(now)
    return lows


def _meet(height: Array, before: float, low: float, after: float, squash: float) -> float | None:
    """Frame, not whole, at which the arcs from `before` and to `after` meet near `low`.

    Both arcs share their gravity; height, and the speed before and after, are free. Frames without
    a height are left out. None if either arc is too short to tell.
    """
    frames = np.arange(math.ceil(before), math.floor(after) + 1)
    frames = frames[~np.isnan(height[frames])]
    frames = frames[(np.abs(frames - before) > squash) | (before == 0)]
    frames = frames[(np.abs(frames - after) > squash) | (after == len(height) - 1)]
    best: tuple[float, float] | None = None
    for at in low + _STEPS:
        used = frames[np.abs(frames - at) > squash]
        off = used - at
        if min((off < 0).sum(), (off > 0).sum()) < _SHORTEST:
            continue
        columns = [np.ones(len(off)), np.minimum(off, 0), np.maximum(off, 0), off**2]
        matrix, wanted = np.stack(columns, 1), height[used]
        fitted = np.linalg.lstsq(matrix, wanted, rcond=None)[0]
        error = float(np.square(matrix @ fitted - wanted).mean())
        if best is None or error < best[0]:
            best = error, float(at)
    return None if best is None else best[1]
