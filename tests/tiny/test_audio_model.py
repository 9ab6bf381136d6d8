"""Sound by text-to-audio models: the pipeline's own, once, in the recipe and in the journal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

from tests.sounds import RATE, save, tone
from tests.stopping import stop_at
from tests.tiny.audio_models import BUILDERS
from vidgen.cli.main import main
from vidgen.core.errors import Cancelled, InputError, ModelError
from vidgen.pipeline.engine import Engine, load
from vidgen.pipeline.journal import journal
from vidgen.pipeline.journal.journal import Journal
from vidgen.pipeline.sound.audio_model import LENGTHS, AudioModel, open_audio_model

PROMPT = "a red car"
OPTIONS = {"seed": 3, "frames": 17, "steps": 1}
SECONDS = 17 / 12
Build = Callable[[str], Path]


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Engine:
    return load(str(tiny_model), device="cpu", dtype="fp32")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Build:
    folder = tmp_path_factory.mktemp("audio")

    def build(name: str) -> Path:
        if not (folder / name).is_dir():
            torch.manual_seed(0)
            BUILDERS[name]().save_pretrained(folder / name)
        return folder / name

    return build


def open_it(folder: Path, seconds: float = SECONDS) -> AudioModel:
    return open_audio_model(
        str(folder), PROMPT, seconds, device=torch.device("cpu"), dtype="bf16", offload="none"
    )


@pytest.mark.parametrize("name", BUILDERS)
def test_the_sound_is_the_pipelines_own(model, name):
    opened, steps = open_it(model(name), 1.0), []
    samples, rate = opened.make(3, lambda done, total: steps.append((done, total)))
    pipe = getattr(diffusers, opened.folder.class_name).from_pretrained(model(name))
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    length = {LENGTHS[opened.folder.class_name]: 1.0}
    wave = torch.as_tensor(pipe(PROMPT, generator=generator, **length).audios[0]).detach()
    assert rate == 16_000
    assert samples.dtype == np.float32
    assert samples.shape == (16_000, 1 if name == "audioldm2" else 2)
    assert np.array_equal(samples, np.atleast_2d(wave.numpy()).T)
    assert samples.std() > 1e-3
    total = {"stable-audio": 100, "stable-audio-3": 8, "audioldm2": 200}[name]
    assert steps == [(done, total) for done in range(1, total + 1)]
    place = opened.load()  # what one sound leaves behind changes none that follows
    for seed in (4, 3):
        again, _ = opened.make(seed, lambda _done, _total: None, place)
        assert np.array_equal(again, samples) == (seed == 3)


def test_a_clip_has_the_models_sound_and_tells_of_it(engine, model, tmp_path, capsys):
    folder = model("stable-audio-3")
    clip = engine.generate(PROMPT, **OPTIONS, audio_model=str(folder), audio_prompt="a cat")
    assert clip.sound.shape == (round(SECONDS * RATE), 2)
    told = clip.recipe["sound"]
    assert told["source"] == "model"
    assert told["model"]["class"] == "StableAudio3Pipeline"
    assert told["model"]["prompt"] == "a cat"
    assert told["model"]["sha256"] == open_it(folder).folder.content_hash
    assert told["model"]["guidance_scale"] == 1.0
    path = clip.save(tmp_path / "x.mp4")
    assert main(["replay", str(path), "-o", str(tmp_path / "again.mp4"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["identical"] is True
    own = engine.generate(PROMPT, **OPTIONS, audio_model=str(folder))
    assert own.recipe["sound"]["model"]["prompt"] == PROMPT
    assert not np.array_equal(own.sound, clip.sound)


def test_each_seed_has_its_own_sound(engine, model):
    folder = str(model("stable-audio-3"))
    one, other = engine.generate(PROMPT, **OPTIONS, count=2, audio_model=folder)
    alone = engine.generate(PROMPT, **(OPTIONS | {"seed": 4}), audio_model=folder)
    assert not np.array_equal(one.sound, other.sound)
    assert np.array_equal(alone.sound, other.sound)


def test_a_model_of_short_sounds_is_followed_by_silence_or_itself(engine, model):
    folder = str(model("stable-audio"))  # which makes 1.02 s at most
    once = engine.generate(PROMPT, **OPTIONS, audio_model=folder).sound
    again = engine.generate(PROMPT, **OPTIONS, audio_model=folder, audio_loop=True).sound
    assert not once[round(1.03 * RATE) :].any()
    assert np.array_equal(once[: round(1.01 * RATE)], again[: round(1.01 * RATE)])
    period, part = round(1.024 * RATE), slice(1_000, 15_000)
    assert np.allclose(again[period:][part], again[part], atol=1e-6)


def test_speech_lies_over_a_models_sound(engine, model, tmp_path):
    own = save(tmp_path / "own.wav", tone(0.3, 500))
    options = OPTIONS | {"audio_model": str(model("stable-audio-3"))}
    plain = engine.generate(PROMPT, **options).sound
    spoken = engine.generate(PROMPT, **options, say=[(0.7, f"@{own}")]).sound
    before, under = slice(0, RATE // 2), slice(round(0.75 * RATE), round(0.95 * RATE))
    gain = np.linalg.norm(spoken[before]) / np.linalg.norm(plain[before])
    correlation = np.vdot(spoken[under], plain[under]) / np.vdot(plain[under], plain[under])
    assert correlation / gain == pytest.approx(10 ** (-12 / 20), abs=0.1)


def test_what_was_made_is_kept_by_the_journal(engine, model, tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "PATIENCE", 0)
    options = OPTIONS | {"audio_model": str(model("stable-audio"))}
    straight = engine.generate(PROMPT, **options).sound
    made, own, out = [], AudioModel.make, tmp_path / "x.mp4"

    def counted(self, *arguments):
        made.append(arguments[0])
        return own(self, *arguments)

    monkeypatch.setattr(AudioModel, "make", counted)

    with pytest.raises(Cancelled):  # in the midst of it
        engine.generate(PROMPT, **options, journal=Journal(out), on_event=stop_at(50, "sound"))
    clip = engine.generate(PROMPT, **options, journal=Journal(out, resume=True))
    clip.journal.pause()  # as a kill behind it
    again = engine.generate(PROMPT, **options, journal=Journal(out, resume=True))
    assert made == [3, 3]
    assert np.array_equal(again.sound, straight)
    again.save(out)
    assert [path.name for path in tmp_path.iterdir()] == ["x.mp4"]


def test_folders_that_make_no_sound_are_refused(engine, tiny_model, tmp_path):
    with pytest.raises(ModelError, match="toybox model, which makes no sound from a text"):
        engine.generate(PROMPT, **OPTIONS, audio_model=str(tiny_model))
    with pytest.raises(ModelError, match="nowhere"):
        engine.generate(PROMPT, **OPTIONS, audio_model="nowhere")
    (tmp_path / "model_index.json").write_text('{"_class_name": "LTXPipeline"}')
    with pytest.raises(ModelError, match="StableAudioPipeline, StableAudio3Pipeline, AudioLDM2"):
        engine.generate(PROMPT, **OPTIONS, audio_model=str(tmp_path))


def test_a_damaged_model_is_reported(engine, model, tmp_path):
    (tmp_path / "model_index.json").write_text((model("stable-audio") / "model_index.json")
                                               .read_text())
    with pytest.raises(ModelError, match="can't be loaded as StableAudioPipeline"):
        engine.generate(PROMPT, **OPTIONS, audio_model=str(tmp_path))


def test_a_prompt_of_its_own_needs_the_model(engine):
    with pytest.raises(InputError, match="audio_prompt needs audio_model"):
        engine.generate(PROMPT, **OPTIONS, audio_prompt="rain")
