"""Types that the room's files share: frames, samples, a clip's description, encoded segments.

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
"""Reduced frames as a `ClipChecker` has seen them, as arrays by name."""


@dataclass(frozen=True)
class Segment:
    """An encoded segment: packets in decoding order, and its frames as the checks saw them."""

    num_frames: int
    packets: tuple[Encoded, ...]
    seen: Looks | None = None


class SegmentStore(Protocol):
    """Finished segments of one output, of `num_frames` in all, after which its encoding resumes."""

    num_frames: int
    output: Path | None
    marks: Mapping[str, str]  # with which they are written; see `Clip.save`

    def segments(self) -> Iterable[Segment]:
        """Return the finished segments, from the clip's start."""

    def keep(self, segment: Segment) -> None:
        """Keep the next segment."""

    def pause(self) -> None:
        """Note that the writing stopped."""

    def close(self) -> None:
        """Note that the output is complete."""


@dataclass(frozen=True)
class PictureSettings:
    """Settings of an encoder; all of them are recorded in the recipe.

    Args:
        codec: libav's name of the encoder.
        pix_fmt: pixel format handed to it.
        threads: pinned, since the bits depend on it.
    """

    codec: str
    pix_fmt: str
    options: dict[str, str] = field(default_factory=dict)
    threads: int = 4

    def fitting(self, size: tuple[int, int]) -> PictureSettings:
        """Adapt them to a (width, height): an odd size has chroma at full size."""
        if self.pix_fmt == "yuv420p" and (size[0] % 2 or size[1] % 2):
            return replace(self, pix_fmt="yuv444p")
        return self


@dataclass(frozen=True)
class ClipInfo:
    """A clip's description for its writer.

    Args:
        size: (width, height).
        sound: float32 [N, channels] of one or two channels, or None. It may lie in a mapped file.
        sound_rate: samples per second.
        recipe: JSON data that goes into the file's metadata, or None.
        stride_t: frames per latent frame, by which segments are cut.
        loudness: level in LUFS that the written sound is brought to; None leaves it as it is.
        picture: how frames are encoded in a film's file; None: as its suffix has it.
        quality: of WebP and JPEG, 1 to 100; None: as the suffix has it.
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
