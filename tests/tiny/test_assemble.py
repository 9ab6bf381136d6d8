"""Shots put together: real files in, one real file out, its packets, pixels, sound and texts."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from eval.toybox import quality
from tests.films import FPS, SIZE, film, painted, render
from tests.sounds import RATE, save, tone
from vidgen.core.errors import InputError, OutputError
from vidgen.media.clip import Clip
from vidgen.media.manifest import read_marks
from vidgen.media.mastering import measure
from vidgen.media.probe import probe, read_recipe
from vidgen.media.provenance import GENERATED
from vidgen.media.sound import read_sound
from vidgen.pipeline.journal.job import lock_job
from vidgen.story.assemble import assemble, blended
from vidgen.story.edit import make_edit
from vidgen.story.export import page_parts

needs_espeak = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not here")


def frames(path: Path) -> np.ndarray:
    return Clip.from_file(path).frames


def psnr(shown: np.ndarray, wanted: np.ndarray) -> float:
    """Of frames uint8 [T, H, W, 3], or of one."""
    videos = (torch.from_numpy(np.ascontiguousarray(each)).reshape(1, 1, -1, 1, 3).float() / 127.5
              for each in (shown, wanted))
    return float(quality.psnr(*videos))


def shots_text(*keys: str) -> str:
    return "shots:\n" + "".join(f"  - {{id: s{n}, prompt: shot {n}{', ' if each else ''}{each}}}\n"
                                for n, each in enumerate(keys))


class Made:
    """A film made of painted shots."""

    def __init__(self, folder: Path, model: Path, text: str, lengths: list[int],
                 name: str = "film.mp4", **how: Any) -> None:
        self.output = folder / name
        plan = film(folder, model, text, self.output.suffix)
        self.shots = render(plan, folder / "film.shots", lengths, **how)
        self.edit = make_edit(plan, self.shots, self.output)
        self.told = assemble(self.edit, self.shots)
        self.film = self.told.recipe["film"]

    @property
    def frames(self) -> np.ndarray:
        return frames(self.output)


@pytest.fixture
def make(tmp_path, tiny_model):
    def call(text: str, lengths: list[int], **how: Any) -> Made:
        return Made(tmp_path, tiny_model, text, lengths, **how)

    return call


def packets(path: Path) -> list[bytes]:
    with av.open(str(path)) as container:
        return [bytes(each) for each in container.demux(video=0) if each.size]


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".webm", ".mkv"])
def test_plain_cuts_copy_every_packet(make, suffix):
    made = make(shots_text("", "", ""), [20, 70, 9], name=f"film{suffix}")
    assert made.film["copied_frames"] == 99
    assert packets(made.output) == [p for each in made.shots for p in packets(each.path)]
    assert (made.frames == np.concatenate([frames(each.path) for each in made.shots])).all()


@pytest.mark.parametrize("kind", ["dissolve", "fade-black", "wipe-right", "slide-left"])
def test_a_transition_is_encoded_and_the_rest_copied(make, kind):
    made = make(shots_text("", f"transition: {{type: {kind}, duration: 0.5}}"), [140, 30])
    first, second = (frames(each.path) for each in made.shots)
    seen = made.frames
    assert len(seen) == 164
    assert made.film["copied_frames"] == 128
    assert (seen[:128] == first[:128]).all()
    way = [blended(kind, a, b, (n + 1) / 7)
           for n, (a, b) in enumerate(zip(first[134:], second[:6], strict=True))]
    for shown, wanted in zip(seen[134:140], way, strict=True):
        floor = 33 if kind in ("dissolve", "fade-black") else 26  # chroma is coarser than an edge
        assert psnr(shown, wanted) > floor
    assert psnr(seen[128:134], first[128:134]) > 36
    assert psnr(seen[140:], second[6:]) > 36


def test_twelve_shots_last_as_long_as_their_script_says(make):
    keys = [f"transition: {{type: {kind}, duration: 0.29}}" for kind in
            ("cut", "dissolve", "wipe-left", "fade-white", "slide-right", "dissolve") * 2]
    lengths = [13 + n for n in range(12)]
    made = make(shots_text(*keys), lengths)
    ideal = Fraction(sum(lengths), 12) - 10 * Fraction("0.29")
    told = probe(made.output)
    assert len(made.frames) == told["streams"][0]["num_frames"] == made.edit.timeline.num_frames
    assert abs(Fraction(len(made.frames), 12) - ideal) <= Fraction(1, 24)
    assert told["duration_s"] == pytest.approx(len(made.frames) / 12, abs=0.001)
    assert made.film["timeline"]["ideal_s"] == pytest.approx(float(ideal))


def test_the_same_shots_give_the_same_file(make, monkeypatch, tmp_path):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    save(tmp_path / "m.wav", tone(1.0), codec="pcm_s16le")
    text = "scenes: {a: One}\n" + shots_text(
        "scene: a, caption: hi, music: m.wav", "scene: a, transition: dissolve", "")
    first = make(text, [30, 30, 20]).output.read_bytes()
    assert make(text, [30, 30, 20]).output.read_bytes() == first


def level(samples: np.ndarray, start: float, end: float) -> float:
    part = samples[round(start * RATE) : round(end * RATE)]
    return float(np.sqrt(np.mean(part.astype(np.float64) ** 2)))


def heard(path: Path) -> np.ndarray:
    samples, rate = read_sound(path)
    assert rate == RATE
    return samples


def part_of(samples: np.ndarray, frequency: float, start: float, end: float) -> float:
    """Amplitude of a frequency."""
    part = samples[round(start * RATE) : round(end * RATE), 0].astype(np.float64)
    t = np.arange(len(part)) / RATE
    return float(2 * abs(np.mean(part * np.exp(-2j * np.pi * frequency * t))))


def test_sounds_of_shots_cross_in_their_transition(make, tmp_path):
    save(tmp_path / "low.wav", tone(4, 440), codec="pcm_s16le")
    save(tmp_path / "high.wav", tone(4, 1000), codec="pcm_s16le")
    made = make(shots_text("sound: {file: low.wav}", "sound: {file: high.wav}, "
                           "transition: {type: dissolve, duration: 2}"), [48, 48])
    samples = heard(made.output)
    assert len(samples) == round(len(made.frames) / 12 * RATE)
    full = part_of(samples, 440, 0.5, 1.5)
    assert part_of(samples, 1000, 0.5, 1.5) < 0.01 * full
    assert part_of(samples, 440, 4.5, 5.5) < 0.01 * full
    assert part_of(samples, 1000, 4.5, 5.5) == pytest.approx(full, rel=0.05)
    for frequency in (440, 1000):  # equal power in the middle
        assert part_of(samples, frequency, 2.97, 3.03) == pytest.approx(full / 2**0.5, rel=0.08)
    assert measure(samples, RATE).lufs == pytest.approx(-16, abs=0.7)


def test_music_continues_over_shots_and_ends_at_none(make, tmp_path):
    save(tmp_path / "m.wav", tone(1.5, 600), codec="pcm_s16le")
    keys = ("", "music: m.wav", "", "music: none", "")
    samples = heard(make(shots_text(*keys), [24] * 5).output)
    assert level(samples, 0, 1.9) < 1e-3
    assert level(samples, 3.2, 5.9) > 0.05  # repeated, though the file is shorter
    assert level(samples, 7.1, 10) < 1e-3


def test_music_that_ends_too_early_is_reported(make, tmp_path):
    save(tmp_path / "m.wav", tone(1.5, 600), codec="pcm_s16le")
    made = make(shots_text("music: {file: m.wav, loop: false}", ""), [24, 24])
    assert any("m.wav lasts 1.50 s" in each and "loop: true repeats it" in each
               for each in made.told.notes)
    assert level(heard(made.output), 1.6, 4) < 1e-3


def test_music_goes_down_under_narration_and_the_film_has_one_loudness(make, tmp_path):
    save(tmp_path / "m.wav", tone(2, 600), codec="pcm_s16le")
    save(tmp_path / "said.wav", tone(1.5, 2000), codec="pcm_s16le")
    made = make("project: {finish: {loudness: -20}}\n" + shots_text(
        "music: m.wav", "narration: ['@said.wav']", ""), [36, 36, 36])
    samples = heard(made.output)
    alone, under = part_of(samples, 600, 1, 2), part_of(samples, 600, 3.2, 4.3)
    assert 20 * np.log10(alone / under) == pytest.approx(12, abs=0.6)
    assert part_of(samples, 2000, 3.2, 4.3) > under
    assert measure(samples, RATE).lufs == pytest.approx(-20, abs=0.7)
    assert [each["start_s"] for each in Clip.from_file(made.output).captions] == [3.0]


def test_a_film_without_sound_has_no_track_and_words_for_sound_are_reported(make):
    made = make(shots_text("sound: thunder", "music: {prompt: a slow waltz}"), [12, 12])
    assert {each["type"] for each in probe(made.output)["streams"]} <= {"video", "data"}
    assert any("the sound of s0 is described in words" in each for each in made.told.notes)
    assert any("the music of s1 is described in words" in each for each in made.told.notes)


@needs_espeak
def test_narration_is_spoken_by_its_speakers_and_becomes_text(make):
    text = ("characters: {cat: {description: a cat, voice: en-gb}}\n" + shots_text(
        "narration: [Hello there., {text: Good day, speaker: cat}]", "narration: {text: Bye, at: 1}"
    ))
    made = make(text, [36, 36])
    one, two, three = made.edit.cues
    assert [(each.text, each.speaker) for each in (one, two, three)] == [
        ("Hello there.", None), ("Good day", "cat"), ("Bye", None)]
    assert two.start_s == pytest.approx(one.end_s + 0.25, abs=0.002)
    assert three.start_s == 4.0
    assert {each["voice"] for each in made.told.recipe["sound"]["speech"]["voice"]} == {
        "en-us", "en-gb"}
    assert "<v cat>Good day" in made.output.with_suffix(".vtt").read_text()
    samples = heard(made.output)
    assert level(samples, three.start_s, three.end_s) > 0.03


@pytest.mark.parametrize(("keys", "message"), [
    (["narration: ['@said.wav', {text: '@said.wav', at: 1}]", ""],
     r"shot 's0': narration '@said\.wav' begins 0\.50 s before the previous one ends; place it at "
     r"1\.50 s"),
    (["", "narration: {text: '@said.wav', at: 1}"], r"shot 's1': narration '@said\.wav' ends 0\.5"),
    (["transition: cut", "transition: {type: dissolve, duration: 9}"],
     "is longer than the previous shot"),
    (["caption: {text: x, at: 3}", ""], "begins at 3 s, but the shot lasts"),
    (["sound: {file: film.yaml}", ""], "shot 's0': sound .*film.yaml"),
])
def test_what_does_not_go_together_is_refused(make, tmp_path, keys, message):
    save(tmp_path / "said.wav", tone(1.5, 2000), codec="pcm_s16le")
    with pytest.raises(InputError, match=message):
        make(shots_text(*keys), [24, 24])
    assert not list(tmp_path.glob("film.mp4*"))
    assert not list(tmp_path.glob(".*.tmp"))


TEXTS = shots_text("caption: 'less < more & {braces}'", "caption: [{text: one, duration: 3}, "
                   "{text: two, at: 1}]", "").replace("{braces}", "done")


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".mkv"])
def test_texts_are_a_track_that_others_can_read_and_files(make, suffix):
    made = make(TEXTS, [24, 24, 24], name=f"film{suffix}")
    assert made.film["copied_frames"] == 72
    with av.open(str(made.output)) as container:
        stream = container.streams.subtitles[0]
        found = [(float(each.pts * each.time_base), bytes(each).decode("utf-8", "replace"))
                 for each in container.demux(stream) if each.size > 2]
    assert [round(start, 2) for start, _ in found] == [0, 2, 3, 4]
    words = [text.replace("&lt;", "<").replace("&amp;", "&") for _, text in found]
    assert "less < more & done" in words[0]
    assert ["one" in each for each in words[1:]] == [True, True, True]
    assert ["two" in each for each in words[1:]] == [False, True, False]
    assert [each.suffix for each in made.told.files] == [".srt", ".vtt"]
    assert "00:00:02,000 --> 00:00:05,000\none" in made.output.with_suffix(".srt").read_text()


def test_texts_are_burnt_in_where_that_is_wanted(make):
    text = "project: {finish: {captions: burn}}\n" + shots_text("", "caption: HELLO")
    made = make(text, [80, 24])
    assert made.film["copied_frames"] == 80
    assert not [each for each in probe(made.output)["streams"] if each["type"] == "subtitle"]
    bare = frames(made.shots[1].path)
    assert (made.frames[:80] == frames(made.shots[0].path)).all()
    assert psnr(made.frames[80:, :24], bare[:, :24]) > 33
    assert psnr(made.frames[80:, 24:], bare[:, 24:]) < 20
    sidecar = make("project: {finish: {captions: sidecar}}\n" + shots_text("caption: HELLO"), [24])
    assert sidecar.film["copied_frames"] == 24
    assert "HELLO" in sidecar.output.with_suffix(".vtt").read_text()


def test_scenes_are_chapters_and_the_recipe_tells_all(make):
    text = ("project: {title: The film}\nscenes: {a: {title: Morning}, b: {title: Night}}\n"
            + shots_text("scene: a", "scene: a, transition: dissolve", "scene: b", ""))
    made = make(text, [24, 24, 24, 24])
    with av.open(str(made.output)) as container:
        listed = [(float(c["start"] * c["time_base"]), c["metadata"]["title"])
                  for c in container.chapters()]
        tags = dict(container.metadata)
    assert listed == [(0, "Morning"), (3.5, "Night"), (5.5, "s3")]
    assert tags["digital_source_type"] == GENERATED
    recipe = read_recipe(made.output)
    assert recipe["film"]["script"]["project"]["title"] == "The film"
    assert [each["address"] for each in recipe["film"]["shots"]] == ["s0", "s1", "s2", "s3"]
    assert recipe["film"]["timeline"]["shots"][1]["overlap_s"] == 0.5
    assert recipe["encoder"]["codec"] == "libx264"


def test_a_film_bears_its_label_and_producer(make):
    shots = shots_text("", "transition: dissolve", "caption: HELLO")
    plain = make("project: {finish: {captions: burn}}\n" + shots, [12, 24, 24])
    before = Clip.from_file(plain.output).frames
    made = make("project: {finish: {captions: burn, label: visible, aigc: ACME}}\n" + shots,
                [12, 24, 24])
    film = Clip.from_file(made.output)
    changed = np.abs(film.frames.astype(int) - before).max(axis=-1) > 60
    assert changed[:24].any((1, 2)).all(), "2 seconds"
    assert not changed[24:].any()
    assert (film.recipe["label"], film.recipe["aigc"]) == ("visible", "ACME")
    assert read_marks(made.output).aigc["ContentProducer"] == "ACME"
    with pytest.raises(InputError, match="label is 'big'; known: none, visible"):
        make("project: {finish: {label: big}}\n" + shots, [12, 24, 24])


@pytest.mark.parametrize(("name", "codec", "stream"), [
    ("film.mp4", "h265", "hevc"), ("film.mov", "prores", "prores"), ("film.mp4", "vp9", "vp9")])
def test_other_codecs_by_name(make, monkeypatch, name, codec, stream):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    text = f"project: {{finish: {{codec: {codec}}}}}\n" + shots_text("", "transition: dissolve")
    made = make(text, [70, 20], name=name)
    assert probe(made.output)["streams"][0]["codec"] == stream
    first, second = (frames(each.path) for each in made.shots)
    seen = made.frames
    assert psnr(seen[:64], first[:64]) > 33
    assert psnr(seen[70:], second[6:]) > 33
    content = made.output.read_bytes()
    assert make(text, [70, 20], name=name).output.read_bytes() == content


def test_a_shot_that_is_missing_or_was_changed_is_reported_and_nothing_is_written(make, tmp_path):
    made = make(shots_text("", ""), [20, 20])
    before = made.output.read_bytes()
    path = made.shots[1].path
    shutil.copy(made.shots[0].path, path)
    with pytest.raises(InputError, match=r"shot 's1': .*s1\.mp4 was changed since it was rendered"):
        assemble(made.edit, made.shots)
    path.unlink()
    with pytest.raises(InputError, match=r"shot 's1': .*s1\.mp4 is missing"):
        assemble(made.edit, made.shots)
    assert made.output.read_bytes() == before
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_shot_of_another_length_than_planned_is_refused(make, tmp_path):
    made = make(shots_text("", ""), [20, 20])
    wrong = [made.shots[0], replace(made.shots[1], num_frames=30)]
    for kind in ("", "transition: dissolve"):
        plan = film(tmp_path, made.edit.film.folder.path, shots_text("", kind))
        with pytest.raises(InputError, match=r"s1\.mp4 (has 20 frames instead of 30|ends behind)"):
            assemble(make_edit(plan, wrong, made.output), wrong)


def test_what_a_kill_left_is_swept_and_another_process_is_respected(make, tmp_path):
    made = make(shots_text("", "transition: dissolve"), [20, 20])
    left = tmp_path / ".film.mp4.0123abcd.tmp"
    left.mkdir()
    (left / "0.mp4").write_bytes(b"half")
    with lock_job(left), pytest.raises(OutputError, match="is being written by another process"):
        assemble(made.edit, made.shots)
    assert left.is_dir()
    assemble(made.edit, made.shots)
    assert not list(tmp_path.glob(".*.tmp"))


def test_the_edit_opens_in_opentimelineio(make, tmp_path):
    otio = pytest.importorskip("opentimelineio")
    from vidgen.story.otio import otio_text

    save(tmp_path / "m.wav", tone(1.0), codec="pcm_s16le")
    text = "project: {title: Film, finish: {ending: fade-black}}\n" + shots_text(
        "caption: hello", "transition: {type: dissolve, duration: 0.4}, music: m.wav",
        "transition: wipe-left, sound: {file: m.wav, loop: true}", "")
    made = make(text, [24, 30, 24, 12])
    path = tmp_path / "film.otio"
    path.write_text(otio_text(made.edit, made.shots, tmp_path))
    timeline = otio.adapters.read_from_file(str(path))
    assert timeline.name == "Film"
    assert timeline.duration() == otio.opentime.RationalTime(len(made.frames), 12)
    (video,) = timeline.video_tracks()
    kinds = [type(each).__name__ for each in video]
    assert kinds == ["Clip", "Transition", "Clip", "Transition", "Clip", "Clip", "Transition"]
    for clip, shot in zip(video.find_clips(), made.shots, strict=True):
        assert (tmp_path / clip.media_reference.target_url).resolve() == shot.path.resolve()
        known, used = clip.available_range(), clip.source_range
        assert known.start_time <= used.start_time
        assert used.end_time_exclusive() <= known.end_time_exclusive()
    dissolve = video[1]
    assert dissolve.transition_type == "SMPTE_Dissolve"
    assert (dissolve.in_offset + dissolve.out_offset).to_frames() == 5
    sounds, music = timeline.audio_tracks()
    _, heard = sounds
    shown = video.range_of_child(video.find_clips()[2])
    assert sounds.range_of_child(heard).start_time.to_seconds() == pytest.approx(
        shown.start_time.to_seconds())
    assert heard.duration().to_seconds() == pytest.approx(shown.duration.to_seconds())
    assert heard.media_reference.target_url == "m.wav"
    assert music.duration().to_seconds() == pytest.approx(len(made.frames) / 12)
    assert timeline.tracks.markers[0].name == "hello"
    assert json.loads(timeline.to_json_string())["OTIO_SCHEMA"] == "Timeline.1"


def test_the_storyboard_is_a_page_of_its_own_with_everything_escaped(make):
    text = "project: {title: A <b> & c}\nscenes: {a: {title: '\"One\"'}}\n" + shots_text(
        "scene: a, negative: <script>, caption: hi",
        "transition: dissolve, seed: 4, last_frame: {shot: s0, frame: first}")
    made = make(text, [24, 12])
    page = "".join(page_parts(made.edit, made.shots))
    assert page.count("data:image/jpeg;base64,") == 6
    for text in ("A &lt;b&gt; &amp; c", "&#34;One&#34;", "&lt;script&gt;", "shot 1",
                 "1.50 to 2.50 s, 12 frames", "dissolve, 0.50 s", "the first frame of s0"):
        assert text in page
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")


def test_painted_shots_are_what_they_seem():
    one = painted(0, 3)
    assert one.shape == (3, SIZE[1], SIZE[0], 3)
    assert (one[0] != one[2]).any()
    assert FPS == 12
