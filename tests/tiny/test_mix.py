"""Sound brought to a clip's length, speech over a bed, and files that can't be used."""

from __future__ import annotations

import wave
from fractions import Fraction

import numpy as np
import pytest

from tests.sounds import RATE, save, tone
from vidgen.core.errors import InputError
from vidgen.media import mix
from vidgen.media.mastering import measure
from vidgen.media.mix import (
    DUCK_DB,
    DUCK_DOWN_S,
    DUCK_UP_S,
    FADE_S,
    MIX_LUFS,
    at_length,
    bring_forward,
    duck_points,
    fit_sound,
    lay_over,
)
from vidgen.media.sound import SoundReader
from vidgen.media.types import ClipInfo
from vidgen.media.write import write_clip


def level(samples, start_s, end_s):
    part = samples[round(start_s * RATE) : round(end_s * RATE)].astype(float)
    return 10 * np.log10(max(np.mean(part**2), 1e-20))


def test_a_longer_file_is_cut_and_faded_out(tmp_path):
    samples, notes = fit_sound(save(tmp_path / "a.wav", tone(5)), 2 * RATE)
    assert samples.shape == (2 * RATE, 1)
    assert np.allclose(samples[: round((2 - FADE_S) * RATE)], tone(2 - FADE_S), atol=1e-6)
    assert level(samples, 2 - FADE_S / 4, 2) < level(samples, 0, 1) - 10
    assert abs(samples[-1, 0]) < 1e-4
    assert "longer than the clip; only its first 2 s are used" in notes[0]


def test_a_shorter_file_is_followed_by_silence(tmp_path):
    samples, notes = fit_sound(save(tmp_path / "a.wav", tone(1.5, 441)), 4 * RATE)
    assert not samples[round(1.5 * RATE) :].any()
    assert np.allclose(samples[:70_000], tone(1.5, 441)[:70_000], atol=1e-6)
    assert np.abs(np.diff(samples[:, 0])).max() < 0.03  # no click at its end
    assert "lasts 1.50 s of the clip's 4 s" in notes[0]
    assert "--audio-loop" in notes[0]


def test_a_shorter_file_is_repeated_where_that_is_wanted(tmp_path):
    own = tone(1.5, 441.3)
    samples, notes = fit_sound(save(tmp_path / "a.wav", own), 4 * RATE, loop=True)
    assert notes == []
    for start in (0, 72_000, 144_000):
        inner = samples[start + 500 : start + 47_000]
        assert np.allclose(inner, own[500:47_000], atol=1e-6)
    assert np.abs(np.diff(samples[:, 0])).max() < 0.03
    assert abs(samples[-1, 0]) < 1e-3


def test_a_file_about_as_long_as_the_clip_is_left_alone(tmp_path):
    path = save(tmp_path / "a.m4a", tone(2.0), codec="aac")
    for seconds in (1.98, 2.02):
        samples, notes = fit_sound(path, round(seconds * RATE), loop=True)
        assert notes == []
        assert level(samples, 1.8, 1.95) == pytest.approx(level(samples, 1, 1.5), abs=0.5)


@pytest.mark.parametrize("step", [3, 7, 1000])
def test_sound_is_moved_and_mirrored_where_that_leaves_nothing(step, monkeypatch):
    monkeypatch.setattr(mix, "_STEP", step)
    own = np.arange(20, dtype=np.float32).repeat(2).reshape(20, 2)

    def moved(count):
        samples = own.copy()
        bring_forward(samples, count)
        assert np.array_equal(samples[:, 0], samples[:, 1])
        return samples[:, 0].astype(int).tolist()

    assert moved(0) == [*range(20)]
    assert moved(3) == [*range(3, 20), 19, 18, 17]
    assert moved(-3) == [2, 1, 0, *range(17)]
    assert moved(50) == [*range(10, 20), *range(19, 9, -1)]  # half of all at most
    bring_forward(own[:1], 5)
    assert own[0, 0] == 0


