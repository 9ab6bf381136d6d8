"""Scripts that can't be rendered, told before anything is; what a check of a film tells."""

from __future__ import annotations

import json
import shutil
import time
import tracemalloc
from pathlib import Path

import pytest
from PIL import Image

from tests.commands import vidgen
from vidgen.cli.main import main
from vidgen.story.plan import plan_film
from vidgen.story.script import Script
from vidgen.weights.layouts import open_model


def limited(model: Path, folder: Path, *tasks: str) -> Path:
    """A copy of a model that learned these tasks alone."""
    copy = Path(shutil.copytree(model, folder / "limited"))
    info = json.loads((copy / "model.json").read_text())
    (copy / "model.json").write_text(json.dumps(info | {"tasks": list(tasks)}))
    return copy


@pytest.mark.parametrize(("shot", "message"), [
    ("duration: 0.01", "line 2: shot 'a': duration 0.01 s is less than a frame at 12 fps; the "
     "nearest is 0.08333 s"),
    ("frames: 8", "the nearest are 5 and 9"),
    ("prompt: [x, {at: 5, prompt: y}]", "the prompt at 5 s has no frame of its own"),
    ("sampler: eulr", "did you mean 'euler'"),
    ("steps: 2000", "steps is 2000; give a whole number from 1 to 1000"),
    ("guidance: -1", "guidance is -1"),
    ("seed: -1", "seed is -1"),
    ("lora: none.safetensors", "LoRA none.safetensors does not exist"),
    (f"prompt: {'a red car ' * 300}", "this model reads"),
    ("prompt: x, duration: 3600", None),
    ("prompt: x, duration: 3000}\n  - {id: b, prompt: x, duration: 700, continue_from: a",
     "line 3: shot 'b': it lasts 3700 s with the shot that it continues"),
])
def test_what_cannot_be_made_is_reported_beforehand(tmp_path, tiny_model, capsys, shot, message):
    prompt = "" if "prompt" in shot else "prompt: x, "
    script = tmp_path / "film.yaml"
    script.write_text(f"shots:\n  - {{id: a, {prompt}{shot}}}\n")
    code = main(["script", str(script), "--check", "--model", str(tiny_model)])
    told = capsys.readouterr().err
    assert code == (0 if message is None else 2), told
    assert message is None or message in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["film.yaml"]


@pytest.mark.parametrize(("text", "message"), [
    ("shots: [{id: a, prompt: x, duration: 2}]", "the nearest is a duration of 1.417 s"),
    ("shots: [{id: a, prompt: x}, {id: b, prompt: x, continue_from: a}]",
     "continue_from: model 'tiny' can't continue latents; give first_frame: {shot: ID}"),
    ("shots: [{id: a, prompt: [x, {at: 0.5, prompt: y}]}]", "several prompts: model 'tiny'"),
    ("shots: [{id: a, prompt: x}, {id: b, prompt: x, first_frame: {shot: a}}]",
     "doesn't support image"),
])
def test_what_a_model_never_learned_is_reported_beforehand(
    tmp_path, tiny_model, capsys, text, message
):
    (tmp_path / "film.yaml").write_text(text)
    model = limited(tiny_model, tmp_path, "text")
    assert main(["script", str(tmp_path / "film.yaml"), "--check", "--model", str(model)]) == 2
    assert message in capsys.readouterr().err


def test_a_model_without_references_says_how_characters_are_kept(tmp_path, tiny_model, caplog):
    Image.new("RGB", (8, 8)).save(tmp_path / "cat.png")
    (tmp_path / "film.yaml").write_text(
        "characters: {cat: {description: a cat, reference: cat.png}}\nshots: [{prompt: '{cat}'}]")
    plan_film(Script.read(tmp_path / "film.yaml"),
              open_model(str(limited(tiny_model, tmp_path, "text"))))
    assert "takes no references; characters are kept by their words and seeds" in caplog.text


