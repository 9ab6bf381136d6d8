"""A first frame drawn by a text-to-image model, alone and as the beginning of a clip."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.stopping import stop_at
from tests.tiny.diffusers_models import build_diffusers_model, open_diffusers_model
from vidgen.core.errors import Cancelled, InputError, ModelError
from vidgen.pipeline.diffusers_backend.engine import draw_first_frame

PROMPT = "a red car bounces across the desert"
Models = Callable[[str], Path]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    root = tmp_path_factory.mktemp("first_frame")

    def folder(family: str) -> Path:
        path = root / family
        return path if path.exists() else build_diffusers_model(family, path)

    return folder


def draw(path: Path, seed: int = 1, negative: str | None = None, **options: Any) -> Any:
    dtype = options.pop("dtype", "fp32")
    return draw_first_frame(str(path), (48, 32), torch.device("cpu"), dtype, prompt=PROMPT,
                            negative=negative, seed=seed, **{"steps": 2, **options})


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_a_seed_draws_one_picture(models: Models, family: str) -> None:
    path, events = models(family), []
    picture, record = draw(path, on_event=events.append)
    assert picture.shape == (32, 48, 3)
    assert picture.dtype == np.uint8
    assert picture.std() > 1
    assert np.array_equal(draw(path)[0], picture)
    assert not np.array_equal(draw(path, seed=2)[0], picture)
    assert not np.array_equal(draw(path, negative="a cat")[0], picture)
    assert [e.done for e in events if e.stage == "sample"] == [1, 2]
    record = json.loads(json.dumps(record))
    assert record["option"] == "first_frame_model"
    assert (record["plan"]["seed"], record["plan"]["num_steps"]) == (1, 2)
    assert len(record["model"]["sha256"]) == 64


def test_it_is_drawn_at_the_models_own_area(models: Models) -> None:
    plan = draw(models("sdxl"))[1]["plan"]
    assert (plan["width"], plan["height"]) == (80, 56)  # near 64 x 64 pixels at 3 to 2


def test_flux_draws_without_a_negative(
    models: Models, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    abilities = "vidgen.pipeline.diffusers_backend.plan.Abilities"
    monkeypatch.setattr(f"{abilities}.default_size", lambda _: (64, 64))
    with caplog.at_level(logging.WARNING):
        picture, record = draw(models("flux"), negative="a cat", dtype="bf16")
    assert picture.shape == (32, 48, 3)
    assert "reads no negative prompt" in caplog.text
    assert record["dtype"] == "bf16"


def test_text_becomes_picture_becomes_clip(models: Models) -> None:
    engine, drawer = open_diffusers_model(models("ltx")), models("sdxl")
    options: dict[str, Any] = {"size": "64x32", "frames": 9, "steps": 2, "seed": 4}
    clip = engine.generate(PROMPT, first_frame_model=str(drawer), **options)
    assert clip.recipe["plan"]["pipeline"] == "LTXImageToVideoPipeline"
    drawn = next(r for r in clip.recipe["inputs"] if r["option"] == "first_frame_model")
    assert drawn["plan"]["seed"] == 4
    picture, _ = draw_first_frame(str(drawer), (64, 32), torch.device("cpu"), "fp32",
                                  prompt=PROMPT, seed=4)
    shown = engine.generate(PROMPT, image=picture, **options)
    assert np.array_equal(clip.frames, shown.frames)


def test_an_image_model_makes_images(models: Models, tmp_path: Path) -> None:
    engine = open_diffusers_model(models("sdxl"))
    options: dict[str, Any] = {"steps": 2, "seed": 1, "guidance": 3.0, "negative": "a cat"}
    clip = engine.generate(PROMPT, frames=1, size="48x32", **options)
    assert clip.save(tmp_path / "still.png").stat().st_size > 0
    assert clip.frames.shape == (1, 32, 48, 3)
    assert engine.generate(PROMPT, **options).size == (64, 64)
    with pytest.raises(InputError, match="makes one picture"):
        engine.generate(PROMPT, frames=9)
    with pytest.raises(InputError, match="seconds can't be honoured"):
        engine.generate(PROMPT, seconds=1.0)


def test_drawing_can_be_stopped(models: Models) -> None:
    with pytest.raises(Cancelled):
        draw(models("sdxl"), on_event=stop_at(1))


def test_what_is_no_image_model_is_refused(
    models: Models, tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="LTXPipeline"):
        draw(models("ltx"))
    with pytest.raises(ModelError, match="no text-to-image model"):
        draw(tiny_model)
    with pytest.raises(ModelError, match="nowhere"):
        draw(tmp_path / "nowhere")
