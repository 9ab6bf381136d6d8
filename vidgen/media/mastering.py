"""Loudness of a clip's sound: measured, and normalised block by block during muxing.

Sources: ITU-R BS.1770-4 (gated loudness in LUFS, annex 2: true peaks by oversampling four times);
EBU Tech 3343. libavfilter's `ebur128` measures the loudness; the limiter is ours, since FFmpeg's
`alimiter` ignores peaks between samples.

Axes: N samples, n samples of a block, c channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import av
import numpy as np

from vidgen.media.sound import resampled, sound_frame
from vidgen.media.types import ClipInfo, Samples

if TYPE_CHECKING:
    from av.audio.stream import AudioStream
    from av.container import OutputContainer

Signal: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]

TARGET_LUFS = -16.0
"""Level of a finished clip, as web players and podcasts have it (AES TD1008)."""
MAX_GAIN_DB = 12.0
"""Largest gain of a quiet sound; more would raise its noise."""
CEILING_DB = -1.0
"""Largest true peak; a lossy codec needs that much headroom (EBU R 128 s1)."""
RELEASE_DB_PER_S = 60.0
"""Release speed of the limiter."""
_ATTACK_S = 0.005
_TAPS = 16  # of the interpolation on either side; detects peaks up to 20 kHz to 0.05 dB
_SILENT_LUFS = -70.0  # the absolute gate: `ebur128` reports it for quieter sound
_AAC_RATES = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000)
_BITS = {"aac": 128_000, "libopus": 96_000}
"""Bits per second and channel, by encoder."""


@dataclass(frozen=True)
class Loudness:
    """Loudness of a sound.

    Attributes:
        lufs: gated integrated loudness; None where no 0.4 s are above -70 LUFS.
        peak_db: true peak, in dB of full scale; -200 for silence.
    """

    lufs: float | None
    peak_db: float


@dataclass(frozen=True)
class Mastering:
    """Gain of a sound, and whether peaks above the ceiling are limited."""

    gain_db: float = 0.0
    limited: bool = False


def measure(samples: Samples, rate: int) -> Loudness:
    """Return the loudness of sound float32 [N, c], of one or two channels, in constant memory."""
    graph = av.filter.Graph()
    layout = "mono" if samples.shape[1] == 1 else "stereo"
    source = graph.add_abuffer(format="flt", sample_rate=rate, layout=layout,
                               time_base=Fraction(1, rate))
    meter = graph.add("ebur128", "metadata=1:framelog=quiet")
    sink = graph.add("abuffersink")
    source.link_to(meter)
    meter.link_to(sink)
    graph.configure()
    loudness, peak = _SILENT_LUFS, 0.0
    for start in range(0, len(samples), rate):
        block = window(samples, start, start + rate, rate)
        peak = max(peak, float(_peaks(samples, start, start + len(block)).max()))
        graph.push(sound_frame(block, rate, start))
        loudness = _drained(graph, loudness)
    graph.push(None)
    loudness = _drained(graph, loudness)
    peak_db = 20 * math.log10(max(peak, 1e-10))
    return Loudness(loudness if loudness > _SILENT_LUFS else None, peak_db)


def _drained(graph: av.filter.Graph, loudness: float) -> float:
    """Return the integrated loudness after the last frame that is ready."""
    while True:
        try:
            frame = graph.pull()
        except (BlockingIOError, EOFError):
            return loudness
        loudness = float(frame.metadata.get("lavfi.r128.I", loudness))


def master(loudness: Loudness, target_lufs: float = TARGET_LUFS) -> Mastering:
    """Return the mastering that brings a sound to the target, with peaks below the ceiling."""
    gain = 0.0 if loudness.lufs is None else min(target_lufs - loudness.lufs, MAX_GAIN_DB)
    return Mastering(round(gain, 3), loudness.peak_db + gain > CEILING_DB)


def mastered(samples: Samples, rate: int, made: Mastering, num_samples: int) -> Iterator[Samples]:
    """Yield `num_samples` of a mastered sound in blocks [n, c] of a second, padded with silence.

    The limiter looks 5 ms ahead: the gain that each true peak needs is held over the look-ahead,
    released at 60 dB/s and averaged over the look-ahead once more, so that it is low enough when
    the peak comes (Giannoulis et al. 2012, section 3, with an exact instead of a recursive attack).
    """
    gain = 10 ** (made.gain_db / 20)
    ahead = 1 << max(1, round(math.log2(_ATTACK_S * rate)))
    slope = RELEASE_DB_PER_S / rate
    released = np.zeros(0)  # dB, of the samples before the block
    for start in range(0, num_samples, rate):
        stop = min(start + rate, num_samples)
        block = gain * window(samples, start, stop, stop - start).astype(np.float64)
        if made.limited:
            peaks = gain * _peaks(samples, start, stop + ahead - 1)
            needed = np.minimum(0, CEILING_DB - 20 * np.log10(np.maximum(peaks, 1e-10)))
            if start == 0:
                released = np.minimum.accumulate(needed[: ahead - 1])
            held, width = needed, 1
            while width < ahead:  # least of 2, 4, 8, ... samples from here on
                held, width = np.minimum(held[:-width], held[width:]), 2 * width
            ramp = slope * np.arange(1, len(held) + 1)
            lowest = np.minimum.accumulate(np.append(released[-1], held - ramp))[1:]
            released = np.append(released, np.minimum(0, lowest + ramp))
            sums = np.cumsum(np.append(0.0, released))
            down = (sums[ahead:] - sums[:-ahead]) / ahead
            released = released[-(ahead - 1) :]
            block *= 10 ** (down[:, None] / 20)
        yield block.astype(np.float32)


def hold_peaks(samples: Samples, rate: int) -> None:
    """Limit a sound [N, c] that exceeds full scale, in place; leave any other unchanged."""
    peak = max(samples.max(initial=0.0), -samples.min(initial=0.0))
    if not 1 < peak < math.inf:
        return
    position, before = 0, None
    for block in mastered(samples, rate, Mastering(limited=True), len(samples)):
        if before is not None:  # the limiter needs earlier samples no longer
            samples[position : position + len(before)] = before
            position += len(before)
        before = block
    samples[position:] = before


def window(samples: Samples, start: int, stop: int, at_least: int) -> Samples:
    """Return samples [start, stop) as [n, c], with 0 for non-finite ones.

    Silence pads the front always, the end up to `at_least` samples.
    """
    inside = np.asarray(samples[max(0, start) : max(0, min(stop, len(samples)))], np.float32)
    inside = np.nan_to_num(inside, nan=0.0, posinf=0.0, neginf=0.0)
    before = max(0, -start)
    after = max(0, min(stop - start, at_least) - before - len(inside))
    return np.pad(inside, ((before, after), (0, 0))) if before or after else inside


def _peaks(samples: Samples, start: int, stop: int) -> Signal:
    """Return the largest magnitude of each sample in [start, stop) and three values after it, [n].

    All channels count; the values between samples are interpolated by a windowed sinc.
    """
    count = stop - start
    span = window(samples, start - _TAPS + 1, stop + _TAPS, count + 2 * _TAPS - 1)
    highest = np.zeros(count)
    for channel in span.T.astype(np.float64):
        np.maximum(highest, np.abs(channel[_TAPS - 1 : _TAPS - 1 + count]), out=highest)
        if np.abs(channel).max(initial=0) == 0:
            continue
        for taps in _phases():
            between = np.convolve(channel, taps, "valid")[:count]
            np.maximum(highest, np.abs(between), out=highest)
    return highest


@lru_cache(maxsize=1)
def _phases() -> list[Signal]:
    """Return taps for the values 1/4, 2/4 and 3/4 of a sample after the middle one."""
    places = np.arange(-_TAPS + 1, _TAPS + 1)
    rows = []
    for quarter in (0.25, 0.5, 0.75):
        offset = quarter - places
        taps = np.sinc(offset) * np.i0(8.0 * np.sqrt(np.maximum(0, 1 - (offset / _TAPS) ** 2)))
        rows.append((taps / taps.sum())[::-1])
    return rows


class SoundTrack:
    """A container's sound track, exactly as long as its picture: cut, or padded with silence.

    The clip of `info` has sound; `codec` is libav's name of the encoder.
    """

    def __init__(self, info: ClipInfo, codec: str) -> None:
        assert info.sound is not None
        self.samples: Samples = info.sound
        self.rate, self.codec = info.sound_rate, codec
        known = (48_000,) if codec == "libopus" else _AAC_RATES
        self.target = self.rate if self.rate in known else 48_000
        self._bits = _BITS[codec] * int(self.samples.shape[1])
        self.seconds = info.num_frames / info.fps
        self._made, self._facts = Mastering(), {}
        if info.loudness is not None:
            found = measure(self.samples, self.rate)
            self._made = master(found, info.loudness)
            self._facts = {
                "measured_lufs": found.lufs, "measured_peak_db": round(found.peak_db, 3),
                "target_lufs": info.loudness, "ceiling_db": CEILING_DB, **asdict(self._made),
            }

    def facts(self) -> dict[str, Any]:
        """Return the encoder's settings and the mastering, for the recipe."""
        return {"codec": self.codec, "rate": self.target, "channels": self.samples.shape[1],
                "bits_per_s": self._bits, **self._facts}

    def begin(self, container: OutputContainer) -> None:
        """Add the stream to a container, before anything is muxed."""
        layout = "mono" if self.samples.shape[1] == 1 else "stereo"
        stream = container.add_stream(self.codec, rate=self.target, layout=layout)
        self._container, self._stream = container, cast("AudioStream", stream)
        self._stream.bit_rate = self._bits
        own = mastered(self.samples, self.rate, self._made, round(self.seconds * self.rate))
        self._blocks = resampled(own, self.samples.shape[1], self.rate, self.target)
        self._position, self._length = 0, round(self.seconds * self.target)

    def advance(self, seconds: float) -> None:
        """Encode the sound before `seconds`."""
        while self._position < min(self._length, seconds * self.target):
            block = next(self._blocks, None)
            if block is None:
                return
            block = block[: self._length - self._position]
            frame = sound_frame(block, self.target, self._position)
            self._position += len(block)
            self._container.mux(self._stream.encode(frame))

    def finish(self) -> None:
        """Encode the remaining sound."""
        self.advance(float("inf"))
        self._container.mux(self._stream.encode(None))
