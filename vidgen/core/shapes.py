"""Sizes of videos and latents, derived from a VAE's strides and checked at the border.

Axes: B batch, C latent channels, T frames, H W pixel rows and columns, F latent frames, h w latent
rows and columns. A causal VAE compresses the first frame alone and then `t` frames at a time, so
T = 1 + t * (F - 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from vidgen.core.errors import InputError
from vidgen.core.values import check_number


@dataclass(frozen=True)
class Strides:
    """Frames (`t`) and pixels a side (`hw`) that one latent stands for."""

    t: int
    hw: int

    def at_rate(self, rate: int) -> Strides:
        """Return the strides with `rate` latent frames for each one."""
        return replace(self, t=self.t // rate)


@dataclass(frozen=True)
class Tiles:
    """A grid of `rows` x `columns` that a picture is cut into."""

    rows: int
    columns: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}"

    @property
    def count(self) -> int:
        """Number of tiles."""
        return self.rows * self.columns


@dataclass(frozen=True)
class LatentShape:
    """Latents of `batch` clips: `num_frames` latent frames of `channels` x `height` x `width`."""

    channels: int
    num_frames: int
    height: int
    width: int
    batch: int = 1

    @property
    def dims(self) -> tuple[int, int, int, int, int]:
        """(B, C, F, h, w), the shape of the tensor."""
        return (self.batch, self.channels, self.num_frames, self.height, self.width)


def latent_shape(
    num_frames: int, height: int, width: int, strides: Strides, channels: int, *, batch: int = 1,
    patch: int = 1,
) -> LatentShape:
    """Return the shape of the latents of a video.

    Args:
        patch: latents a side that the transformer takes as one token.

    Raises:
        InputError: a size that the strides can't reach; the nearest two are named.
    """
    check_number("batch", batch, 1, whole=True)
    check_num_frames(num_frames, strides)
    check_size("height", height, strides.hw * patch)
    check_size("width", width, strides.hw * patch)
    return LatentShape(channels, 1 + (num_frames - 1) // strides.t, height // strides.hw,
                       width // strides.hw, batch)


def check_num_frames(num_frames: int, strides: Strides) -> None:
    """Raise InputError unless a clip of `num_frames` is one frame plus whole groups of `t`."""
    check_number("frames", num_frames, 1, whole=True)
    if (num_frames - 1) % strides.t:
        below, above = nearest_num_frames(num_frames, strides)
        raise InputError(
            f"{num_frames} frames can't be made: the count must be 1 more than a multiple of "
            f"{strides.t}; the nearest are {below} and {above}"
        )


def check_size(name: str, value: int, multiple: int) -> None:
    """Raise InputError unless `value` pixels are a positive multiple of `multiple`."""
    check_number(name, value, 1, whole=True)
    if value % multiple:
        below, above = nearest_sizes(value, multiple)
        raise InputError(
            f"a {name} of {value} pixels can't be made: it must be a multiple of {multiple}; "
            f"the nearest are {below} and {above}"
        )


def nearest_num_frames(num_frames: int, strides: Strides) -> tuple[int, int]:
    """The two reachable frame counts around `num_frames`, which may itself be one of them."""
    below = max(num_frames - 1, 0) // strides.t * strides.t + 1
    return below, below + strides.t


def nearest_sizes(value: int, multiple: int) -> tuple[int, int]:
    """The two positive multiples around `value`, which may itself be one of them."""
    below = max(value // multiple, 1) * multiple
    return below, below + multiple


def num_frames_for_seconds(seconds: float, fps: float, strides: Strides) -> tuple[int, int]:
    """Return the number of frames to generate for a duration, and of those to keep.

    Returns:
        (generated, kept): kept is seconds * fps rounded half up, at least 1; generated is the next
        reachable count.

    Raises:
        InputError: a duration or frame rate that is not a positive finite number.
    """
    check_number("seconds", seconds, above=True)
    check_number("fps", fps, above=True)
    kept = max(1, math.floor(seconds * fps + 0.5))
    return 1 + math.ceil((kept - 1) / strides.t) * strides.t, kept


def size_for_aspect(aspect: float, area: int, multiple: int) -> tuple[int, int]:
    """The size closest to an aspect ratio at (nearly) a given area.

    Both errors weigh alike, as logarithms, so that the token count stays what the model is used to.

    Args:
        area: pixels of the model's own size.
        multiple: pixels a side of one token.

    Returns:
        (height, width), multiples of `multiple`.

    Raises:
        InputError: an aspect ratio that is not a positive finite number.
    """
    check_number("aspect", aspect, above=True)

    def misfit(size: tuple[int, int]) -> float:
        height, width = size
        return abs(math.log(width / height / aspect)) + abs(math.log(width * height / area))

    heights = nearest_sizes(int(math.sqrt(area / aspect)), multiple)
    widths = nearest_sizes(int(math.sqrt(area * aspect)), multiple)
    return min(((h, w) for h in heights for w in widths), key=misfit)
