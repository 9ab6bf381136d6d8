"""Types that the room's files share: frames, samples, a clip's description, encoded segments.

Axes: t frames, H W rows and columns, N samples.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, Protocol, TypeAlias

import numpy as np

Frames: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]
Samples: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]

Encoded: TypeAlias = tuple[bytes, int, int, bool]
"""A packet: bytes, presentation and decoding time in frames of the clip, whether a key frame."""

Snapshot: TypeAlias = tuple[dict[str, np.ndarray[Any, Any]], Any]
"""State of a `Watch`: arrays by name, and JSON data that names them."""


@dataclass(frozen=True)
class Segment:
    """An encoded segment: packets in decoding order, and the `Watch` after its last frame."""

    num_frames: int
    packets: tuple[Encoded, ...]
    seen: Snapshot | None = None


class SegmentStore(Protocol):
    """A clip's finished segments, of `num_frames` in all, after which its encoding can resume."""

    num_frames: int

    def segments(self) -> Iterable[Segment]:
        """Return the finished segments, from the clip's start."""

    def keep(self, segment: Segment) -> None:
        """Keep the next segment."""


class Watch(Protocol):
    """An observer of a clip's frames on their way into the file, which adds to its recipe."""

    def feed(self, chunk: Frames) -> None:
        """See the next frames, uint8 [t, H, W, 3]."""

    def snapshot(self) -> Snapshot:
        """Return the state after the frames so far."""

    def restore(self, snapshot: Snapshot) -> None:
        """Resume after the frames of a snapshot."""

    def report(self) -> dict[str, Any]:
        """Return entries for the recipe, once the last frame has passed."""


@dataclass(frozen=True)
class PictureSettings:
    """Settings of an encoder; all of them are recorded in the recipe.

    Args:
        codec: libav's name of the encoder.
        pix_fmt: pixel format handed to it.
        options: the encoder's own.
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
        fps: exact frame rate.
        size: (width, height).
        num_frames: how many frames will come.
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
