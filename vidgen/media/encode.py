"""Video encoding in independent segments.

Each segment gets a fresh encoder with a closed group of pictures and a pinned number of threads, so
its packets depend on its own frames alone: a clip that was streamed, resumed or joined from parts
holds the same bytes as one written in a single pass.

Axes: t frames, H W rows and columns.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import TYPE_CHECKING, cast

import av
from av.codec.context import Flags
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from vidgen.media.types import Encoded, Frames, PictureSettings, Segment, SegmentStore

if TYPE_CHECKING:
    from av.packet import Packet
    from av.video.codeccontext import VideoCodecContext
    from av.video.stream import VideoStream

    from vidgen.media.checks import ClipChecker

_SCALING = (Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
            | Interpolation.FULL_CHR_H_INP)
_MOST_REORDERED = 16  # frames, in any codec
_BT709 = 1  # H.273's code point for primaries, transfer and matrix alike


def configure(
    encoder: VideoCodecContext, settings: PictureSettings, size: tuple[int, int], fps: Fraction
) -> None:
    """Set up an encoder for frames of (width, height) at `fps`."""
    encoder.width, encoder.height = size
    encoder.pix_fmt = settings.pix_fmt
    encoder.framerate, encoder.time_base = fps, 1 / fps
    encoder.thread_count = settings.threads
    encoder.options = dict(settings.options)
    if settings.pix_fmt.startswith("yuv"):
        encoder.color_range = ColorRange.MPEG
        encoder.color_primaries = encoder.color_trc = encoder.colorspace = _BT709


def to_picture(frame: Frames, pix_fmt: str, reformatter: VideoReformatter) -> av.VideoFrame:
    """Convert a frame uint8 [H, W, 3] to a pixel format; YUV is BT.709 in limited range."""
    source = av.VideoFrame.from_ndarray(frame, format="rgb24")
    if not pix_fmt.startswith("yuv"):
        return reformatter.reformat(source, format=pix_fmt)
    return reformatter.reformat(source, format=pix_fmt, src_color_range=ColorRange.JPEG,
                                dst_color_range=ColorRange.MPEG, dst_colorspace=Colorspace.ITU709,
                                interpolation=_SCALING)


def checked(chunks: Iterable[Frames], checker: ClipChecker | None) -> Iterator[Frames]:
    """Yield the frames [H, W, 3] of chunks one by one, after feeding each to the checker."""
    for chunk in chunks:
        for frame in chunk:
            if checker:
                checker.feed(frame[None])
            yield frame


def encode_picture(
    frames: Iterator[Frames], settings: PictureSettings, size: tuple[int, int], fps: Fraction, *,
    first_segment: int, segment: int, store: SegmentStore | None = None,
    checker: ClipChecker | None = None,
) -> Iterator[Encoded]:
    """Encode frames uint8 [H, W, 3] in segments; yield the packets in decoding order.

    Packet times count in units of 1 / fps from the clip's start. Packets of the store's finished
    segments come first, `frames` begin after them, and new segments are added to the store. The
    first segment has `first_segment` frames, since the first latent frame covers fewer; further
    ones have `segment`, a fixed number of latent frames. `checker` is restored from the finished
    segments.
    """
    assert min(first_segment, segment) >= 8, "a segment must outlast the encoder's reordering"
    reformatter = VideoReformatter()
    start, delay = 0, None
    for finished in store.segments() if store else ():
        yield from finished.packets
        if delay is None:
            _, pts, dts, _ = finished.packets[0]
            delay = pts - dts
        start += finished.num_frames
        if checker and finished.seen:
            checker.restore(finished.seen)
    if checker and store:
        checker.take_looks()  # start to record
    length = segment if start else first_segment
    for head in frames:
        encoder = cast("VideoCodecContext", av.CodecContext.create(settings.codec, "w"))
        configure(encoder, settings, size, fps)
        encoder.flags |= Flags.global_header
        count, number, made = 0, 0, list[Encoded]()
        for frame in chain([head], islice(frames, length - 1), [None]):
            picture = None if frame is None else to_picture(frame, settings.pix_fmt, reformatter)
            if picture is not None:
                picture.pts, picture.time_base = count, 1 / fps
                count += 1
            for packet in encoder.encode(picture):
                pts, dts = cast("tuple[int, int]", (packet.pts, packet.dts))
                # a short last segment reorders less, but decoding continues at the same pace
                if delay is None:  # x265 leaves dts unset where it has too few frames to reorder
                    delay = pts - dts if 0 <= pts - dts <= _MOST_REORDERED else 0
                encoded = bytes(packet), start + pts, start + number - delay, packet.is_keyframe
                number += 1
                if store:
                    made.append(encoded)
                yield encoded
        if store:
            store.keep(Segment(count, tuple(made), checker.take_looks() if checker else None))
        start, length = start + count, segment


class Spool:
    """A buffer of encoded packets: the file's header needs results of the last frame.

    Up to `IN_MEMORY` bytes stay in memory, more go to an unnamed file in `folder`.
    """

    IN_MEMORY = 8_000_000

    def __init__(self, folder: Path) -> None:
        self._file = SpooledTemporaryFile(max_size=self.IN_MEMORY, dir=str(folder))  # noqa: SIM115

    def close(self) -> None:
        """Discard the packets."""
        self._file.close()

    def add(self, packet: Encoded) -> None:
        """Append a packet."""
        pickle.dump(packet, self._file)

    def packets(self, time_base: Fraction) -> Iterator[Packet[VideoStream]]:
        """Yield the packets, with times in units of `time_base`."""
        end = self._file.tell()
        self._file.seek(0)
        while self._file.tell() < end:
            content, pts, dts, is_key = pickle.load(self._file)
            packet = cast("Packet[VideoStream]", av.Packet(content))
            packet.pts, packet.dts, packet.duration = pts, dts, 1
            packet.time_base, packet.is_keyframe = time_base, is_key
            yield packet
