"""Pictures and sound into packets, the picture in segments.

Each segment gets a fresh encoder with a closed group of pictures and a pinned number of threads, so
its packets depend on its own frames alone: a clip that was streamed, resumed or joined from parts
holds the same bytes as one written straight through.

Axes: t frames, H W rows and columns, N samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, cast

import av
import numpy as np
from av.codec.context import Flags
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

if TYPE_CHECKING:
    from av.audio.stream import AudioStream
    from av.container import OutputContainer
    from av.packet import Packet
    from av.video.codeccontext import VideoCodecContext
    from av.video.stream import VideoStream

Frames: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]
Samples: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]

Encoded: TypeAlias = tuple[bytes, int, int, bool]
"""A packet: bytes, presentation and decoding time in frames of the clip, whether a key frame."""

_SCALING = (
    Interpolation.BICUBIC
    | Interpolation.ACCURATE_RND
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.FULL_CHR_H_INP
)
_BT709 = 1  # H.273's code point for primaries, transfer and matrix alike


@dataclass(frozen=True)
class Segment:
    """An encoded segment of a picture.

    Attributes:
        num_frames: how many it holds.
        packets: in decoding order.
    """

    num_frames: int
    packets: tuple[Encoded, ...]


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

    def configure(self, encoder: VideoCodecContext, size: tuple[int, int], fps: Fraction) -> None:
        """Set up an encoder for frames of (width, height) at `fps`."""
        encoder.width, encoder.height = size
        encoder.pix_fmt = self.pix_fmt
        encoder.framerate, encoder.time_base = fps, 1 / fps
        encoder.thread_count = self.threads
        encoder.options = dict(self.options)
        if self.pix_fmt.startswith("yuv"):
            encoder.color_range = ColorRange.MPEG
            encoder.color_primaries = encoder.color_trc = encoder.colorspace = _BT709

    def picture(self, frame: Frames, reformatter: VideoReformatter) -> av.VideoFrame:
        """A frame [H, W, 3] in the encoder's pixel format, by BT.709 limited range where YUV."""
        source = av.VideoFrame.from_ndarray(frame, format="rgb24")
        if not self.pix_fmt.startswith("yuv"):
            return reformatter.reformat(source, format=self.pix_fmt)
        return reformatter.reformat(
            source,
            format=self.pix_fmt,
            src_color_range=ColorRange.JPEG,
            dst_color_range=ColorRange.MPEG,
            dst_colorspace=Colorspace.ITU709,
            interpolation=_SCALING,
        )


def encode_picture(
    chunks: Iterator[Frames],
    settings: PictureSettings,
    size: tuple[int, int],
    fps: Fraction,
    *,
    first_segment: int,
    segment: int,
    store: SegmentStore | None = None,
) -> Iterator[Packet[VideoStream]]:
    """Packets of a stream of frames, in segments.

    Args:
        chunks: uint8 [t, H, W, 3] each, of any t; their borders leave no trace in the output. The
            first frame is the one behind the store's finished segments.
        settings: the encoder's.
        size: (width, height).
        fps: exact frame rate.
        first_segment: frames of the first segment, shorter than the others by what the first
            latent frame lacks.
        segment: frames of every further segment, a fixed number of latent frames.
        store: gives the segments that are finished, and keeps the others as they are.

    Yields:
        Packets in decoding order, timed in units of 1 / fps from the clip's start.
    """
    assert min(first_segment, segment) >= 8, "a segment must outlast the encoder's reordering"
    frames = (frame for chunk in chunks for frame in chunk)
    reformatter = VideoReformatter()
    start, delay = 0, None
    for finished in store.segments() if store else ():
        yield from _packets_of(finished, 1 / fps)
        if delay is None:
            _, pts, dts, _ = finished.packets[0]
            delay = pts - dts
        start += finished.num_frames
    length = segment if start else first_segment
    for head in frames:
        encoder = cast("VideoCodecContext", av.CodecContext.create(settings.codec, "w"))
        settings.configure(encoder, size, fps)
        encoder.flags |= Flags.global_header
        count, made = 0, list[Encoded]()
        for frame in chain([head], islice(frames, length - 1), [None]):
            picture = None if frame is None else settings.picture(frame, reformatter)
            if picture is not None:
                picture.pts, picture.time_base = count, 1 / fps
                count += 1
            for packet in encoder.encode(picture):
                pts, dts = cast("tuple[int, int]", (packet.pts, packet.dts))
                # a short last segment reorders less, but decoding goes on at the same pace
                delay = pts - dts if delay is None else delay
                packet.pts, packet.dts = start + pts, start + len(made) - delay
                packet.duration = 1
                made.append((bytes(packet) if store else b"", packet.pts, packet.dts,
                             packet.is_keyframe))
                yield packet
        if store:
            store.keep(Segment(count, tuple(made)))
        start, length = start + count, segment


def _packets_of(segment: Segment, time_base: Fraction) -> Iterator[Packet[VideoStream]]:
    for content, pts, dts, is_key in segment.packets:
        packet = cast("Packet[VideoStream]", av.Packet(content))
        packet.pts, packet.dts, packet.duration = pts, dts, 1
        packet.time_base, packet.is_keyframe = time_base, is_key
        yield packet


class SoundTrack:
    """Sound samples that are encoded into a container as its picture advances.

    Args:
        container: where it is muxed to.
        codec: libav's name of the encoder.
        samples: float32 [N, channels], one or two channels, in [-1, 1].
        rate: samples per second.
    """

    def __init__(self, container: OutputContainer, codec: str, samples: Samples, rate: int) -> None:
        self.container, self.samples, self.rate = container, samples, rate
        layout = "mono" if samples.shape[1] == 1 else "stereo"
        target = 48_000 if codec == "libopus" else rate  # Opus knows few rates; 48 kHz is its own
        stream = container.add_stream(codec, rate=target, layout=layout)
        self.stream = cast("AudioStream", stream)
        if codec != "pcm_f32le":
            self.stream.bit_rate = 96_000 * samples.shape[1]
        self.layout, self.position = layout, 0

    def advance(self, seconds: float) -> None:
        """Encode what sounds before `seconds`."""
        stop = min(len(self.samples), round(seconds * self.rate))
        if stop > self.position:
            part = np.ascontiguousarray(self.samples[self.position : stop].reshape(1, -1))
            frame = av.AudioFrame.from_ndarray(part, format="flt", layout=self.layout)
            frame.sample_rate, frame.pts = self.rate, self.position
            frame.time_base = Fraction(1, self.rate)
            self.position = stop
            self.container.mux(self.stream.encode(frame))

    def finish(self) -> None:
        """Encode the rest."""
        self.advance(len(self.samples) / self.rate)
        self.container.mux(self.stream.encode(None))
