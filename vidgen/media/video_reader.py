"""Frame-by-frame reading of films, animations and pictures.

Axes: H W rows and columns.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Self, cast

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter
from PIL import Image, ImageSequence

from vidgen.media.read import (
    MAX_PIXELS,
    PICTURE_SUFFIXES,
    check_area,
    decoding,
    existing_file,
    fit,
    load_image,
    pictures_in,
)
from vidgen.media.types import Frames

_SMALL_PIXELS = 6_000  # of `VideoReader.small`


@dataclass
class TimedFrame:
    """One decoded frame of a `VideoReader`.

    Attributes:
        source: as libav or Pillow decoded it.
        ticks: presentation time after the first frame, in `tick_s` of the reader.
        length: duration in the file, in the same unit; 0 if unknown.
        is_damaged: whether the decoder concealed a part of it.
        is_interlaced: whether its lines alternate between two fields.
        rotation: degrees by which to turn it for display.
    """

    source: Image.Image | av.VideoFrame
    ticks: int
    length: int
    is_damaged: bool = False
    is_interlaced: bool = False
    rotation: int = 0


class VideoReader:
    """A reader of a film, animation or picture, in constant memory; each iteration starts over.

    Args:
        square: whether to scale frames to square pixels.

    Attributes:
        fps: exact average rate; 25 for a single picture.
        size: (width, height) as displayed, after any rotation.
        stated_frames: number of frames by the file's header, or None; a truncated file has fewer,
            often without an error by libav.
        header_frames: exact number of frames in the header, or None.
        header_s: duration in the header, in seconds, or None.
        tick_s: exact length of a tick of `timed` in seconds.
        pixel_aspect: width of a pixel over its height, 1 if unknown.

    Raises:
        InputError: missing, no video, or damaged.
    """

    stated_frames: int | None = None
    header_frames: int | None = None
    header_s: Fraction | None = None
    tick_s = Fraction(1, 1000)
    pixel_aspect = Fraction(1)

    def __init__(self, path: str | os.PathLike[str], *, square: bool = True) -> None:
        self.path, self._square = existing_file(path, "video"), square
        self._what, self._stack = f"video {self.path}", ExitStack()
        self._reformatter = VideoReformatter()
        with self._stack, decoding(self._what, "give a video file", "can't be read"):
            self._open()
            first = next(self._decode(), None)
            if first is None:
                raise ValueError("no frame in it can be decoded")
            height, width, _ = self._shown(first.source).shape
            self.size = width, height
            self._stack = self._stack.pop_all()  # stays open

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __iter__(self) -> Iterator[Frames]:
        """Yield frames uint8 [H, W, 3] from the first to the last."""
        for frame in self.timed():
            yield self.picture(frame)

    def timed(self) -> Iterator[TimedFrame]:
        """Yield frames from the first to the last, with times at least a tick apart."""
        with decoding(self._what, "save it again"):
            yield from self._decode()

    def picture(self, frame: TimedFrame) -> Frames:
        """Return a frame as displayed, uint8 [H, W, 3] of the reader's size."""
        width, height = self.size  # of the first frame, if the size changes midway
        return fit(self._shown(frame.source), height, width, "pad")

    @property
    def small_shape(self) -> tuple[int, int]:
        """(h, w) of `small` pictures, at the displayed aspect."""
        width, height = self.size
        scale = min(1.0, math.sqrt(_SMALL_PIXELS / (width * height)))
        return max(2, round(height * scale)), max(2, round(width * scale))

    def small(self, frame: TimedFrame) -> Frames:
        """Return a frame reduced by area to about 6,000 pixels, uint8 [h, w, 3]."""
        height, width = self.small_shape
        size = (height, width) if frame.rotation % 180 else (width, height)  # before rotation
        if isinstance(frame.source, Image.Image):
            small = np.array(frame.source.resize(size, Image.Resampling.BOX))
        else:
            small = _to_rgb(frame.source, self._reformatter, size)
        return fit(small, height, width, "pad")

    def _open(self) -> None:
        self._image: Image.Image | None = None
        if self.path.suffix.lower() in PICTURE_SUFFIXES:
            self._image = self._stack.enter_context(Image.open(self.path))
            check_area(self._what, self._image.size)
            self.fps = _animation_fps(self._image)
            return
        self._container = self._stack.enter_context(
            av.open(str(self.path), metadata_errors="replace")
        )
        streams = [stream for stream in self._container.streams.video
                   if not stream.disposition & Disposition.attached_pic]  # skip cover art
        if not streams:
            raise ValueError("it has no picture")
        if self._container.format.name == "tty":  # libav would draw any text file as pictures
            raise ValueError("it is text")
        stream = self._stream = streams[0]
        coded = stream.codec_context.width, stream.codec_context.height
        self.pixel_aspect = Fraction(stream.sample_aspect_ratio or 1)
        check_area(self._what, _squared(*coded, self.pixel_aspect) or coded)
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # of later sizes
        stream.thread_type = "AUTO"
        self.fps = Fraction(stream.average_rate or stream.guessed_rate or 25)
        self.tick_s = Fraction(stream.time_base or Fraction(1, 90_000))
        self.header_frames = self.stated_frames = stream.frames or None
        self.header_s = None if stream.duration is None else stream.duration * self.tick_s
        seconds = self._container.duration
        if not stream.frames and seconds is not None and len(self._container.streams) == 1:
            self.stated_frames = round(seconds * self.fps / av.time_base)  # sound may be longer

    def _decode(self) -> Iterator[TimedFrame]:
        if self._image is not None:
            ticks = 0
            for still in ImageSequence.Iterator(self._image):
                shown = still.convert("RGB")
                length = round(still.info.get("duration", 0)) or round(1000 / self.fps)
                yield TimedFrame(shown, ticks, length)
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
            yield TimedFrame(frame, ticks, frame.duration or 0, frame.is_corrupt,
                             frame.interlaced_frame, frame.rotation % 360)
            before = ticks

    def _shown(self, source: Image.Image | av.VideoFrame) -> Frames:
        if isinstance(source, Image.Image):
            return np.array(source)
        aspect = self.pixel_aspect if self._square else Fraction(1)
        return _to_rgb(source, self._reformatter, _squared(source.width, source.height, aspect))

    @property
    def is_plain(self) -> bool:
        """Whether the frame rate is constant and pixels are square."""
        return self.pixel_aspect == 1 and self.places is None

    @cached_property
    def places(self) -> list[int] | None:
        """Times of frames in steps of `1 / fps`; None for a constant frame rate."""
        with decoding(self._what, "save it again"):
            at = self._times()
        places = [round((time - at[0]) * self.fps) for time in at]
        uneven = any(abs(place - index) > 1 for index, place in enumerate(places))
        return places if uneven else None

    def length(self) -> int:
        """Return the number of frames at a constant frame rate; decode all of them."""
        return self.ending()[0]

    def ending(self) -> tuple[int, Frames]:
        """Return `length`, and the last frame, uint8 [H, W, 3]."""
        count, last = 0, None
        for frame in self:
            count, last = count + 1, frame
        assert last is not None  # the constructor decoded one
        return (count if self.places is None else self.places[-1] + 1), last

    def _times(self) -> list[Fraction]:
        """Return the frames' presentation times in seconds, in order; empty if unknown."""
        if self._image is not None:
            lengths = [Fraction(round(ms), 1000) for ms in _durations_ms(self._image)]
            return [sum(lengths[:n], Fraction()) for n in range(len(lengths))]
        self._container.seek(0)
        stated = [packet.pts for packet in self._container.demux(self._stream) if packet.size]
        ticks = sorted(pts for pts in stated if pts is not None)
        tick_s = Fraction(self._stream.time_base or 1)
        return [pts * tick_s for pts in ticks] if len(ticks) == len(stated) else []


