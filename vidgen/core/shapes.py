"""Sizes of videos and latents, from a VAE's strides.

A causal VAE compresses the first frame alone and then `t` frames at a time, so T = 1 + t * (F - 1)
for T frames and F latent frames.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from vidgen.core.errors import InputError
from vidgen.core.values import check_number


@dataclass(frozen=True)
class Strides:
    """Strides of a VAE: frames (`t`) and pixels a side (`hw`) for each latent."""

    t: int
    hw: int

    def at_rate(self, rate: int) -> Strides:
        """Return the strides at `rate` times as many latent frames."""
        return replace(self, t=self.t // rate)


@dataclass(frozen=True)
class Tiles:
    """Grid of `rows` x `columns` tiles of a picture."""

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
    """Shape of latents: `num_frames` latent frames of `height` x `width` latents."""

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
        patch: latents a side of one token of the transformer.

    Raises:
        InputError: a size that the strides can't represent; the message names the nearest two.
    """
    check_number("batch", batch, 1, whole=True)
    check_num_frames(num_frames, strides)
    check_size("height", height, strides.hw * patch)
    check_size("width", width, strides.hw * patch)
    return LatentShape(channels, 1 + (num_frames - 1) // strides.t, height // strides.hw,
                       width // strides.hw, batch)


def check_num_frames(num_frames: int, strides: Strides) -> None:
    """Raise InputError unless `num_frames` is 1 more than a multiple of the temporal stride."""
    check_number("frames", num_frames, 1, whole=True)
    if (num_frames - 1) % strides.t:
        below = (num_frames - 1) // strides.t * strides.t + 1
        raise InputError(
            f"{num_frames} frames can't be made: the count must be 1 more than a multiple of "
            f"{strides.t}; the nearest are {below} and {below + strides.t}"
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


def nearest_sizes(value: int, multiple: int) -> tuple[int, int]:
    """Return the two positive multiples around `value`, which may be the lower one."""
    below = max(value // multiple, 1) * multiple
    return below, below + multiple


def num_frames_for_seconds(seconds: float, fps: float, strides: Strides) -> tuple[int, int]:
    """Return the numbers of frames to generate and to keep for a duration.

    Returns:
        (generated, kept): kept is seconds * fps, rounded half up and at least 1; generated is the
        next possible frame count.

    Raises:
        InputError: a duration or frame rate that is not a positive finite number.
    """
    check_number("seconds", seconds, above=True)
    check_number("fps", fps, above=True)
    kept = max(1, math.floor(seconds * fps + 0.5))
    return 1 + math.ceil((kept - 1) / strides.t) * strides.t, kept


def size_for_aspect(aspect: float, area: int, multiple: int) -> tuple[int, int]:
    """Return the size closest to an aspect ratio and an area.

    The logarithmic errors of both have equal weight, which keeps the number of tokens close to the
    one of the model's training.

    Args:
        aspect: width / height.
        area: pixels of the model's default size.
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
