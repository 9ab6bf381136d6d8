"""From one shot to the next, frame by frame, in exact integers or plain rounding.

At frame n of a transition over N frames the second shot's share is s = (n + 1) / (N + 1): neither
the first nor the last frame is one shot alone, for those lie beside the transition.

Axes: H W rows and columns.
"""

from __future__ import annotations

import numpy as np

from vidgen.media.types import Frames

_COLOURS = {"fade-black": 0.0, "fade-white": 255.0}


def blended(kind: str, first: Frames, second: Frames, share: float) -> Frames:
    """A frame on the way between two shots.

    Args:
        kind: "dissolve", "fade-black" or "fade-white" (through the colour), "wipe-left" or
            "wipe-right" (the edge moves that way), "slide-left" or "slide-right" (both shots do).
        first: uint8 [H, W, 3], of the shot before.
        second: the same of the shot that follows.
        share: of the second, above 0 and below 1.

    Returns:
        uint8 [H, W, 3].
    """
    if kind == "dissolve":
        return _mixed(first, second, share)
    if kind in _COLOURS:
        seen = first if share < 0.5 else second
        return faded(kind, seen, abs(1 - 2 * share))
    name, _, direction = kind.partition("-")
    width = first.shape[1]
    columns = round(share * width)  # of the second
    made = np.empty_like(first)
    if name == "wipe":
        made[:] = first
        covered = slice(width - columns, width) if direction == "left" else slice(0, columns)
        made[:, covered] = second[:, covered]
    elif direction == "left":
        made[:, : width - columns] = first[:, columns:]
        made[:, width - columns :] = second[:, :columns]
    else:
        made[:, columns:] = first[:, : width - columns]
        made[:, :columns] = second[:, width - columns :]
    return made


def faded(kind: str, frame: Frames, share: float) -> Frames:
    """A frame uint8 [H, W, 3] of which `share` is left, the rest black or white."""
    mixed = share * frame.astype(np.float32) + (1 - share) * _COLOURS[kind]
    return np.asarray(np.rint(mixed), np.uint8)


def _mixed(first: Frames, second: Frames, share: float) -> Frames:
    mixed = first + share * (second.astype(np.float32) - first)
    return np.asarray(np.rint(mixed), np.uint8)