def _squared(width: int, height: int, aspect: Fraction) -> tuple[int, int] | None:
    """Return the (width, height) enlarged to square pixels; None for aspect 1."""
    if aspect == 1:
        return None
    return (round(width * aspect), height) if aspect > 1 else (width, round(height / aspect))


def _animation_fps(image: Image.Image) -> Fraction:
    durations = [*_durations_ms(image)]
    total = Fraction(sum(durations)).limit_denominator(1000)
    return len(durations) * 1000 / total if total else Fraction(25)


def _durations_ms(image: Image.Image) -> Iterator[float]:
    for frame in ImageSequence.Iterator(image):
        frame.load()  # WebP gives a frame's duration only then
        yield frame.info.get("duration", 0)


def _to_rgb(
    frame: av.VideoFrame, reformatter: VideoReformatter, size: tuple[int, int] | None = None
) -> Frames:
    """Return a decoded frame as displayed, uint8 [H, W, 3], turned by its rotation.

    It is first scaled to (width, height), by area if that is smaller.
    """
    exact = Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
    is_yuv = frame.format.name.startswith("yuv")
    # Untagged video of more than 576 lines is BT.709 by convention, smaller BT.601.
    untagged = Colorspace.ITU709 if frame.height > 576 else Colorspace.ITU601
    source = untagged if frame.colorspace in (0, 2) else None
    scaling = None
    if size is not None and size[0] <= frame.width and size[1] <= frame.height:
        scaling = Interpolation.AREA | exact
    elif is_yuv or size is not None:
        scaling = Interpolation.BICUBIC | exact
    width, height = size or (None, None)
    rgb = reformatter.reformat(frame, width=width, height=height, format="rgb24",
                               src_colorspace=source if is_yuv else None,
                               interpolation=scaling).to_ndarray()
    return np.ascontiguousarray(np.rot90(cast("Frames", rgb), frame.rotation // 90))


def read_frames(path: str | os.PathLike[str]) -> Iterator[Frames]:
    """Yield frames uint8 [H, W, 3] of a film, animation, picture, or folder of PNGs by name.

    Raises:
        InputError: missing, damaged, or a folder without pictures.
    """
    if Path(path).is_dir():
        for file in pictures_in(path):
            yield load_image(file)[0]
        return
    with VideoReader(path) as reader:
        yield from reader
