"""Frames with the times at which they are shown, for files of any rate, also a variable one.

Axes: H W rows and columns, h w those of a picture made small.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageSequence

from vidgen.media.read import decoding, fit
from vidgen.media.types import Frames
from vidgen.media.video_reader import VideoReader, to_rgb

_SMALL_PIXELS = 6_000


@dataclass
class TimedFrame:
    """One decoded frame.

    Attributes:
        ticks: when it is shown, in units of the reader's `tick_s`, from the first frame on.
        length: how long, in the same units, as the file says; 0 where it doesn't.
        is_damaged: whether the decoder had to make up a part of it.
        is_interlaced: whether it holds two moments, line by line.
        rotation: degrees by which it is turned for showing.
    """

    ticks: int
    length: int
    is_damaged: bool
    is_interlaced: bool
    rotation: int
    _reader: TimedReader
    _source: object

    def picture(self) -> Frames:
        """It as it is shown, uint8 [H, W, 3] of the reader's size."""
        width, height = self._reader.size
        return fit(self._reader.rgb(self._source, None), height, width, "pad")

    def small(self) -> Frames:
        """It at about 6,000 pixels, uint8 [h, w, 3], by means over areas."""
        width, height = self._reader.small_size
        small = self._reader.rgb(self._source, (width, height))
        return fit(small, *self._reader.small_shape, "pad")


class TimedReader(VideoReader):
    """A film or animation, frame by frame with times, at constant memory.

    Attributes:
        tick_s: seconds that a tick lasts, exact.
        told_frames: how many frames the file's head claims, None where it doesn't.
        told_s: how long it claims to be.
        pixel_aspect: width of a pixel over its height, 1 where the file doesn't say.

    Raises:
        InputError: missing, no video, or damaged.
    """

    _square = False

    def _open(self) -> None:
        super()._open()
        self.told_frames: int | None = None
        self.told_s: Fraction | None = None
        self.pixel_aspect = Fraction(1)
        self._reformatter = VideoReformatter()
        if self._image is not None:
            self.tick_s = Fraction(1, 1000)
            return
        stream = self._stream
        self.tick_s = Fraction(stream.time_base or Fraction(1, 90_000))
        self.told_frames = stream.frames or None
        if stream.duration is not None:
            self.told_s = stream.duration * self.tick_s
        self.pixel_aspect = self._aspect

    @property
    def small_shape(self) -> tuple[int, int]:
        """(h, w) of small pictures, of the aspect in which they are shown."""
        width, height = self.size
        scale = min(1.0, math.sqrt(_SMALL_PIXELS / (width * height)))
        return max(2, round(height * scale)), max(2, round(width * scale))

    @property
    def small_size(self) -> tuple[int, int]:
        """(width, height) of small pictures before they are turned."""
        h, w = self.small_shape
        return (h, w) if self._is_on_its_side else (w, h)

    def rgb(self, source: object, size: tuple[int, int] | None) -> Frames:
        """What libav or Pillow decoded as uint8 [H, W, 3], shrunk to (width, height) if asked."""
        if isinstance(source, Image.Image):
            shown = source if size is None else source.resize(size, Image.Resampling.BOX)
            return np.array(shown)
        return to_rgb(source, self._reformatter, size)  # type: ignore[arg-type]

    def timed(self) -> Iterator[TimedFrame]:
        """Frames from the first to the last, times rising by a tick at least."""
        with decoding(self._what, "save it again"):
            yield from self._timed()

    def _timed(self) -> Iterator[TimedFrame]:
        self._is_on_its_side = False
        if self._image is not None:
            ticks = 0
            for still in ImageSequence.Iterator(self._image):
                shown = still.convert("RGB")
                length = round(still.info.get("duration", 0)) or round(1000 / self.fps)
                yield TimedFrame(ticks, length, False, False, 0, self, shown)
                ticks += length
            return
        self._container.seek(0)
        usual = max(1, round(1 / (self.fps * self.tick_s)))
        first, before = None, -usual
        for frame in self._container.decode(self._stream):
            first = frame.pts if first is None else first
            ticks = before + usual
            if frame.pts is not None and first is not None:
                ticks = max(frame.pts - first, before + 1)
            self._is_on_its_side = frame.rotation % 180 != 0
            yield TimedFrame(
                ticks, frame.duration or 0, frame.is_corrupt, frame.interlaced_frame,
                frame.rotation % 360, self, frame,
            )
            before = ticks
