"""Which of two experts denoises: clips of a tiny model with and without one for low noise."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.lora_models import make_adapter
from tests.models import add_low_expert, build_tiny_model
from train.toybox.model_files import record_files, write_few_step
from vidgen.media.clip import Clip
from vidgen.pipeline.engine import Engine, load
from vidgen.weights.folder import FEW_STEP, FewStepConfig
from vidgen.weights.lora import write_lora


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, Engine]:
    """A model that makes sound and has a student; and one that also has a deaf second expert."""
    alone = build_tiny_model(tmp_path_factory.mktemp("models") / "alone", sound=True)
    with load(str(alone), dtype="fp32").loader.use("transformer") as dit:
        write_few_step(make_adapter(dit), FewStepConfig("euler", (1.0, 0.7, 0.4, 0.0), 3.0), alone)
    both = add_low_expert(Path(shutil.copytree(alone, alone.parent / "both")), 0.9)
    one, two = (load(str(folder), device="cpu", dtype="fp32") for folder in (alone, both))
    assert isinstance(one, Engine)
    assert isinstance(two, Engine)
    return one, two


def clips_of(engines: tuple[Engine, Engine], **request: Any) -> list[Clip]:
    return [engine.generate("a red car bounces", seed=1, **request) for engine in engines]


def test_the_second_expert_draws_what_the_first_one_began(engines: tuple[Engine, Engine]) -> None:
    alone, both = clips_of(engines, audio="none")
    assert (alone.frames != both.frames).any()


def test_sound_is_made_by_the_expert_that_knows_sound(engines: tuple[Engine, Engine]) -> None:
    """It follows the picture, which the other one has a part in."""
    _, both = clips_of(engines, audio="generate")
    assert both.sound is not None
    assert np.abs(both.sound).max() > 0
    (silent,) = clips_of(engines[1:], audio="none")
    assert (both.frames == silent.frames).all()


def test_a_picture_that_follows_a_given_sound_is_made_by_that_expert(
    engines: tuple[Engine, Engine], tmp_path: Path
) -> None:
    (heard,) = clips_of(engines[:1], audio="generate")
    heard.save(tmp_path / "heard.mp4")
    alone, both = clips_of(engines, audio=str(tmp_path / "heard.mp4"), follow_audio=True)
    assert (alone.frames == both.frames).all()


def test_a_student_is_a_delta_of_the_first_expert(engines: tuple[Engine, Engine]) -> None:
    alone, both = clips_of(engines, audio="none", steps=3)
    assert (alone.frames == both.frames).all()


def test_a_student_may_leave_low_noise_to_the_second_expert(
    engines: tuple[Engine, Engine], tmp_path: Path
) -> None:
    left = []
    for engine in engines:
        folder = Path(shutil.copytree(engine.folder.path, tmp_path / engine.folder.path.name))
        student = engine.folder.few_step
        assert student is not None
        config = replace(student, boundary=0.5)  # its last step of three
        (folder / FEW_STEP / "config.json").write_text(json.dumps(asdict(config)))
        record_files(folder, [f"{FEW_STEP}/config.json"])
        again = load(str(folder), device="cpu", dtype="fp32")
        assert isinstance(again, Engine)
        left.append(again)
    plain = clips_of(engines, audio="none", steps=3)
    alone, both = clips_of((left[0], left[1]), audio="none", steps=3)
    assert (alone.frames == plain[0].frames).all()  # there is no second one
    assert (both.frames != plain[1].frames).any()


def test_an_adapter_of_the_expert_that_rests_is_reported(
    engines: tuple[Engine, Engine], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, both = engines
    with both.loader.use("transformer"):
        adapter = make_adapter(both.loader.expert("transformer_2"), seed=5)
    write_lora(adapter, tmp_path / "low.safetensors", "vidgen")
    asked = {"audio": "none", "lora": [f"{tmp_path / 'low.safetensors'}@low"]}
    (plain,) = clips_of(engines[1:], audio="none")
    (changed,) = clips_of(engines[1:], **asked)
    assert (plain.frames != changed.frames).any()
    assert not caplog.messages
    clips_of(engines[1:], **asked, steps=3)
    assert "low.safetensors@low has no effect" in caplog.text


def test_threads_with_one_engine_take_turns(engines: tuple[Engine, Engine], tmp_path: Path) -> None:
    engine = engines[0]
    with engine.loader.use("transformer"):
        adapter = make_adapter(engine.loader.expert("transformer"), seed=5)
    write_lora(adapter, path := tmp_path / "one.safetensors", "vidgen")

    def made(lora: list[str]) -> np.ndarray:
        return clips_of((engine,), audio="none", lora=lora)[0].frames

    asked = [[], [str(path)], [], [f"{path}:0.5"]]
    expected = [made(lora) for lora in asked]
    with ThreadPoolExecutor(4) as pool:
        for frames, alone in zip(pool.map(made, asked), expected, strict=True):
            assert np.array_equal(frames, alone)
