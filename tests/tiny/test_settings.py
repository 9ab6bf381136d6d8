"""Settings of one model: which there are, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vidgen.cli.main import main
from vidgen.core.errors import InputError, ModelError
from vidgen.core.request import Request, silenced
from vidgen.pipeline.plan import make_plan
from vidgen.pipeline.settings import SETTINGS, check_settings, settings_of
from vidgen.weights.folder import ModelFolder
from vidgen.weights.layouts import open_model

PROMPT = "a red car"


@pytest.fixture(scope="module")
def folder(tiny_model: Path) -> ModelFolder:
    folder = open_model(str(tiny_model))
    assert isinstance(folder, ModelFolder)
    defaults = replace(folder.defaults, settings={"refine": 3, "candidates": 2})
    return replace(folder, defaults=defaults, tasks=(*folder.tasks, "anchor"))


@pytest.mark.parametrize(("settings", "told"), [
    ({"candidate": 2}, "tiny has no setting 'candidate'; did you mean 'candidates'?"),
    ({"xyz": 2}, "tiny has no setting 'xyz'; known: anchor, candidates, colour_hold, overlap"),
    ({"anchor": 5}, "anchor is 5; give True or False"),
    ({"candidates": 65}, "candidates is 65; give a whole number from 1 to 64"),
    ({"candidates": 1.5}, r"candidates is 1\.5; give a whole number from 1 to 64"),
    ({"candidates": True}, "candidates is True; give a whole number"),
    ({"regional_prompts": 2}, "regional_prompts is 2; give a number from 0 to 1"),
    ({"refine": 9}, "refine needs image or first_frame_model; add it or leave refine out"),
])
def test_what_does_not_suit_is_refused(
    folder: ModelFolder, settings: dict[str, Any], told: str
) -> None:
    with pytest.raises(InputError, match=told):
        make_plan(Request.of(PROMPT, {"settings": settings}), folder)


def test_a_model_whose_own_settings_are_wrong_is_refused(folder: ModelFolder) -> None:
    for wrong, told in (({"refin": 1}, "has an unknown setting 'refin'; did you mean 'refine'"),
                        ({"refine": -1}, "model.json: refine is -1; give a whole number")):
        model = replace(folder, defaults=replace(folder.defaults, settings=wrong))
        with pytest.raises(ModelError, match=told):
            check_settings(Request(prompt=PROMPT), model)


def test_a_model_lists_its_settings(
    folder: ModelFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert settings_of(folder) == {
        "anchor": True, "candidates": 2, "colour_hold": 0.5, "overlap": 3, "refine": 3}
    assert main(["models", "--json"]) == 0
    (embedded,) = (each for each in json.loads(capsys.readouterr().out)
                   if each["name"] == "toybox")
    assert embedded["settings"].keys() == SETTINGS.keys()
    assert main(["models"]) == 0
    assert "--set anchor=true, audio_candidates=12" in capsys.readouterr().out


def test_words_and_values_of_python_are_the_same() -> None:
    words = ["audio-steps=4", "audio_delay=0.1", "anchor=false", "regional_prompts=1"]
    values = {"audio_steps": 4, "audio_delay": 0.1, "anchor": False, "regional_prompts": 1,
              "refine": None}
    one, other = (Request.of(PROMPT, {"settings": given}) for given in (words, values))
    assert one == other
    assert one.settings == {name: v for name, v in values.items() if v is not None}
    assert silenced(one.settings) == {
        "audio": "none", "settings": {"anchor": False, "regional_prompts": 1}}
