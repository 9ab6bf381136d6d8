"""Sound fitted to a clip's length, and speech mixed over it.

Axes: N samples, c channels.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from vidgen.core.errors import InputError
from vidgen.media.mastering import master, measure
from vidgen.media.sound import RATE, SoundReader, gather, resampled, room
from vidgen.media.types import Samples

FADE_S = 0.25
"""Fade-out of a sound that is cut, at most a quarter of its length."""
SEAM_S = 0.005
"""Fade where a sound borders on silence or repeats, against a click."""
SLACK_S = 0.05
"""Difference of lengths to ignore, since codecs pad."""
DUCK_DB, DUCK_DOWN_S, DUCK_UP_S = 12.0, 0.15, 0.4
"""Ducking of background sound under speech: depth, time before a start, time after an end."""
MIX_LUFS = -23.0
"""Level of mixed sounds (EBU R 128), at which no peak of a sum comes near full scale."""
TELEPHONE_RATE = 16_000
"""Lowest sample rate without a note; a lower one loses everything above 8 kHz."""
_STEP = 1 << 18


def fit_sound(
    path: str | os.PathLike[str], num_samples: int, *, loop: bool = False,
    repeating: str = "--audio-loop",
) -> tuple[Samples, list[str]]:
    """Read a file's sound at `RATE`, fitted to the length of a clip.

    Longer sound is cut and faded out over `FADE_S`; shorter sound is repeated with `loop`, else
    followed by silence. A note then names the option `repeating`.

    Returns:
        (float32 [num_samples, c] of one or two channels, notes for the user).

    Raises:
        InputError: no sound, cut off, or non-finite samples.
    """
    reader = SoundReader(path, RATE)
    samples, slack = room(num_samples, reader.channels), round(SLACK_S * RATE)
    total = 0
    for block in reader:
        bad = len(block) - np.count_nonzero(np.isfinite(block).all(axis=1))
        if bad:
            raise InputError(f"sound {path} has non-finite samples (NaN or infinity), the first "
                             f"near {total / RATE:.2f} s; save it again without them")
        part = block[: max(0, num_samples - total)]
        samples[total : total + len(part)] = part
        total += len(block)
        if total > num_samples + slack:
            break
    else:
        if total == 0:
            raise InputError(f"sound {path} is empty: it has no samples; give another file")
        if reader.lacks(total):
            raise InputError(f"sound {path} is cut off: it has {total / RATE:.2f} s of the "
                             f"{reader.seconds:.2f} s that its header states; copy it again")
    notes = []
    if reader.source_rate < TELEPHONE_RATE:
        notes.append(f"{path} has a sample rate of {reader.source_rate} Hz, which sounds dull")
    seconds = num_samples / RATE
    if total > num_samples + slack:
        fade(samples, num_samples - min(round(FADE_S * RATE), num_samples // 4), num_samples)
        notes.append(f"{path} is longer than the clip; only its first {seconds:g} s are used")
    elif total < num_samples - slack:
        fade(samples, total - min(round(SEAM_S * RATE), total // 4), total)
        if loop:
            _repeat(samples, total)
        else:
            notes.append(f"{path} lasts {total / RATE:.2f} s of the clip's {seconds:g} s; silence "
                         f"follows; {repeating} repeats it")
    return samples, notes


def _repeat(samples: Samples, period: int) -> None:
    """Fill samples with repeats of their first `period`, which fade in and out."""
    length = min(round(SEAM_S * RATE), period // 4)
    ramp = _ramp(length)[::-1, None]
    for start in range(period, len(samples), period):
        stop = min(start + period, len(samples))
        samples[start:stop] = samples[: stop - start]
        head = samples[start : start + length]
        head *= ramp[: len(head)]
        if stop == len(samples):
            fade(samples, max(start, stop - length), stop)


def fade(samples: Samples, start: int, stop: int) -> None:
    """Fade samples [N, c] out from `start` to `stop`, in place, along half a cosine."""
    samples[start:stop] *= _ramp(stop - start)[:, None]


def rise(samples: Samples, start: int, stop: int) -> None:
    """Fade samples [N, c] in from `start` to `stop`, in place, along half a cosine."""
    samples[start:stop] *= _ramp(stop - start)[::-1, None]


def bring_forward(samples: Samples, count: int) -> None:
    """Shift samples [N, c] `count` earlier, or later if negative, in place.

    The gap at one end, at most half of the samples, is filled with its neighbours, mirrored.
    """
    view, count = samples if count > 0 else samples[::-1], min(abs(count), len(samples) // 2)
    if not count:
        return
    left = len(view) - count
    for start in range(0, left, _STEP):
        stop = min(start + _STEP, left)
        view[start:stop] = view[start + count : stop + count]
    view[left:] = view[left - count : left][::-1]


def _ramp(length: int) -> Samples:
    angles = np.pi * (np.arange(length) + 0.5) / max(1, length)
    return (0.5 + 0.5 * np.cos(angles)).astype(np.float32)


def at_length(samples: Samples, rate: int, num_samples: int, *, loop: bool = False) -> Samples:
    """Return samples [N, c] resampled to `RATE` and fitted to [num_samples, c].

    Longer ones are cut; shorter ones fade over `SEAM_S` and are repeated with `loop`, else followed
    by silence.
    """
    channels = samples.shape[1]
    if rate != RATE:
        parts = (samples[start : start + _STEP] for start in range(0, len(samples), _STEP))
        samples = gather(resampled(parts, channels, rate, RATE), channels)
    made = room(num_samples, channels)
    count = min(num_samples, len(samples))
    made[:count] = samples[:count]
    if count < num_samples - round(SLACK_S * RATE):
        fade(made, max(0, count - round(SEAM_S * RATE)), count)
        if loop and count:
            _repeat(made, count)
    return made


def lay_over(bed: Samples | None, speech: Samples, spans: Sequence[tuple[float, float]]) -> Samples:
    """Mix speech [N, 1] over the centre of background sound [N, c], ducked, both at `RATE`.

    Both are first brought to `MIX_LUFS`, within the mastering's largest gain. Without a `bed` the
    background is silence. `spans` are (start, end) of speech, in seconds and in order.
    """
    voice_gain = 10 ** (master(measure(speech, RATE), MIX_LUFS).gain_db / 20)
    mixed = room(len(speech), 1 if bed is None else bed.shape[1])
    bed_gain = 1.0 if bed is None else 10 ** (master(measure(bed, RATE), MIX_LUFS).gain_db / 20)
    times, levels = duck_points(spans)
    for start in range(0, len(speech), _STEP):
        stop = min(start + _STEP, len(speech))
        block = voice_gain * speech[start:stop]
        if bed is not None:
            down = np.interp(np.arange(start, stop) / RATE, times, levels)
            gain = bed_gain * 10 ** (down / 20)
            block = block + bed[start:stop] * gain[:, None].astype(np.float32)
        mixed[start:stop] = block
    return mixed


def duck_points(spans: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Return times in seconds and gains in dB of the background, linear in between.

    The gain stays low between two spans that are too close for a release and an attack.
    """
    joined: list[list[float]] = []
    for start, end in spans:
        if joined and start - joined[-1][1] < DUCK_DOWN_S + DUCK_UP_S:
            joined[-1][1] = end
        else:
            joined.append([start, end])
    times, levels = [-1e9], [0.0]
    for start, end in joined:
        times += [start - DUCK_DOWN_S, start, end, end + DUCK_UP_S]
        levels += [0.0, -DUCK_DB, -DUCK_DB, 0.0]
    assert all(a <= b for a, b in pairwise(times))
    return times, levels
