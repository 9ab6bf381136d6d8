"""A clip with sound, from the command line and from Python: made, killed, resumed, replayed."""

from __future__ import annotations

import json
import logging
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from tests.sounds import RATE, save, tone
from vidgen.cli.main import main
from vidgen.core.errors import Cancelled, InputError
from vidgen.media import write
from vidgen.media.checks import check_file
from vidgen.media.clip import Clip
from vidgen.media.mastering import measure
from vidgen.media.probe import probe, read_recipe
from vidgen.media.sound import read_sound
from vidgen.pipeline.engine import Engine, load
from vidgen.pipeline.journal import journal
from vidgen.pipeline.journal.journal import Journal

PROMPT = "a red car bounces across the desert"
OPTIONS = {"seed": 3, "frames": 17, "steps": 1}
SECONDS = 17 / 12
needs_espeak = pytest.mark.skipif(
    shutil.which("espeak-ng") is None, reason="espeak-ng is not here"
)


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Engine:
    return load(str(tiny_model), device="cpu", dtype="fp32")


@pytest.fixture
def bed(tmp_path: Path) -> Path:
    return save(tmp_path / "bed.wav", tone(1.0, 440, channels=2), codec="pcm_s16le")


def run(*words: str | Path) -> int:
    return main([str(word) for word in words])


