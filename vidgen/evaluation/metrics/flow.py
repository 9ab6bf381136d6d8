"""Optical flow by OpenCV's DIS, warping, occlusion, warp error.

Axes: N points, H W rows and columns. Flows are [H, W, 2] in pixels (x, y).
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vidgen.core.errors import InputError
from vidgen.media.types import Frames

Flow: TypeAlias = NDArray[np.float32]
Mask: TypeAlias = NDArray[np.bool_]
Points: TypeAlias = NDArray[np.float64]
WORKING_SIDE = 256
_SMALLEST_SIDE = 16


def opencv() -> ModuleType:
    """Return OpenCV set to one thread, so that results don't depend on the number of workers.

    Raises:
        InputError: OpenCV isn't installed.
    """
    try:
        import cv2
    except ImportError:
        raise InputError("optical flow needs OpenCV, which isn't installed; run pip install "
                         "'vidgen[eval]'") from None
    cv2.setNumThreads(1)
    return cv2


class FlowEstimator:
    """Optical flow between two frames' luma by dense inverse search (Kroeger et al. 2016)."""

    def __init__(self) -> None:
        self._cv2 = opencv()
        self._search: Any = self._cv2.DISOpticalFlow_create(self._cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)

    def working(self, frame: Frames) -> Frames:
        """Return a frame [H, W, 3] reduced by area to a short side of 256 pixels at most."""
        height, width = frame.shape[:2]
        scale = WORKING_SIDE / min(height, width)
        if scale >= 1:
            return frame
        size = round(width * scale), round(height * scale)
        return np.asarray(self._cv2.resize(frame, size, interpolation=self._cv2.INTER_AREA))

    def grey(self, frame: Frames) -> NDArray[np.uint8]:
        """Return the luma [H, W] of a frame [H, W, 3]."""
        return np.asarray(self._cv2.cvtColor(frame, self._cv2.COLOR_RGB2GRAY))

    def flow(self, one: NDArray[np.uint8], other: NDArray[np.uint8]) -> Flow:
        """Return the flow [H, W, 2] from one luma [H, W] to another."""
        return np.asarray(self._search.calc(one, other, None))

    def widened(self, mask: Mask) -> Mask:
        """Return a mask [H, W] dilated by one pixel."""
        neighbours = np.ones((3, 3), dtype=np.uint8)
        return np.asarray(self._cv2.dilate(mask.astype(np.uint8), neighbours).astype(bool))

    def warp(self, picture: NDArray[Any], flow: Flow) -> NDArray[Any]:
        """Return a picture [H, W(, C)] warped by a flow, bilinear: picture(x + flow(x))."""
        height, width = flow.shape[:2]
        x = flow[..., 0] + np.arange(width, dtype=np.float32)
        y = flow[..., 1] + np.arange(height, dtype=np.float32)[:, None]
        warped: NDArray[Any] = self._cv2.remap(
            picture, x, y, self._cv2.INTER_LINEAR, borderMode=self._cv2.BORDER_REPLICATE)
        return warped


def check_flow_size(height: int, width: int) -> None:
    """Raise InputError for a side under 16 pixels, too small for optical flow."""
    if min(height, width) < _SMALLEST_SIDE:
        raise InputError(
            f"frames are {width}x{height}, and optical flow needs {_SMALLEST_SIDE} pixels a side; "
            "give larger ones")


def sample_flow(flow: Flow, points: Points) -> Points:
    """Return a flow's vectors [N, 2] at points between pixels, bilinear."""
    height, width = flow.shape[:2]
    x, y = np.clip(points[:, 0], 0, width - 1), np.clip(points[:, 1], 0, height - 1)
    left, top = np.minimum(x.astype(int), width - 2), np.minimum(y.astype(int), height - 2)
    u, v = (x - left)[:, None], (y - top)[:, None]
    above = (1 - u) * flow[top, left] + u * flow[top, left + 1]
    below = (1 - u) * flow[top + 1, left] + u * flow[top + 1, left + 1]
    return np.asarray((1 - v) * above + v * below)


def occluded(flow: Flow, back_here: Flow) -> Mask:
    """Return a mask [H, W] of occluded pixels and of motion boundaries.

    The criteria are those of Ruder et al. 2016, eq. 5 and 6, as in EvalCrafter. `flow` leads from
    this frame to the other; `back_here` is the backward flow, warped by `flow`.
    """
    lengths = np.square(flow).sum(-1)
    returned = np.square(flow + back_here).sum(-1)
    lost = returned > 0.01 * (lengths + np.square(back_here).sum(-1)) + 0.5
    steep = sum(
        np.square(np.gradient(flow[..., axis])).sum(0) for axis in range(2)
    ) > 0.01 * lengths + 0.002
    height, width = lengths.shape
    x = flow[..., 0] + np.arange(width)
    y = flow[..., 1] + np.arange(height)[:, None]
    outside = (x < 0) | (y < 0) | (x > width - 1) | (y > height - 1)
    return np.asarray(lost | steep | outside)


def warp_error(one: Frames, fetched: NDArray[Any], hidden: Mask) -> float | None:
    """Return the mean squared error in [0, 1] of pixels visible in both frames; None without any.

    `one` is uint8 [H, W, 3], `fetched` the other frame warped to it; pixels of `hidden` [H, W] are
    ignored.
    """
    seen = ~hidden
    if not seen.any():
        return None
    error = np.subtract(fetched, one, dtype=np.float32)[seen] / 255
    return float(np.square(error).mean(dtype=np.float64))
