"""Sound brought to a clip's length, and speech laid over it.

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
"""Fade-out of a sound that is cut, a quarter of it at most."""
SEAM_S = 0.005
"""Fade where a sound meets silence or itself, against a click."""
SLACK_S = 0.05
"""Difference of lengths that counts as none: codecs pad what they encode."""
DUCK_DB, DUCK_DOWN_S, DUCK_UP_S = 12.0, 0.15, 0.4
"""Drop of a bed under speech, over a time before it begins and after it ends."""
MIX_LUFS = -23.0
"""Level of mixed sounds (EBU R 128's); no peak of a sum comes near full scale there."""
TELEPHONE_RATE = 16_000
"""A lower rate holds nothing above 8 kHz, which people hear."""
_STEP = 1 << 18


def fit_sound(
    path: str | os.PathLike[str], num_samples: int, *, loop: bool = False,
    repeating: str = "--audio-loop",
) -> tuple[Samples, list[str]]:
    """Read a file's sound at `RATE` to the length of a clip, and no further.

    A longer one is cut and faded out over `FADE_S`; a shorter one is repeated with `loop`, else
    followed by silence. Notes name the option for that, `repeating`.

    Returns:
        (float32 [num_samples, c] of one or two channels, notes for the user).

    Raises:
        InputError: no sound in it, cut off, or samples that are no numbers.
    """
    reader = SoundReader(path, RATE)
    samples, slack = room(num_samples, reader.channels), round(SLACK_S * RATE)
    total = 0
    for block in reader:
        bad = len(block) - np.count_nonzero(np.isfinite(block).all(axis=1))
        if bad:
            raise InputError(f"sound {path} holds samples that are no numbers, the first near "
                             f"{total / RATE:.2f} s; save it again without them")
        part = block[: max(0, num_samples - total)]
        samples[total : total + len(part)] = part
        total += len(block)
        if total > num_samples + slack:
            break
    else:
        if total == 0:
            raise InputError(f"sound {path} is empty: it has no samples; give another file")
        if reader.lacks(total):
            raise InputError(f"sound {path} is cut off: {total / RATE:.2f} s of the "
                             f"{reader.seconds:.2f} s that it tells of are there; copy it again")
    notes = []
    if reader.source_rate < TELEPHONE_RATE:
        notes.append(f"{path} has {reader.source_rate} samples a second, which sounds dull")
    seconds = num_samples / RATE
    if total > num_samples + slack:
        fade(samples, num_samples - min(round(FADE_S * RATE), num_samples // 4), num_samples)
        notes.append(f"{path} is longer than the clip; its first {seconds:g} s are heard")
    elif total < num_samples - slack:
        fade(samples, total - min(round(SEAM_S * RATE), total // 4), total)
        if loop:
            _repeat(samples, total)
        else:
            notes.append(f"{path} lasts {total / RATE:.2f} s of the clip's {seconds:g} s; silence "
                         f"follows, {repeating} repeats it")
    return samples, notes


def _repeat(samples: Samples, period: int) -> None:
    """Fill samples with their first `period`, which begins softly from the second time on."""
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
    """Let samples [N, c] go to zero from `start` to `stop`, in place, along half a cosine."""
    samples[start:stop] *= _ramp(stop - start)[:, None]


def rise(samples: Samples, start: int, stop: int) -> None:
    """The inverse of `fade`: samples [N, c] come up from zero."""
    samples[start:stop] *= _ramp(stop - start)[::-1, None]


def bring_forward(samples: Samples, count: int) -> None:
    """Let samples [N, c] begin `count` earlier, or later below 0, in place.

    The gap at one end, at most half of all, is filled by its neighbours, mirrored.
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
    """Bring samples [N, c] of another rate to `RATE` and [num_samples, c].

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
    """Lay speech [N, 1] over the middle of a bed [N, c] that goes down under it, both at `RATE`.

    Both are brought to `MIX_LUFS` first, as far as the mastering may raise them; no bed is silence.
    `spans` are (start, end) of speech, in seconds and in order.
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
    """Return times in seconds and levels in dB between which a bed's level is linear.

    It stays down between two spans that are too close for it to come up and go down again.
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