@pytest.mark.parametrize(("name", "codec", "rate"), [
    ("a.wav", "pcm_s16le", 44_100), ("a.flac", "flac", 96_000), ("a.mp3", "libmp3lame", 22_050),
    ("a.ogg", "libopus", 48_000), ("a.opus", "libopus", 48_000), ("a.m4a", "aac", 32_000),
])  # fmt: skip
def test_files_of_all_kinds_sound_alike(tmp_path, name, codec, rate):
    path = save(tmp_path / name, tone(2.0, rate=rate, channels=2), rate, codec)
    samples, notes = fit_sound(path, 2 * RATE)
    assert samples.shape == (2 * RATE, 2)
    assert notes == []
    spectrum = np.abs(np.fft.rfft(samples[RATE // 2 : -RATE // 2, 0]))
    assert spectrum.argmax() == 440
    assert level(samples, 0.5, 1.5) == pytest.approx(10 * np.log10(0.045), abs=0.5)


def test_eight_channels_become_two_by_their_places(tmp_path):
    names = ("FL", "FR", "FC", "LFE", "BL", "BR", "SL", "SR")
    heard = {}
    for number, name in enumerate(names):
        samples = np.zeros((RATE, 8), np.float32)
        samples[:, number] = tone(1.0)[:, 0]
        mixed, _ = fit_sound(save(tmp_path / f"{name}.wav", samples), RATE)
        heard[name] = np.sqrt(np.mean(mixed.astype(float) ** 2, axis=0)) / 0.2121
    for name in ("FL", "BL", "SL"):
        assert heard[name][0] > 0.2
        assert heard[name][1] < 0.01
    for name in ("FR", "BR", "SR"):
        assert heard[name][1] > 0.2
        assert heard[name][0] < 0.01
    assert heard["FC"][0] == pytest.approx(heard["FC"][1])
    assert heard["FC"][0] / heard["FL"][0] == pytest.approx(np.sqrt(0.5), rel=0.01)
    assert heard["LFE"].max() < 0.01


def test_telephone_sound_is_taken_with_a_word(tmp_path):
    path = save(tmp_path / "a.wav", tone(1, rate=8_000), 8_000, "pcm_s16le")
    samples, notes = fit_sound(path, RATE)
    assert np.abs(np.fft.rfft(samples[:, 0])).argmax() == 440
    assert "8000 Hz" in notes[0]


def test_of_three_hours_only_the_beginning_is_read(tmp_path, monkeypatch):
    path = save(tmp_path / "a.flac", np.zeros((3 * 3600 * 8_000, 1), np.float32), 8_000, "flac")
    read = []
    own = SoundReader.__iter__

    def counted(reader):
        for block in own(reader):
            read.append(len(block))
            yield block

    monkeypatch.setattr(SoundReader, "__iter__", counted)
    samples, notes = fit_sound(path, 2 * RATE)
    assert samples.shape == (2 * RATE, 1)
    assert sum(read) < 4 * RATE
    assert "longer than the clip" in notes[-1]


def bad_file(folder, kind):
    path = folder / "a.wav"
    if kind == "cut off":
        save(path, tone(2.0))
        path.write_bytes(path.read_bytes()[: RATE * 4])
    elif kind == "cut off in a packet":
        path = save(folder / "a.m4a", tone(2.0), codec="aac")
        path.write_bytes(path.read_bytes()[:5_000])
    elif kind == "empty":
        with wave.open(str(path), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(RATE)
    elif kind == "no bytes":
        path.touch()
    elif kind == "no numbers":
        samples = tone(2.0)
        samples[RATE] = np.nan
        save(path, samples)
    elif kind == "text":
        path = folder / "a.txt"
        path.write_text("la la la\n" * 100)
    elif kind == "text called sound":
        path.write_text("la la la\n" * 100)
    elif kind == "a video without sound":
        path = folder / "a.mp4"
        frames = np.zeros((3, 48, 64, 3), np.uint8)
        write_clip(path, [frames], ClipInfo(Fraction(12), (64, 48), 3))
    elif kind == "a folder":
        path = folder
    return path


@pytest.mark.parametrize(("kind", "message"), [
    ("missing", "does not exist"),
    ("a folder", "is a folder"),
    ("cut off", r"is cut off: it has 1\.00 s of the 2\.00 s"),
    ("cut off in a packet", "can't be read"),
    ("empty", "empty|can't be read"),
    ("no bytes", "can't be read"),
    ("no numbers", r"non-finite samples .*, the first near 0\.9"),
    ("text", "is text"),
    ("text called sound", "can't be read"),
    ("a video without sound", "is a video without sound"),
])  # fmt: skip
def test_files_without_use_are_refused(tmp_path, kind, message):
    with pytest.raises(InputError, match=message):
        fit_sound(bad_file(tmp_path, kind), 3 * RATE)


def test_a_bed_goes_down_under_speech_and_up_again():
    bed = tone(8.0, 200, channels=2)
    speech = np.zeros((8 * RATE, 1), np.float32)
    speech[2 * RATE : 4 * RATE] = tone(2.0, 3000)
    mixed = lay_over(bed, speech, [(2.0, 4.0)])
    low = np.fft.rfft(mixed[:, 0].reshape(-1, RATE // 4), axis=1)
    bed_db = 20 * np.log10(np.abs(low[:, 50]))  # quarters of a second, at 200 Hz
    assert np.ptp(bed_db[[*range(7), *range(18, 32)]]) < 0.1
    assert bed_db[10] - bed_db[0] == pytest.approx(-DUCK_DB, abs=0.1)
    assert np.ptp(bed_db[8:16]) < 0.1
    voice = measure(np.where(np.arange(8 * RATE)[:, None] // RATE == 2, speech, 0), RATE)
    assert voice.lufs is not None
    assert mixed.shape == (8 * RATE, 2)


def test_between_near_sentences_the_bed_stays_down():
    times, levels = duck_points([(1.0, 2.0), (2.3, 3.0), (5.0, 6.0)])
    at = np.interp([0.5, 1.5, 2.15, 3.0, 3.0 + DUCK_UP_S, 5.0 - DUCK_DOWN_S, 5.5], times, levels)
    assert at.tolist() == [0, -DUCK_DB, -DUCK_DB, -DUCK_DB, 0, 0, -DUCK_DB]


def test_speech_alone_stays_in_one_channel():
    speech = np.zeros((2 * RATE, 1), np.float32)
    speech[RATE:] = 0.1 * tone(1.0) / 0.3
    mixed = lay_over(None, speech, [(1.0, 2.0)])
    assert mixed.shape == speech.shape
    assert measure(mixed, RATE).lufs == pytest.approx(MIX_LUFS, abs=0.1)


def test_a_loud_bed_and_a_loud_voice_leave_room_for_their_peaks():
    bed, speech = tone(4.0, 330, amplitude=1.0), np.zeros((4 * RATE, 1), np.float32)
    speech[RATE : 2 * RATE] = tone(1.0, 90, amplitude=1.0)
    mixed = lay_over(bed, speech, [(1.0, 2.0)])
    assert np.abs(mixed).max() < 0.7


@pytest.mark.parametrize("rate", [16_000, 24_000, 48_000])
def test_a_models_sound_is_brought_to_the_clip(rate):
    made = at_length(tone(1.0, rate=rate), rate, 2 * RATE)
    assert made.shape == (2 * RATE, 1)
    assert np.allclose(made[2_000:40_000], tone(1.0)[2_000:40_000], atol=2e-3)
    assert not made[RATE + 10 :].any()
