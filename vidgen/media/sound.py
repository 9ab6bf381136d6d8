"""Sound of files, decoded block by block, down-mixed and resampled; buffers for hours of it.

Axes: N samples, n samples of a block, c channels.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np

from vidgen.core.errors import InputError
from vidgen.core.runtime import write_error
from vidgen.media.probe import open_container
from vidgen.media.read import existing_file
from vidgen.media.types import Samples

if TYPE_CHECKING:
    from av.audio.frame import AudioFrame
    from av.audio.resampler import AudioResampler
    from av.container import InputContainer

RATE = 48_000
"""Samples per second of a clip's sound; the usual rate of video, and of Opus."""
IN_MEMORY = 16_000_000
"""Bytes of sound to keep in memory; more go to an unnamed file, memory-mapped."""
_LATE_S = 0.002
_LACK_S = 0.1
"""Seconds that may be missing at a file's end before it counts as cut off."""


def room(num_samples: int, channels: int) -> Samples:
    """Return silence float32 [num_samples, channels], in an unnamed file if it is long.

    Raises:
        OutputError: no disk space.
    """
    num_bytes = 4 * num_samples * channels
    if num_bytes <= IN_MEMORY:
        return np.zeros((num_samples, channels), np.float32)
    try:
        with tempfile.TemporaryFile(prefix="vidgen-") as file:
            os.posix_fallocate(file.fileno(), 0, num_bytes)  # fail now, not when written
            return np.memmap(file, np.float32, "r+", shape=(num_samples, channels))
    except OSError as error:
        raise write_error(Path(tempfile.gettempdir(), "sound"), error) from error


def gather(blocks: Iterable[Samples], channels: int) -> Samples:
    """Join blocks [n, c] to float32 [N, c], in an unnamed file if they are long."""
    with tempfile.SpooledTemporaryFile(IN_MEMORY, prefix="vidgen-") as file:
        for block in blocks:
            file.write(block.tobytes())
        size = file.tell()
        if size > IN_MEMORY:
            return np.memmap(file, np.float32, "r+", shape=(size // (4 * channels), channels))
        file.seek(0)
        return np.frombuffer(bytearray(file.read()), np.float32).reshape(-1, channels)


class SoundReader:
    """A reader of a file's first sound track, block by block in constant memory.

    Mono stays mono. More channels become two by libswresample's matrix: centre on both sides and
    surrounds on their own, at -3 dB, without the low-frequency channel. Blocks have `rate` samples
    per second; None: the file's own.

    Attributes:
        source_rate: samples per second of the file.
        channels: 1 or 2.
        seconds: the track's length in the file's header, or None.

    Raises:
        InputError: missing, not a media file, or without sound.
    """

    def __init__(self, path: str | os.PathLike[str], rate: int | None = None) -> None:
        self.path = existing_file(path, "sound")
        self._what = f"sound {self.path}"
        with self._open("give a sound file") as container:
            if not container.streams.audio:
                kind = "a video without sound" if container.streams.video else "not a sound file"
                is_text = container.format.name == "tty"
                raise InputError(f"{self._what} is {'text' if is_text else kind}; give a file that "
                                 "has a sound track")
            stream = container.streams.audio[0]
            if not (stream.rate and stream.channels):
                raise ValueError("its sound has no rate or no channels")
            self.source_rate, self.rate = stream.rate, rate or stream.rate
            self.channels = min(2, stream.channels)
            is_stated = stream.duration is not None and stream.time_base is not None
            self.seconds = (
                float(stream.duration * stream.time_base)  # type: ignore[operator]
                if is_stated else container.duration and container.duration / av.time_base
            )
            # a codec's last packet is padded to its full length
            self._limit = round(self.seconds * self.rate) if is_stated and self.seconds else 1 << 62

    def __iter__(self) -> Iterator[Samples]:
        """Yield blocks float32 [n, channels], from the file's start to the track's end."""
        layout, limit = "mono" if self.channels == 1 else "stereo", self._limit
        # opened again: a seek to 0 would skip packets that the codec needs first
        with self._open("save it again, as WAV or FLAC") as container:
            resampler = av.AudioResampler(format="flt", layout=layout, rate=self.rate)
            done, first = 0, True
            for frame in container.decode(container.streams.audio[0]):
                late = self._late(container, frame) if first else 0
                if late:
                    yield np.zeros((late, self.channels), np.float32)
                first, done = False, done + late
                for part in _blocks(resampler, frame, self.channels):
                    yield part[: max(0, limit - done)]
                    done += len(part)
            for part in _blocks(resampler, None, self.channels) if not first else ():
                yield part[: max(0, limit - done)]
                done += len(part)

    def lacks(self, num_samples: int) -> float:
        """Return the seconds missing from the stated length after `num_samples`; 0 if complete."""
        lack = (self.seconds or 0.0) - num_samples / self.rate
        return lack if lack > _LACK_S else 0.0

    def _open(self, remedy: str) -> AbstractContextManager[InputContainer]:
        return open_container(self.path, self._what, remedy, "can't be read")

    def _late(self, container: InputContainer, frame: AudioFrame) -> int:
        """Return the number of silent samples before a track that starts after its picture."""
        if not container.streams.video or frame.time is None:
            return 0
        late = frame.time - (container.start_time or 0) / av.time_base
        return round(late * self.rate) if late > _LATE_S else 0


def read_sound(path: str | os.PathLike[str]) -> tuple[Samples, int] | None:
    """Return the first sound track as float32 [N, channels] and its rate; None without one.

    Long sound is mapped from an unnamed file; see `SoundReader` for channels.

    Raises:
        InputError: missing, or not a media file.
    """
    found = existing_file(path, "sound")
    with open_container(found, f"sound {path}", "save it again", "can't be read") as container:
        if not container.streams.audio:
            return None
    reader = SoundReader(path)
    return gather(reader, reader.channels), reader.rate


def resampled(
    blocks: Iterable[Samples], channels: int, rate: int, wanted: int
) -> Iterator[Samples]:
    """Yield blocks float32 [n, channels] resampled by libswresample, without a delay."""
    if rate == wanted:
        yield from blocks
        return
    layout, position = "mono" if channels == 1 else "stereo", 0
    resampler = av.AudioResampler(format="flt", layout=layout, rate=wanted)
    for block in blocks:
        frame = sound_frame(block, rate, position)
        position += len(block)
        yield from _blocks(resampler, frame, channels)
    if position:
        yield from _blocks(resampler, None, channels)


def _blocks(
    resampler: AudioResampler, frame: AudioFrame | None, channels: int
) -> Iterator[Samples]:
    for part in resampler.resample(frame):
        yield np.ascontiguousarray(part.to_ndarray().reshape(-1, channels), np.float32)


def sound_frame(block: Samples, rate: int, position: int) -> AudioFrame:
    """Return a block [n, c] of one or two channels as libav's frame at sample `position`."""
    layout = "mono" if block.shape[1] == 1 else "stereo"
    flat = np.ascontiguousarray(block, np.float32).reshape(1, -1)
    frame = av.AudioFrame.from_ndarray(flat, format="flt", layout=layout)
    frame.sample_rate, frame.pts = rate, position
    frame.time_base = Fraction(1, rate)
    return frame
