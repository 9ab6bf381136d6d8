"""Loudness and peaks: measured as FFmpeg measures them, brought to the target."""

import re
import subprocess

import imageio_ffmpeg
import numpy as np
import pytest

from vidgen.media.mastering import (
    CEILING_DB,
    MAX_GAIN_DB,
    TARGET_LUFS,
    Mastering,
    hold_peaks,
    master,
    mastered,
    measure,
)

RATE = 48_000


def faded(samples):
    """Without the clicks of a sudden start and end, which each interpolation draws otherwise."""
    ramp = np.minimum(1, np.arange(len(samples)) / 2000)
    return (samples * (ramp * ramp[::-1])[:, None]).astype(np.float32)


def tone(frequency, amplitude, seconds=3.0, channels=2, rate=RATE, phase=0.0):
    t = np.arange(round(seconds * rate)) / rate
    return faded(np.stack([amplitude * np.sin(2 * np.pi * frequency * t + phase)] * channels, 1))


def noise(amplitude, seconds=3.0, channels=2, seed=0):
    rng = np.random.default_rng(seed)
    return faded(amplitude * rng.uniform(-1, 1, (round(seconds * RATE), channels)))


SIGNALS = {
    "a tone at -23 LUFS, as in EBU Tech 3341": (tone(1000, 10 ** (-23 / 20)), RATE),
    "bass": (tone(40, 0.7), RATE),
    "peaks between the samples": (tone(12_000, 0.9, phase=np.pi / 4), RATE),
    "mono noise": (noise(0.2, channels=1), RATE),
    "a quiet half that the gate leaves out": (
        np.concatenate([noise(0.002), noise(0.5)]), RATE
    ),
    "one side alone": (noise(0.3) * np.float32([1, 0]), RATE),
    "44.1 kHz": (tone(440, 0.3, rate=44_100), 44_100),
}


def by_ffmpeg(samples, rate):
    """(LUFS, dB of full scale) as the filter ebur128 of FFmpeg's program tells them."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-f", "f32le", "-ar", str(rate),
               "-ac", str(samples.shape[1]), "-i", "-", "-af", "ebur128=peak=true", "-f", "null"]
    made = subprocess.run([*command, "-"], input=samples.tobytes(), capture_output=True, check=True)
    summary = made.stderr.decode().rpartition("Summary")[2]
    return tuple(float(re.search(rf"{name}:\s+(\S+)", summary)[1]) for name in ("I", "Peak"))


@pytest.mark.parametrize("name", SIGNALS)
def test_measures_are_those_of_ffmpeg(name):
    samples, rate = SIGNALS[name]
    loudness, peak = by_ffmpeg(samples, rate)
    found = measure(samples, rate)
    assert found.lufs == pytest.approx(loudness, abs=0.1)
    assert found.peak_db == pytest.approx(peak, abs=0.2)


def test_peaks_between_samples_are_found():
    between = tone(12_000, 0.9, phase=np.pi / 4)  # whose samples reach 0.64
    assert np.abs(between).max() < 0.65
    assert measure(between, RATE).peak_db == pytest.approx(20 * np.log10(0.9), abs=0.05)


def made(samples, rate=RATE):
    mastering = master(measure(samples, rate))
    blocks = list(mastered(samples, rate, mastering, len(samples)))
    return np.concatenate(blocks), mastering


@pytest.mark.parametrize("name", SIGNALS)
def test_sounds_come_to_the_target(name):
    samples, rate = SIGNALS[name]
    result, mastering = made(samples, rate)
    assert result.shape == samples.shape
    found = measure(result, rate)
    assert found.lufs == pytest.approx(TARGET_LUFS, abs=0.1)
    assert found.peak_db <= CEILING_DB + 0.01
    assert abs(mastering.gain_db) <= 24


def test_a_quiet_sound_is_raised_by_no_more_than_12_db():
    result, mastering = made(noise(0.005))
    assert mastering.gain_db == MAX_GAIN_DB
    assert np.allclose(result, noise(0.005) * 10 ** (12 / 20), atol=1e-6)


def test_silence_stays_silent():
    result, mastering = made(np.zeros((RATE, 1), np.float32))
    assert mastering == Mastering(0.0, False)
    assert not result.any()


@pytest.mark.parametrize("first", [0, 300, RATE - 1])
def test_the_limiter_holds_every_peak_and_moves_none(first):
    samples = noise(0.02, seconds=2.5)
    places = np.arange(first, len(samples), 9_600)
    samples[places] = 0.99
    limited = np.concatenate(list(mastered(samples, RATE, Mastering(6.0, True), len(samples))))
    assert measure(limited, RATE).peak_db <= CEILING_DB + 0.01
    assert (np.abs(limited[places]).argmax(axis=1) >= 0).all()
    assert np.abs(limited[places]).min() > 0.85  # down to the ceiling, no further
    far = np.abs(np.arange(len(samples))[:, None] - places).min(axis=1) > 6_000
    assert np.allclose(limited[far], samples[far] * 10 ** (6 / 20), atol=1e-6)


def test_where_blocks_end_does_not_matter():
    samples = noise(0.9, seconds=3, channels=1)
    whole = np.concatenate(list(mastered(samples, RATE, Mastering(9.0, True), len(samples))))
    late = np.concatenate([np.zeros((777, 1), np.float32), samples])
    shifted = np.concatenate(list(mastered(late, RATE, Mastering(9.0, True), len(late))))
    assert np.allclose(shifted[777 + 300 :], whole[300:], atol=1e-6)


def test_what_is_no_number_is_silent():
    samples = noise(0.3)
    samples[1000:1010] = np.nan, np.inf
    result, _ = made(samples)
    assert np.isfinite(result).all()
    assert not result[1000:1010].any()


def test_what_goes_beyond_full_scale_is_limited_in_place_and_nothing_else_changes():
    loud = tone(300, 0.4, channels=1)
    loud[60_000:60_200] *= 5  # an impact that is twice as high as can be
    for sound in (loud, loud[:50_000], np.full_like(loud, np.nan), loud[:0]):
        held = sound.copy()
        hold_peaks(held, RATE)
        if sound is not loud:
            assert np.array_equal(held, sound, equal_nan=True)
            continue
        assert np.array_equal(held, np.concatenate([*mastered(
            sound, RATE, Mastering(limited=True), len(sound))]))
        assert 0.85 < np.abs(held).max() < 0.9
        assert np.array_equal(held[:50_000], sound[:50_000])
        assert np.corrcoef(held[60_000:60_200, 0], sound[60_000:60_200, 0])[0, 1] > 0.99
