"""Sound in files: in its place to the sample, as long as the picture, at one level."""

from __future__ import annotations

import subprocess
import tracemalloc
from fractions import Fraction

import av
import imageio_ffmpeg
import numpy as np
import pytest

from vidgen.media.clip import Clip
from vidgen.media.mastering import measure
from vidgen.media.probe import probe
from vidgen.media.sound import IN_MEMORY, SoundReader, gather, read_sound, resampled, room
from vidgen.media.types import ClipInfo
from vidgen.media.write import CONTAINERS, write_clip

RATE = 48_000
CODECS = {".mp4": "aac", ".mov": "aac", ".webm": "opus", ".mkv": "opus"}
FPS = Fraction(12)


def write(path, sound, num_frames=33, fps=FPS, **info):
    pictures = np.zeros((num_frames, 48, 64, 3), np.uint8)
    info = ClipInfo(fps, (64, 48), num_frames, sound, **info)
    return write_clip(path, [pictures], info)


def bursts(seconds, times, rate=RATE, channels=2):
    """Bursts of 1 kHz with a hard start, at each time."""
    samples = np.zeros((round(seconds * rate), channels), np.float32)
    length = rate // 50
    burst = 0.7 * np.cos(2 * np.pi * 1000 * np.arange(length) / rate)
    for time_s in times:
        start = round(time_s * rate)
        samples[start : start + length] += burst[: len(samples) - start, None]
    return samples


