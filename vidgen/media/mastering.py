"""Loudness: measured, brought to one level, peaks held below full scale; block by block.

Sources: ITU-R BS.1770-4 (gated loudness in LUFS, annex 2: true peaks by oversampling four times);
EBU Tech 3343. libavfilter's `ebur128` measures the loudness; the limiter is ours, since FFmpeg's
`alimiter` sees samples, not what lies between them.

Axes: N samples, n samples of a block, c channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any, TypeAlias

import av
import numpy as np

from vidgen.media.sound import sound_frame
from vidgen.media.types import Samples

Signal: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]

TARGET_LUFS = -16.0
"""Level of a finished clip: that of the web's players and podcasts (AES TD1008)."""
MAX_GAIN_DB = 12.0
"""How much a quiet sound is raised at most; more would raise its noise."""
CEILING_DB = -1.0
"""True peak; a lossy codec needs that much room (EBU R 128 s1)."""
RELEASE_DB_PER_S = 60.0
"""How fast the limiter lets go."""
_ATTACK_S = 0.005
_TAPS = 16  # of the interpolation on either side; finds peaks up to 20 kHz to 0.05 dB
_SILENT_LUFS = -70.0  # the absolute gate: `ebur128` tells it where nothing is louder


@dataclass(frozen=True)
class Loudness:
    """How loud a sound is.

    Attributes:
        lufs: gated integrated loudness; None where no 0.4 s are above -70 LUFS.
        peak_db: true peak, in dB of full scale; -200 for silence.
    """

    lufs: float | None
    peak_db: float


@dataclass(frozen=True)
class Mastering:
    """What is done to a sound while it is muxed.

    Attributes:
        gain_db: added to all of it.
        limited: whether peaks would exceed the ceiling and are held.
    """

    gain_db: float = 0.0
    limited: bool = False


def measure(samples: Samples, rate: int) -> Loudness:
    """Loudness of float32 [N, c], of one or two channels, at constant memory."""
    graph = av.filter.Graph()
    layout = "mono" if samples.shape[1] == 1 else "stereo"
    source = graph.add_abuffer(
        format="flt", sample_rate=rate, layout=layout, time_base=Fraction(1, rate)
    )
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
    """The integrated loudness behind the last frame that is ready."""
    while True:
        try:
            frame = graph.pull()
        except (BlockingIOError, EOFError):
            return loudness
        loudness = float(frame.metadata.get("lavfi.r128.I", loudness))


def master(loudness: Loudness, target_lufs: float = TARGET_LUFS) -> Mastering:
    """What brings a sound to the target, and its peaks below the ceiling."""
    gain = 0.0 if loudness.lufs is None else min(target_lufs - loudness.lufs, MAX_GAIN_DB)
    return Mastering(round(gain, 3), loudness.peak_db + gain > CEILING_DB)


def mastered(samples: Samples, rate: int, made: Mastering, num_samples: int) -> Iterator[Samples]:
    """`num_samples` of a sound in blocks [n, c] of a second; silence behind its end.

    The limiter looks 5 ms ahead: the gain that each true peak needs is held over the look-ahead,
    let go at 60 dB/s and averaged over the look-ahead once more, so that it is down when the peak
    comes (Giannoulis et al. 2012, section 3, with an exact instead of a recursive attack).
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
    """Limit a sound [N, c] that goes beyond full scale, in place; any other stays as it is."""
    peak = max(samples.max(initial=0.0), -samples.min(initial=0.0))
    if not 1 < peak < math.inf:
        return
    position, before = 0, None
    for block in mastered(samples, rate, Mastering(limited=True), len(samples)):
        if before is not None:  # what is written is no longer looked at
            samples[position : position + len(before)] = before
            position += len(before)
        before = block
    samples[position:] = before


def window(samples: Samples, start: int, stop: int, at_least: int) -> Samples:
    """Samples [start, stop) as [n, c], those that are no numbers silent.

    Beyond the ends lies silence: in front always, behind up to `at_least` samples.
    """
    there = np.asarray(samples[max(0, start) : max(0, min(stop, len(samples)))], np.float32)
    there = np.nan_to_num(there, nan=0.0, posinf=0.0, neginf=0.0)
    before = max(0, -start)
    after = max(0, min(stop - start, at_least) - before - len(there))
    return np.pad(there, ((before, after), (0, 0))) if before or after else there


def _peaks(samples: Samples, start: int, stop: int) -> Signal:
    """The highest of each sample in [start, stop) and of three values behind it, [n].

    Of all channels together; what lies between samples is interpolated by a windowed sinc.
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
    """Taps that give the value 1/4, 2/4 and 3/4 of a sample behind the middle one."""
    places = np.arange(-_TAPS + 1, _TAPS + 1)
    rows = []
    for quarter in (0.25, 0.5, 0.75):
        offset = quarter - places
        taps = np.sinc(offset) * np.i0(8.0 * np.sqrt(np.maximum(0, 1 - (offset / _TAPS) ** 2)))
        rows.append((taps / taps.sum())[::-1])
    return rows