@pytest.mark.parametrize(("words", "message"), [
    ([], "no script was named"),
    (["film.yaml", "-o", "film.gif"], "must be a film"),
    (["film.yaml", "-o", "film.avi"], "unknown suffix"),
    (["film.yaml", "--only", "on"], "unknown shot 'on'; did you mean 'one'"),
    (["film.yaml", "--model", "nothing"], "neither an embedded model"),
    (["film.yaml", "--init"], "film.yaml exists"),
    (["film.txt", "--init"], "call it film.yaml"),
    (["none.yaml"], "does not exist"),
    (["hidden.yaml"], "every shot has in_film: false"),
    (["hidden.yaml", "--check"], "every shot has in_film: false"),
    (["film.yaml", "--only", "one", "--storyboard"], "--only makes none"),
    (["film.yaml", "--check", "--otio"], "--check makes none"),
    (["film.yaml", "--only", "one", "-o", "sub/film.mp4"], "the folder sub does not exist"),
    (["long.yaml", "--check"], "line 2: shot 'a': the caption"),
    (["long.yaml"], "lines, but a picture of 32x32 has room for 2"),
])
def test_wrong_commands_are_reported(tmp_path, tiny_model, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    Path("film.yaml").write_text("shots: [{id: one, prompt: a red car bounces}]")
    Path("hidden.yaml").write_text("shots: [{prompt: x, in_film: false}]")
    Path("long.yaml").write_text("project: {finish: {captions: burn}}\nshots: [{id: a, prompt: x, "
                                 "caption: one two three four five six}]")
    model = [] if "--model" in words else ["--model", str(tiny_model)]
    assert main(["script", *words, *model]) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["film.yaml", "hidden.yaml",
                                                                "long.yaml"]


def test_a_check_tells_time_memory_and_strange_words(tmp_path, tiny_model):
    (tmp_path / "list.txt").write_text("a red car bounces\na lighthouse\n")
    told = vidgen("script", tmp_path / "list.txt", "--check", "--model", tiny_model)
    assert told["film"]["shots"] == 2
    assert told["film"]["rendered"] == 0
    assert told["film"]["seconds"] == sum(shot["seconds"] for shot in told["shots"]) > 0
    assert told["film"]["peak_bytes"] == max(shot["peak_bytes"] for shot in told["shots"]) > 1e6
    assert any("'lighthouse'" in note for note in told["notes"])
    assert not any("'car'" in note for note in told["notes"])


def test_without_its_package_an_edit_is_refused_before_anything_is_made(
    tmp_path, tiny_model, capsys, monkeypatch
):
    monkeypatch.setattr("vidgen.cli.script.find_spec", lambda _name: None)
    (tmp_path / "film.yaml").write_text("shots: [{prompt: a cat}]")
    command = ["script", str(tmp_path / "film.yaml"), "--otio", "--model", str(tiny_model)]
    assert main([*command, "-o", str(tmp_path / "film.mp4")]) == 2
    assert "pip install 'vidgen[otio]'" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["film.yaml"]


def test_what_does_not_fit_is_refused_before_the_first_shot(tmp_path, tiny_model, capsys):
    script = tmp_path / "film.yaml"
    script.write_text("project: {size: 8192x8192}\nshots: [{id: a, prompt: x, duration: 60}]")
    for words in ([], ["--check"]):
        assert main(["script", str(script), "-o", str(tmp_path / "film.mp4"), *words, "--tiles",
                     "none", "--model", str(tiny_model)]) == 2
        told = capsys.readouterr().err
        assert "film.yaml, line 2: shot 'a': a clip of" in told
        assert "are free" in told


@pytest.mark.parametrize("count", [2_000, pytest.param(10_000, marks=pytest.mark.long)])
def test_thousands_of_shots_are_planned_in_seconds_and_little_memory(tmp_path, tiny_model, count):
    lines = [f"  - {{id: s{n}, prompt: a red car {n}, takes: {1 + n % 2}"
             + (f", continue_from: s{n - 1}}}" if n else "}") for n in range(count)]
    path = tmp_path / "film.yaml"
    path.write_text("\n".join(["shots:", *lines]))
    folder, script = open_model(str(tiny_model)), Script.read(path)
    start = time.process_time()
    film = plan_film(script, folder)
    assert time.process_time() - start < 0.006 * count
    assert len({plan.key for plan in film.shots.values()}) == count
    path.write_text("\n".join(["shots:", *lines[:1_000]]))  # to trace is to crawl
    script = Script.read(path)
    tracemalloc.start()
    plan_film(script, folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000 * 1_000


@pytest.mark.parametrize(("keys", "message"), [
    ("first_frame: bad.png", "line 2: shot 'a': image bad.png is not a picture"),
    ("sound: {file: bad.png}", "line 2: shot 'a': sound bad.png is a video without sound"),
    ("music: bad.png", "line 2: shot 'a': sound bad.png is a video without sound"),
    ("narration: {text: hi, voice: nobody}", "line 2: shot 'a': voice 'nobody' is unknown"),
    ("caption: hi", "film.yaml: texts: font bad.png can't be read"),
    ("prompt: a cat", "film.yaml: project.finish.codec: codec 'h266' is unknown; did you mean"),
])
def test_files_and_names_that_cannot_be_used_cost_no_rendering(
    tmp_path, tiny_model, capsys, monkeypatch, keys, message
):
    monkeypatch.chdir(tmp_path)
    Path("bad.png").write_bytes(b"no picture")
    finish = {"caption: hi": "captions: burn, font: bad.png", "prompt: a cat": "codec: h266"}
    prompt = "" if "prompt" in keys else "prompt: x, "
    Path("film.yaml").write_text(
        f"project: {{finish: {{{finish.get(keys, '')}}}}}\nshots: [{{id: a, {prompt}{keys}}}]\n")
    for words in (["--check"], []):
        assert main(["script", "film.yaml", *words, "--model", str(tiny_model)]) == 2
        assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.png", "film.yaml"]