def onsets(samples, rate, times):
    """When each burst is heard, in seconds: half its first peak is reached."""
    found = []
    for time_s in times:
        start = max(0, round((time_s - 0.05) * rate))
        part = np.abs(samples[start : start + rate // 10, 0])
        found.append((start + int(np.argmax(part > 0.35))) / rate)
    return np.array(found)


def by_ffmpeg(path):
    """Samples as FFmpeg's program plays them, stereo."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(path), "-vn", "-f",
               "f32le", "-ac", "2", "-"]
    data = subprocess.run(command, capture_output=True, check=True).stdout
    return np.frombuffer(data, np.float32).reshape(-1, 2)


@pytest.mark.parametrize("suffix", CODECS)
@pytest.mark.parametrize(("fps", "num_frames", "rate"), [
    (FPS, 33, 48_000), (Fraction(24000, 1001), 40, 44_100), (Fraction(25), 47, 16_000),
    (FPS, 21, 50_000),
])  # fmt: skip
def test_a_click_plays_when_it_was_placed(tmp_path, suffix, fps, num_frames, rate):
    seconds, times = num_frames / fps, np.array([0.0, 0.31, 1.0])
    sound = bursts(float(seconds), times, rate)
    path = write(tmp_path / f"x{suffix}", sound, num_frames, fps, sound_rate=rate)
    own, own_rate = read_sound(path)
    for samples, its_rate in ((own, own_rate), (by_ffmpeg(path), own_rate)):
        assert np.abs(onsets(samples, its_rate, times) - times).max() < 0.001
        assert abs(len(samples) / its_rate - seconds) < 0.0011
    streams = {stream["type"]: stream for stream in probe(path)["streams"]}
    assert streams["audio"]["codec"].removeprefix("lib") == CODECS[suffix]
    assert streams["audio"]["layout"] == "stereo"
    with av.open(str(path)) as container:
        frames = [frame.time for frame in container.decode(video=0)]
    assert len(frames) == num_frames
    grid = 0.001 if suffix in (".webm", ".mkv") else 1e-6
    assert np.abs(np.array(frames) - np.arange(num_frames) / float(fps)).max() <= grid


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
@pytest.mark.parametrize("seconds", [0.4, 5.0])
def test_sound_is_as_long_as_the_picture(tmp_path, suffix, seconds):
    path = write(tmp_path / f"x{suffix}", bursts(seconds, [0.1]))
    samples, rate = read_sound(path)
    assert len(samples) == round(33 / 12 * rate)
    assert Clip.from_file(path).num_frames == 33


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("suffix", CODECS)
def test_sound_keeps_its_channels_and_shape(tmp_path, suffix, channels):
    t = np.arange(33 * 4000) / RATE
    sound = np.stack([0.4 * np.sin(2 * np.pi * 330 * (c + 1) * t) for c in range(channels)], 1)
    path = write(tmp_path / f"x{suffix}", sound.astype(np.float32))
    clip = Clip.from_file(path)
    assert clip.sound.shape == (33 * 4000, channels)
    error = np.mean((clip.sound[960:-960] - sound[960:-960]) ** 2)
    assert 10 * np.log10(1 / error) > 30


def test_a_level_is_reached_where_one_is_wanted(tmp_path):
    quiet = 0.1 * bursts(2.75, np.arange(0, 2.7, 0.1))
    recipe = {"created": "2026-01-02T03:04:05Z", "id": "urn:uuid:0"}
    path = write(tmp_path / "x.mp4", quiet, loudness=-16.0, recipe=recipe)
    samples, rate = read_sound(path)
    told = Clip.from_file(path).recipe["encoder"]["sound"]
    before = measure(quiet, RATE)
    assert told["measured_lufs"] == before.lufs
    assert told["gain_db"] == pytest.approx(min(12, -16 - before.lufs), abs=0.01)
    assert (told["codec"], told["rate"], told["channels"]) == ("aac", 48_000, 2)
    assert measure(samples, rate).lufs == pytest.approx(before.lufs + told["gain_db"], abs=0.3)
    assert measure(samples, rate).peak_db < 0


def test_without_a_level_sound_stays_as_it_is(tmp_path):
    loud = bursts(2.75, np.arange(0, 2.7, 0.1))
    samples, rate = read_sound(write(tmp_path / "x.mp4", loud))
    assert measure(samples, rate).lufs == pytest.approx(measure(loud, RATE).lufs, abs=0.2)


def test_a_file_saved_again_keeps_its_sound(tmp_path):
    first = write(tmp_path / "a.mkv", bursts(2.75, [0.5, 2.0]))
    again = Clip.from_file(first).save(tmp_path / "b.mp4")
    times = np.array([0.5, 2.0])
    assert np.abs(onsets(*read_sound(again), times) - times).max() < 0.001


def test_equal_sounds_give_equal_files(tmp_path):
    sound = bursts(2.75, [0.5])
    for suffix in CONTAINERS:
        contents = {write(tmp_path / f"{n}{suffix}", sound, loudness=-16.0).read_bytes()
                    for n in range(2)}
        assert len(contents) == 1, suffix


@pytest.mark.parametrize("wanted", [16_000, 44_100, 96_000])
def test_resampling_moves_nothing(wanted):
    times = np.array([0.2, 0.7])
    source = bursts(1.0, times)
    blocks = (source[start : start + 1000] for start in range(0, len(source), 1000))
    made = np.concatenate(list(resampled(blocks, 2, RATE, wanted)))
    assert abs(len(made) - wanted) <= 2
    assert np.abs(onsets(made, wanted, times) - times).max() < 0.0002


def test_long_sound_lies_in_a_file_and_short_sound_in_memory():
    short, long = room(100, 2), room(IN_MEMORY // 8 + 1, 2)
    assert not isinstance(short, np.memmap)
    assert isinstance(long, np.memmap)
    long[-1] = 0.5
    assert (long[0] == 0).all()
    blocks = [np.full((IN_MEMORY // 16, 2), value, np.float32) for value in (0.25, 0.5, 0.75)]
    kept = gather(iter(blocks), 2)
    assert isinstance(kept, np.memmap)
    assert np.array_equal(kept, np.concatenate(blocks))


def test_a_track_that_starts_later_than_its_picture_is_heard_then(tmp_path):
    source = write(tmp_path / "a.mp4", bursts(2.75, [0.25]))
    late = tmp_path / "late.mp4"
    subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", source, "-itsoffset", "0.5", "-i",
         source, "-map", "0:v", "-map", "1:a", "-c", "copy", late], check=True,
    )
    samples = np.concatenate(list(SoundReader(late)))
    assert onsets(samples, RATE, [0.75])[0] == pytest.approx(0.75, abs=0.03)


def test_memory_does_not_grow_with_the_length_of_the_sound(tmp_path):
    peaks = {}
    for seconds in (50, 80):
        sound = room(seconds * RATE, 2)
        for start in range(0, len(sound), 480_000):
            sound[start : start + 480_000] = 0.9 * np.sin(np.arange(480_000) / 9)[:, None]
        frames = (np.zeros((1, 16, 16, 3), np.uint8) for _ in range(seconds))
        info = ClipInfo(Fraction(1), (16, 16), seconds, sound, loudness=-10.0)
        tracemalloc.start()
        path = write_clip(tmp_path / f"{seconds}.mp4", frames, info)
        kept = read_sound(path)
        peaks[seconds] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(kept[0]) == seconds * RATE
        assert isinstance(kept[0], np.memmap)
    assert peaks[80] < peaks[50] + 2_000_000
