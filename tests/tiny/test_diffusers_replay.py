"""Recipes of other families' clips suffice, in the same words as ours."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from tests.tiny.diffusers_models import build_diffusers_model, open_diffusers_model
from vidgen.cli.main import main
from vidgen.media.clip import Clip
from vidgen.pipeline.recorded import differences
from vidgen.pipeline.replay import keep_origin, request_from_recipe

PROMPT = "a red car bounces across the desert"
PICTURE = np.random.default_rng(0).integers(0, 255, (40, 48, 3), dtype=np.uint8)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "text": ("ltx", {"size": "64x32", "seconds": 0.5, "fps": 15, "negative": "a cat"}),
    "its own length": ("mochi", {"size": "32x32"}),
    "image": ("ltx", {"size": "64x32", "frames": 9, "image": PICTURE}),
    "frames cut": ("hunyuan_i2v", {"size": "32x32", "frames": 9, "image": PICTURE}),
    "sampler": ("skyreels", {"size": "32x32", "frames": 9, "sampler": "euler", "shift": 3.0}),
    "scheduler": ("skyreels", {"size": "32x32", "frames": 9, "sampler":
                               diffusers.FlowMatchEulerDiscreteScheduler(shift=4.0)}),
    "noise": ("ltx", {"size": "64x32", "frames": 9, "latents": torch.randn(1, 4, 8)}),
    "still": ("sd3", {"size": "32x32", "frames": 1}),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("foreign")

    def folder(family: str) -> Path:
        path = root / family
        return path if path.exists() else build_diffusers_model(family, path)

    return folder


@pytest.mark.parametrize("case", CASES)
def test_a_recipe_gives_the_same_clip(
    models: Callable[[str], Path], case: str, tmp_path: Path
) -> None:
    family, options = CASES[case]
    engine = open_diffusers_model(models(family))
    made = engine.generate(PROMPT, seed=5, steps=2, **options)
    recipe = json.loads(json.dumps(made.recipe))
    again = engine.generate(request_from_recipe(recipe, tmp_path))
    assert np.array_equal(again.frames, made.frames)
    assert differences(recipe, json.loads(json.dumps(again.recipe))) == {}


def test_the_command_line_replays_them(
    models: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = open_diffusers_model(models("ltx"))
    path = engine.generate(PROMPT, seed=5, steps=2, size="64x32", frames=9).save(tmp_path / "a.mkv")
    assert main(["replay", str(path), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["identical"]
    assert result["differences"] == {}


def test_a_clip_is_made_again_from_its_reimagined_one(
    models: Callable[[str], Path], tmp_path: Path
) -> None:
    engine = open_diffusers_model(models("cogvideox"))
    options = {"seed": 5, "steps": 2, "size": "32x32"}
    source = engine.generate(PROMPT, frames=9, **options).save(tmp_path / "a.mkv")
    made = engine.generate(PROMPT, video=str(source), strength=0.7, **options)
    source.unlink()
    again = engine.generate(request_from_recipe(json.loads(json.dumps(made.recipe)), tmp_path))
    assert np.array_equal(again.frames, made.frames)


def test_a_drawn_first_frame_is_restored_and_its_model_still_named(
    models: Callable[[str], Path], tmp_path: Path
) -> None:
    engine = open_diffusers_model(models("ltx"))
    options: dict[str, Any] = {"seed": 5, "steps": 2, "size": "64x32", "frames": 9}
    drawer = str(models("sdxl"))
    made = engine.generate(PROMPT, first_frame_model=drawer, **options)
    recipe = json.loads(json.dumps(made.recipe))
    request = request_from_recipe(recipe, tmp_path)
    assert request.first_frame_model is None
    again = engine.generate(request)
    assert np.array_equal(again.frames, made.frames)
    keep_origin(again.recipe, recipe)
    assert [each["option"] for each in again.recipe["inputs"]] == ["image", "first_frame_model"]
    del recipe["inputs"][0]["content"]  # as where it was too large
    request = request_from_recipe(recipe, tmp_path)
    assert request.first_frame_model == drawer
    assert np.array_equal(engine.generate(request).frames, made.frames)


def test_sound_is_compared_too(
    models: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = open_diffusers_model(models("ltx2"))
    clip = engine.generate(PROMPT, seed=5, steps=2, size="64x64", frames=9)
    path = clip.save(tmp_path / "a.mkv")
    assert Clip.from_file(path).sound is not None
    assert main(["replay", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["identical"]
