"""Types that the files of this room share: frames, samples, how a clip is encoded and kept.

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
"""What a `Watch` goes on from: arrays by name, and JSON data that names them."""


@dataclass(frozen=True)
class Segment:
    """An encoded segment of a picture.

    Attributes:
        num_frames: how many it holds.
        packets: in decoding order.
        seen: what watches the clip, as it was behind the last frame; or None.
    """

    num_frames: int
    packets: tuple[Encoded, ...]
    seen: Snapshot | None = None


class SegmentStore(Protocol):
    """Where finished segments of one clip are kept, so that its encoding can go on behind them."""

    num_frames: int
    """Frames of the segments that are finished."""

    def segments(self) -> Iterable[Segment]:
        """The finished segments, from the clip's start."""
        ...

    def keep(self, segment: Segment) -> None:
        """Keep the next one."""
        ...


class Watch(Protocol):
    """What sees a clip's frames on their way into the file, and adds to its recipe."""

    def feed(self, chunk: Frames) -> None:
        """See the next frames, uint8 [t, H, W, 3]."""
        ...

    def snapshot(self) -> Snapshot:
        """The state behind the frames so far."""
        ...

    def restore(self, snapshot: Snapshot) -> None:
        """Go on behind the frames of a snapshot."""
        ...

    def report(self) -> dict[str, Any]:
        """Entries for the recipe, once the last frame has passed."""
        ...


@dataclass(frozen=True)
class PictureSettings:
    """How frames become packets; all of it is recorded in the recipe.

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
        """These settings for a (width, height) that chroma at half size may not divide."""
        if self.pix_fmt == "yuv420p" and (size[0] % 2 or size[1] % 2):
            return replace(self, pix_fmt="yuv444p")
        return self


@dataclass(frozen=True)
class ClipInfo:
    """What a writer needs to know of a clip beside its frames.

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
