"""Shared types: frames, samples, a clip's description, encoded segments.

Axes: t frames, H W rows and columns, N samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np

Frames: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]
Samples: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]

Encoded: TypeAlias = tuple[bytes, int, int, bool]
"""A packet: bytes, presentation and decoding time in frames of the clip, whether a key frame."""

Looks: TypeAlias = dict[str, np.ndarray[Any, Any]]
"""Reduced frames of a `ClipChecker`, as arrays by name."""


@dataclass(frozen=True)
class Segment:
    """An encoded segment: packets in decoding order, and reduced frames for the checks."""

    num_frames: int
    packets: tuple[Encoded, ...]
    seen: Looks | None = None


class SegmentStore(Protocol):
    """A store of an output's finished segments, `num_frames` in all, to resume encoding."""

    num_frames: int
    output: Path | None
    marks: Mapping[str, str]  # of the output; see `Clip.save`

    def segments(self) -> Iterable[Segment]:
        """Return the finished segments, from the clip's start."""

    def keep(self, segment: Segment) -> None:
        """Store the next segment."""

    def pause(self) -> None:
        """Record that writing stopped."""

    def close(self) -> None:
        """Record that the output is complete."""


@dataclass(frozen=True)
class PictureSettings:
    """Settings of a video encoder, recorded in the recipe.

    Args:
        codec: libav's name of the encoder.
        pix_fmt: pixel format of its input.
        threads: pinned, since the output bytes depend on it.
    """

    codec: str
    pix_fmt: str
    options: dict[str, str] = field(default_factory=dict)
    threads: int = 4

    def fitting(self, size: tuple[int, int]) -> PictureSettings:
        """Return the settings for (width, height): an odd size needs full-resolution chroma."""
        if self.pix_fmt == "yuv420p" and (size[0] % 2 or size[1] % 2):
            return replace(self, pix_fmt="yuv444p")
        return self


@dataclass(frozen=True)
class ClipInfo:
    """A clip's description for its writer.

    Args:
        size: (width, height).
        sound: float32 [N, channels] of one or two channels, or None; may be memory-mapped.
        sound_rate: samples per second.
        recipe: JSON data for the file's metadata, or None.
        stride_t: frames per latent frame; segments hold whole latent frames.
        loudness: level of the written sound in LUFS; None leaves it unchanged.
        picture: encoder settings of a film file; None: the suffix's defaults.
        quality: of WebP and JPEG, 1 to 100; None: the suffix's default.
    """

    fps: Fraction
    size: tuple[int, int]
    num_frames: int
    sound: Samples | None = None
    sound_rate: int = 48_000
    recipe: dict[str, Any] | None = None
    stride_t: int = 1
    loudness: float | None = None
    picture: PictureSettings | None = None
    quality: int | None = None
