"""An engine's clips: marked, labelled on request, refused by a policy before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.stopping import stop_at
from tests.tiny.diffusers_models import build_diffusers_model, open_diffusers_model
from tests.tiny.test_provenance import plain_environment  # noqa: F401 - a fixture
from vidgen.cli.main import main
from vidgen.core.errors import Cancelled, InputError
from vidgen.core.request import Request
from vidgen.media.clip import Clip
from vidgen.media.manifest import read_marks
from vidgen.media.provenance import GENERATED
from vidgen.pipeline.engine import Engine, load
from vidgen.pipeline.journal import journal
from vidgen.pipeline.journal.journal import Journal
from vidgen.pipeline.policy import WordList

PROMPT = "a red car bounces across the desert"


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Engine:
    return load(str(tiny_model), device="cpu", dtype="fp32")


@pytest.fixture(scope="module")
def diffusers_engine(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("models") / "ltx"
    return open_diffusers_model(build_diffusers_model("ltx", folder))


def test_a_clip_has_its_time_and_id_from_the_engine_on(engine, tmp_path):
    first, second = engine.generate(PROMPT, seed=1, count=2)
    assert first.recipe["id"] != second.recipe["id"]
    marks = read_marks(first.save(tmp_path / "a.mp4"))
    assert (marks.id, marks.time) == (first.recipe["id"], first.recipe["created"])
    assert (marks.digital_source_type, marks.model) == (GENERATED, engine.folder.name)
    assert read_marks(first.save(tmp_path / "again.webm")).id == marks.id


def test_a_clip_that_continues_keeps_its_stamp(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "PATIENCE", 0)
    out = tmp_path / "a.mp4"
    with pytest.raises(Cancelled):
        engine.generate(PROMPT, seed=1, journal=Journal(out), on_event=stop_at(1))
    kept = Journal(out, resume=True)
    begun = kept.recipe
    clip = engine.generate(PROMPT, seed=1, journal=kept)
    marks = read_marks(clip.save(out))
    assert begun is not None
    assert (marks.id, marks.time) == (begun["id"], begun["created"])


def test_with_a_given_time_a_request_gives_the_same_file(engine, tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1790000000")
    files = [engine.generate(PROMPT, seed=1).save(tmp_path / f"{n}.mp4") for n in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("which", ["engine", "diffusers_engine"])
def test_a_label_is_burnt_in_on_request_and_recorded(which, request, tmp_path):
    maker = request.getfixturevalue(which)
    options = {"seed": 1, "frames": 9, "size": "64x64", "steps": 1}
    clip = maker.generate(PROMPT, **options)
    plain, labelled = (Clip.from_file(clip.save(tmp_path / f"{label}.mkv", label=label))
                       for label in ("none", "visible"))
    changed = (plain.frames != labelled.frames).any(-1)
    assert changed.any((1, 2)).all()
    assert not changed[:, :32].any()
    assert labelled.recipe["label"] == "visible"
    assert "label" not in plain.recipe


@pytest.mark.parametrize("which", ["engine", "diffusers_engine"])
def test_a_policy_is_asked_before_anything_is_done(which, request, monkeypatch):
    maker = request.getfixturevalue(which)
    monkeypatch.setattr(maker, "policy", WordList(["car"]))
    asked = Request(prompt=PROMPT, image="missing.png", negative="car")
    with pytest.raises(InputError, match="refuses 'car'"):
        maker.generate(asked)


def test_a_policy_comes_with_the_engine_or_from_the_environment(tiny_model, tmp_path, monkeypatch):
    def none_at_all(prompt: str, _request: Request) -> str:
        return f"{prompt!r} is one prompt too many"

    engine = load(str(tiny_model), device="cpu", dtype="fp32", policy=none_at_all)
    with pytest.raises(InputError, match="one prompt too many"):
        engine.generate("a cat")
    words = tmp_path / "words.txt"
    words.write_text("cat\n")
    monkeypatch.setenv("VIDGEN_POLICY", str(words))
    engine = load(str(tiny_model), device="cpu", dtype="fp32")
    with pytest.raises(InputError, match="refuses 'cat'"):
        engine.generate("a Cat!")
    assert isinstance(engine.generate("a car", seed=1, negative="cat"), Clip)
    monkeypatch.setenv("VIDGEN_POLICY", str(tmp_path / "none.txt"))
    with pytest.raises(InputError, match=r"none\.txt can't be read"):
        load(str(tiny_model))


@pytest.mark.parametrize(("command", "message"), [
    (["sweep", "a cat", "--over", "prompt:cat=dog,gun", "-o", "s.png"],
     "the policy refuses the prompt"),
    (["plan", "a gun"], "the policy refuses the prompt"),
    (["script", "film.yaml"], "line 3: shot 'b': the policy refuses the prompt"),
    (["script", "said.yaml"], "line 3: shot 'b': the policy refuses the speech"),
    (["script", "played.yaml", "--check"], "line 2: shot 'a': the policy refuses the music"),
])
def test_all_of_a_command_is_judged_before_any_of_it_is_made(
    tiny_model, tmp_path, monkeypatch, capsys, command, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.txt").write_text("gun\n")
    for name, first, second in (
        ("film", "prompt: a cat", "prompt: a gun"),
        ("said", "prompt: a cat", "prompt: a dog, narration: he has a gun"),
        ("played", "prompt: a cat, music: {prompt: gun shots}", "prompt: a dog"),
    ):
        text = f"shots:\n  - {{id: a, {first}}}\n  - {{id: b, {second}}}\n"
        (tmp_path / f"{name}.yaml").write_text(text)
    before = sorted(tmp_path.iterdir())
    monkeypatch.setenv("VIDGEN_POLICY", "words.txt")
    assert main([*command, "--model", str(tiny_model)]) == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_a_certificate_that_cannot_sign_is_reported_before_the_work(tiny_model, monkeypatch):
    monkeypatch.setenv("VIDGEN_C2PA_CERTIFICATE", "mine.pem")
    with pytest.raises(InputError, match="VIDGEN_C2PA_KEY"):
        load(str(tiny_model))


def test_frames_of_a_labelled_clip_are_labelled_once(engine, tmp_path):
    clip = engine.generate(PROMPT, seed=1, size="64x64")
    stored = Clip.from_file(clip.save(tmp_path / "a.mkv", label="visible"))
    assert not np.array_equal(stored.frames, clip.frames)
    again = Clip.from_file(stored.save(tmp_path / "b.mkv", label="visible"))
    assert np.array_equal(again.frames, stored.frames)


def test_a_clip_has_the_marks_of_its_journal(engine, tmp_path):
    out, marks = tmp_path / "a.mkv", {"label": "visible", "aigc": "ACME"}
    clip = engine.generate(PROMPT, seed=1, journal=Journal(out, marks=marks))
    with pytest.raises(InputError, match="give label and aigc to the journal"):
        clip.save(out, aigc="Other")
    recipe = Clip.from_file(clip.save(out)).recipe
    assert {name: recipe[name] for name in marks} == marks
    with pytest.raises(InputError, match='label was "visible", is null'):
        engine.generate(PROMPT, seed=1, journal=Journal(out, resume=True))
    assert engine.generate(PROMPT, seed=1, journal=Journal(out, resume=True, marks=marks))
