"""A film's sound and music in words, made by a real pipeline of random weights, each once."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.models import build_tiny_model
from tests.sounds import RATE, save, tone
from tests.tiny.audio_models import stable_audio_3
from vidgen.cli.main import main
from vidgen.media.probe import read_recipe
from vidgen.media.sound import read_sound
from vidgen.pipeline.diffusers_backend.pipe import LoadedPipeline
from vidgen.pipeline.sound.audio_model import AudioModel

FILM = """\
version: 1
project: {dtype: fp32, defaults: {duration: 0.5, steps: 1}}
shots:
  - {id: one, prompt: a red car, sound: rain on a roof, seed: 3}
  - {id: two, prompt: a cat, music: {prompt: a waltz, gain_db: -6}, narration: "@said.wav"}
  - {id: three, prompt: a dog, sound: {effects: rain on a roof, gain_db: -60}, seed: 3}
"""


@pytest.fixture(scope="module")
def audio_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("audio")
    stable_audio_3().save_pretrained(folder)
    return folder


@pytest.fixture
def script(tmp_path: Path) -> Path:
    save(tmp_path / "said.wav", tone(0.2, 2000), codec="pcm_s16le")
    (tmp_path / "film.yaml").write_text(FILM)
    return tmp_path / "film.yaml"


def command(script: Path, model: Path, audio_model: Path | None, *words: str) -> list[str]:
    return ["script", str(script), "-o", str(script.with_suffix(".mp4")), "--model", str(model),
            *(["--audio-model", str(audio_model)] if audio_model else []), *words]


def made(script: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns
            for path in script.with_suffix(".shots").glob("*.wav")}


def test_words_become_sound_once_and_are_heard_in_their_places(
    script: Path, tiny_model: Path, audio_model: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded: list[weakref.ref[Any]] = []

    def load(model: AudioModel) -> LoadedPipeline:
        place = LoadedPipeline(model.folder, model.device, torch.float32, model.offload)
        loaded.append(weakref.ref(place.own.transformer))
        return place

    monkeypatch.setattr(AudioModel, "load", load)
    assert main(command(script, tiny_model, audio_model, "--storyboard")) == 0
    assert [each() for each in loaded] == [None]  # once for both, and gone
    assert "described in words" not in capsys.readouterr().err
    film = script.with_suffix(".mp4")
    recipe: dict[str, Any] = read_recipe(film)["film"]
    told = recipe["described"]
    assert [(each["shot"], each["key"], each["model"]["prompt"]) for each in told] == [
        ("one", "sound", "rain on a roof"), ("two", "music", "a waltz"),
        ("three", "sound", "rain on a roof")]
    assert [each["model"]["seconds"] for each in told] == [0.5, 2.0, 0.5]
    assert told[0]["address"] == told[2]["address"]  # the same in all that shapes it
    first = made(script)
    assert {path.stem for path in first} == {each["address"] for each in told}
    rain, rate = read_sound(next(p for p in first if p.stem == told[0]["address"]))
    assert rain.shape == (rate // 2, 2)
    assert rain.std() > 1e-3
    heard, _ = read_sound(film)
    level = [np.abs(heard[round(at * RATE) : round((at + 0.3) * RATE)]).mean()
             for at in (0.1, 1.1)]
    assert level[0] > 1e-3
    assert level[1] > 1e-3  # the music goes on
    assert "rain on a roof" in script.with_suffix(".html").read_text()

    text = FILM.replace("a waltz", "a march")
    script.write_text(text)
    assert main(command(script, tiny_model, audio_model, "--overwrite")) == 0
    second = made(script)
    assert len(second) == 3
    assert first.items() < second.items()
    capsys.readouterr()
    assert main(command(script, tiny_model, audio_model)) == 0
    assert len(loaded) == 2
    assert "film.mp4 is done already" in capsys.readouterr().err
    assert made(script) == second


def test_without_a_model_for_it_words_are_reported_and_make_no_sound(
    script: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(script, tiny_model, None)) == 0
    assert "give files, or --audio-model FOLDER" in capsys.readouterr().err
    assert not made(script)


def test_what_makes_no_sound_is_refused_before_the_first_shot(
    script: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in ([], ["--check"]):
        assert main(command(script, tiny_model, tiny_model, *words)) == 2
        assert "makes no sound from a text" in capsys.readouterr().err
    assert not script.with_suffix(".shots").exists()


def test_a_model_that_makes_sound_is_heard_in_its_shots(tmp_path: Path) -> None:
    model = build_tiny_model(tmp_path / "heard", sound=True)
    save(tmp_path / "said.wav", tone(1.0, 2000), codec="pcm_s16le")
    script = tmp_path / "film.yaml"
    script.write_text(
        "project: {dtype: fp32, defaults: {duration: 0.75, steps: 1}}\n"
        "shots:\n"
        "  - {id: one, prompt: a red car, sound: thuds}\n"
        "  - {id: two, prompt: a cat, continue_from: one}\n"
        "  - {id: three, prompt: a dog, sound: {file: said.wav}}\n")
    assert main(command(script, model, None)) == 0
    shots = read_recipe(script.with_suffix(".mp4"))["film"]["shots"]
    one, two, three = (tmp_path / f"film.shots/{each['address']}.mp4" for each in shots)
    assert read_recipe(one)["plan"]["prompt"] == "a red car, with the sound of thuds"
    assert read_sound(three) is None
    film, _ = read_sound(script.with_suffix(".mp4"))
    assert len(film) == round(2.25 * RATE)
    for path in (one, two):  # the second file holds its own sound alone
        samples, rate = read_sound(path)
        assert len(samples) / rate == pytest.approx(0.75, abs=0.065)
        assert np.abs(samples).max() > 1e-3
    spectrum = np.abs(np.fft.rfft(film[round(1.6 * RATE) : round(2.1 * RATE), 0]))
    assert spectrum.argmax() == pytest.approx(1000, abs=2)  # 2 kHz in half a second


def test_a_check_makes_nothing(
    script: Path, tiny_model: Path, audio_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(script, tiny_model, audio_model, "--check", "--json")) == 0
    assert json.loads(capsys.readouterr().out)["film"]["duration_s"] == 1.5
    assert not script.with_suffix(".shots").exists()