def told(capsys, *words) -> dict:
    assert run(*words, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_a_clip_sounds_like_the_file_given(engine, bed, tmp_path):
    clip = engine.generate(PROMPT, **OPTIONS, audio=bed)
    assert clip.sound.shape == (round(SECONDS * RATE), 2)
    assert np.allclose(clip.sound[: RATE // 2], tone(0.5, channels=2), atol=1e-3)
    path = clip.save(tmp_path / "x.mp4")
    samples, rate = read_sound(path)
    assert len(samples) == round(SECONDS * rate)
    assert measure(samples[: RATE - 4800], rate).lufs == pytest.approx(-16, abs=1)
    (record,) = clip.recipe["inputs"]
    assert record["option"] == "audio"
    assert len(record["sha256"]) == 64
    assert clip.recipe["sound"] == {"source": "file", "loop": False}
    assert read_recipe(path)["encoder"]["sound"]["codec"] == "aac"
    assert [each.kind for each in check_file(path) if "sound" in each.kind] == []


def test_a_file_can_be_repeated_to_the_end(engine, bed):
    clip = engine.generate(PROMPT, **OPTIONS, audio=str(bed), audio_loop=True)
    end = clip.sound[round(1.1 * RATE) : round(1.4 * RATE)]
    assert np.sqrt(np.mean(end**2)) == pytest.approx(0.212, abs=0.01)
    assert clip.recipe["sound"]["loop"] is True


def test_a_model_without_sound_makes_silent_clips(engine, tmp_path):
    for audio in (None, "none"):
        clip = engine.generate(PROMPT, **OPTIONS, audio=audio)
        assert clip.sound is None
        path = clip.save(tmp_path / f"{audio}.mp4")
        assert [stream["type"] for stream in probe(path)["streams"]] == ["video"]


def test_sound_never_changes_a_frame(engine, bed):
    silent = engine.generate(PROMPT, **OPTIONS)
    assert np.array_equal(engine.generate(PROMPT, **OPTIONS, audio=bed).frames, silent.frames)


def test_sound_that_a_model_cannot_make_is_refused(engine, tiny_model, tmp_path, capsys):
    with pytest.raises(InputError, match="makes no sound; give --audio FILE, --audio-model"):
        engine.generate(PROMPT, **OPTIONS, audio="generate")
    out = tmp_path / "x.mp4"
    assert run("generate", PROMPT, "--model", tiny_model, "--audio", "generate", "-o", out) == 2
    assert "LTX-2" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("options", "message"), [
    ({"audio": "no.wav"}, "no.wav does not exist"),
    ({"audio": 3}, "give none, generate or the path of a file"),
    ({"audio_loop": True}, "audio_loop needs audio or audio_model"),
    ({"voice": "en-gb"}, "voice needs say"),
    ({"audio_prompt": "rain"}, "audio_prompt needs audio_model"),
    ({"audio": "x.wav", "audio_model": "m"}, "are both given"),
    ({"say": [(-1, "hi")]}, "say is -1"),
    ({"say": ["  "]}, "give the text"),
    ({"say": [(1, 2, 3)]}, "texts or pairs"),
    ({"say": [(0.0, "@no.wav")]}, "no.wav does not exist"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused(engine, options, message):
    with pytest.raises(InputError, match=message):
        engine.generate(PROMPT, **OPTIONS, **options)


@pytest.mark.parametrize("name", ["x.gif", "x.png", "x.webp"])
def test_an_output_that_holds_no_sound_is_refused(tmp_path, bed, tiny_model, capsys, name):
    out = tmp_path / name
    assert run("generate", PROMPT, "--model", tiny_model, "--frames", 1, "--audio", bed, "-o",
               out) == 2
    assert "can't hold sound; give one of .mp4" in capsys.readouterr().err
    assert not out.exists()


def test_the_command_line_replays_sound_by_its_hash(tmp_path, bed, tiny_model, capsys):
    out = tmp_path / "x.mp4"
    data = told(capsys, "generate", PROMPT, "--model", tiny_model, "--seed", 3, "--frames", 17,
                "--steps", 1, "--audio", bed, "--audio-loop", "-o", out)
    assert data["clips"][0]["sound"] is True
    bed.unlink()  # its content lies in the recipe
    again = told(capsys, "replay", out, "-o", tmp_path / "again.mp4")
    assert again["identical"] is True
    silent = told(capsys, "replay", out, "-o", tmp_path / "silent.mp4", "--set", "audio=none")
    assert (silent["identical"], silent["changed"]) == (False, ["audio"])
    assert read_sound(tmp_path / "silent.mp4") is None
    audio = next(s for s in told(capsys, "inspect", out)["streams"] if s["type"] == "audio")
    assert (audio["codec"], audio["rate"], audio["channels"]) == ("aac", RATE, 2)


def test_a_large_file_is_found_again_or_asked_for(tmp_path, engine, capsys):
    large = save(tmp_path / "large.wav", tone(8.0, channels=2))
    out = engine.generate(PROMPT, **OPTIONS, audio=large).save(tmp_path / "x.mp4")
    moved = large.rename(tmp_path / "moved.wav")
    assert run("replay", out, "-o", tmp_path / "y.mp4") == 2
    assert "--input audio=PATH" in capsys.readouterr().err
    given = told(capsys, "replay", out, "-o", tmp_path / "y.mp4", "--input", f"audio={moved}")
    assert given["identical"] is True


def test_killed_and_resumed_sounds_the_same(engine, bed, tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "PATIENCE", 0)
    monkeypatch.setattr(write, "SEGMENT", 16)
    options = OPTIONS | {"frames": 33, "audio": bed, "say": [(0.2, f"@{bed}")]}
    monkeypatch.setattr(
        engine, "folder", _longer(engine.folder)
    )
    straight = engine.generate(PROMPT, **options).save(tmp_path / "straight.mp4")
    out = tmp_path / "x.mp4"
    for stop_at in (None, 16, 29):
        clip = engine.generate(PROMPT, **options, journal=Journal(out, resume=True))

        def on_frames(done, stop_at=stop_at):
            if stop_at is not None and done >= stop_at:
                raise Cancelled("stopped")

        if stop_at is None:
            clip.journal.pause()
            continue
        with pytest.raises(Cancelled):
            clip.save(out, on_frames=on_frames)
    with pytest.raises(InputError, match="sound"):
        engine.generate(PROMPT, **(options | {"say": [(0.3, f"@{bed}")]}),
                        journal=Journal(out, resume=True))
    engine.generate(PROMPT, **options, journal=Journal(out, resume=True)).save(out)
    one, other = Clip.from_file(straight), Clip.from_file(out)
    assert np.array_equal(one.sound, other.sound)
    assert np.array_equal(one.frames, other.frames)
    assert Fraction(len(one.sound), one.sound_rate) == Fraction(33, 12)


def _longer(folder):
    from dataclasses import replace

    return replace(folder, defaults=replace(folder.defaults, max_frames=65))


@pytest.mark.system
@needs_espeak
def test_speech_lies_over_a_bed_at_its_time(tmp_path, bed, tiny_model, capsys, caplog):
    out = tmp_path / "x.mp4"
    words = ("generate", PROMPT, "--model", tiny_model, "--seed", 3, "--frames", 17, "--steps", 1,
             "--audio", bed, "--audio-loop", "--voice", "en-gb")
    caplog.set_level(logging.WARNING)
    data = told(capsys, *words, "--say", "0.6=Hi.", "-o", out)
    (caption,) = data["clips"][0]["captions"]
    assert (caption["text"], caption["start_s"]) == ("Hi.", 0.6)
    assert 0.7 < caption["end_s"] < SECONDS
    clip = Clip.from_file(out)
    assert clip.captions == [caption]
    assert clip.recipe["sound"]["speech"]["voice"]["voice"] == "en-gb"
    without = tmp_path / "without.mp4"
    told(capsys, *words[:-2], "-o", without)
    spoken, plain = clip.sound, Clip.from_file(without).sound
    assert spoken.shape == plain.shape
    again = told(capsys, "replay", out, "-o", tmp_path / "again.mp4")
    assert again["identical"] is True
    assert run(*words, "--say", "1=Good morning to all of you.", "-o", tmp_path / "y.mp4") == 2
    assert "s after the clip, which has 1.42 s" in capsys.readouterr().err
    assert run(*words[:-1], "en-uk", "--say", "Hi.", "-o", tmp_path / "y.mp4") == 2
    assert "en-gb" in capsys.readouterr().err


def test_speech_of_ones_own_is_replayed_from_the_recipe(engine, tmp_path, capsys):
    own = save(tmp_path / "own.wav", tone(0.5, 300), codec="pcm_s16le")
    clip = engine.generate(PROMPT, **OPTIONS, say=[(0.5, f"@{own}")])
    assert clip.captions == [{"text": None, "start_s": 0.5, "end_s": 1.0}]
    assert not clip.sound[: RATE // 2].any()
    out = clip.save(tmp_path / "x.mp4")
    own.unlink()
    assert told(capsys, "replay", out, "-o", tmp_path / "y.mp4")["identical"] is True


def extended(capsys, head, out, *more):
    return told(capsys, "extend", head, "--seconds", 0.5, "-o", out, *more)


def test_a_clip_that_continues_keeps_its_sound_then_falls_silent(engine, bed, tmp_path, capsys):
    head = engine.generate(PROMPT, **OPTIONS, audio=bed, audio_loop=True).save(tmp_path / "a.mp4")
    data = extended(capsys, head, tmp_path / "b.mp4")
    assert data["sound"] is True
    before, after = read_sound(head)[0], read_sound(tmp_path / "b.mp4")[0]
    assert len(after) == round(data["seconds"] * RATE)
    middle = slice(RATE // 10, RATE)
    error = np.mean((after[middle] - before[middle]) ** 2) / np.mean(before[middle] ** 2)
    assert 10 * np.log10(error) < -20
    assert np.abs(after[len(before) + 2_000 :]).max() < 1e-3
    assert np.array_equal(Clip.from_file(tmp_path / "b.mp4").frames[:17],
                          Clip.from_file(head).frames)


def test_a_clip_that_continues_takes_other_sound_or_none(engine, bed, tmp_path, capsys):
    head = engine.generate(PROMPT, **OPTIONS, audio=bed).save(tmp_path / "a.mp4")
    assert extended(capsys, head, tmp_path / "b.mp4", "--audio", "none")["sound"] is False
    assert read_sound(tmp_path / "b.mp4") is None
    other = save(tmp_path / "other.wav", tone(3.0, 700))
    extended(capsys, head, tmp_path / "c.mp4", "--audio", other)
    samples = read_sound(tmp_path / "c.mp4")[0]
    heard = np.abs(np.fft.rfft(samples[-RATE:-RATE // 3, 0], RATE))
    assert abs(int(heard.argmax()) - 700) <= 1
