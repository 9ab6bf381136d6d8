"""Prompts rewritten and scripts drafted by real language models, tiny ones; rubbish is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.language_models import build_language_model
from vidgen.cli.main import main
from vidgen.core.errors import InputError, ModelError
from vidgen.media.probe import read_recipe
from vidgen.pipeline import rewrite
from vidgen.pipeline.rewrite import LanguageModel, fault_of, one_paragraph, rewrite_prompt
from vidgen.story import expand as draft
from vidgen.story.expand import expand_prompts, parse_draft, write_draft
from vidgen.story.script import Script

PROMPT = "a red car bounces"
LONGER = "a red car bounces across the desert at night."
IDEA = "a car meets a cat"
DRAFT = """\
version: 1
project: {title: A car and a cat}
characters:
  car: {description: a red car}
shots:
  - {id: one, prompt: "{car} bounces across the desert", duration: 1}
  - {id: two, prompt: "{car} bounces at night", caption: It was late.}
"""
SPOILT = "version: 1\nshots:\n  - {promt: a cat}\n"


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_language_model(tmp_path_factory.mktemp("lm") / "random")


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rewrites PROMPT, and drafts IDEA at the second try."""
    with pytest.raises(InputError) as refused:
        parse_draft(SPOILT)
    again = f"That can't be read: {refused.value}. Write all of it again, corrected."
    return build_language_model(tmp_path_factory.mktemp("lm") / "taught", [
        (rewrite.INSTRUCTION, [PROMPT], LONGER),
        (draft.INSTRUCTION, [IDEA], f"```yaml\n{SPOILT}```"),
        (draft.INSTRUCTION, [IDEA, f"```yaml\n{SPOILT}```", again], f"```yaml\n{DRAFT}```"),
    ])


def test_a_prompt_is_rewritten_and_the_recipe_keeps_both(
    tmp_path: Path, tiny_model: Path, taught: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    command = ["--model", str(tiny_model), "--seed", "3", "--steps", "1"]
    assert main(["generate", PROMPT, "--expand", str(taught), *command]) == 0
    recipe = read_recipe("a-red-car-bounces-3.mp4")
    assert recipe["plan"]["prompt"] == LONGER
    assert recipe["rewritten"]["prompt"] == PROMPT
    assert recipe["rewritten"]["by"]["sha256"] == LanguageModel(taught).sha256
    assert main(["generate", LONGER, "-o", "same.mp4", *command]) == 0
    capsys.readouterr()
    assert main(["replay", "a-red-car-bounces-3.mp4", "-o", "again.mp4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["identical"]
    assert read_recipe("again.mp4")["rewritten"] == recipe["rewritten"]
    assert "rewritten" not in read_recipe("same.mp4")


def test_rubbish_is_refused_and_nothing_is_made(
    tmp_path: Path, tiny_model: Path, random_model: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["generate", PROMPT, "--expand", str(random_model), "--model", str(tiny_model),
                 "-o", "x.mp4"]) == 2
    told = capsys.readouterr().err
    assert "made of the prompt is of no use" in told
    assert "leave --expand out to use your own words" in told
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_a_chat_template_is_asked_in_plain_words(tmp_path: Path) -> None:
    lesson = (rewrite.INSTRUCTION, [PROMPT], LONGER)
    model = build_language_model(tmp_path / "plain", [lesson], template=None)
    assert rewrite_prompt(model, PROMPT)[0] == LONGER


def test_a_template_that_knows_no_system_role_is_asked_without(tmp_path: Path) -> None:
    template = ("{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
                "{% for message in messages %}{{ message.content }}\n{% endfor %}")
    lesson = (rewrite.INSTRUCTION, [PROMPT], LONGER)
    model = build_language_model(tmp_path / "strict", [lesson], template=template)
    assert rewrite_prompt(model, PROMPT)[0] == LONGER


def test_what_is_no_language_model_is_told(tmp_path: Path, random_model: Path) -> None:
    with pytest.raises(ModelError, match="holds no language model"):
        rewrite_prompt(tmp_path, PROMPT)
    broken = Path(shutil.copytree(random_model, tmp_path / "broken"))
    (broken / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="can't be opened as a language model"):
        rewrite_prompt(broken, PROMPT)
    with pytest.raises(InputError, match=r"reads \d+ with its answer"):
        rewrite_prompt(random_model, "a red car bounces " * 600)


@pytest.mark.parametrize(("text", "fault"), [
    ("A small red car bounces over dunes.", None),
    ("红色的汽车 a red car bounces", None),
    ("", "there is nothing"),
    ("red car bounces " * 30, "it repeats itself"),
    ("A cat sleeps on a chair in the sun.", "it isn't about what the prompt says"),
    ("a red car bounces \ufffd", "signs that are no text"),
    ("a red car bounces \x07", "signs that are no text"),
    ("a red car bounces " + "x" * 20_000, "characters, 20000 are read"),
])
def test_a_rewriting_is_judged(text: str, fault: str | None) -> None:
    found = fault_of(text, PROMPT)
    assert found is None if fault is None else fault in found


def test_an_answer_becomes_one_paragraph() -> None:
    said = '<think>hm\n</think>"A red\n car bounces. It is ni'
    assert one_paragraph(said) == "A red car bounces."
    assert one_paragraph("A red car without an end") == "A red car without an end"


FILM = """\
version: 1
project: {style: by day, defaults: {duration: 0.5, steps: 1, camera: pan-left}}
characters: {car: {description: a red car}}
shots:
  - {id: one, prompt: "{car} bounces"}
  - {id: two, prompt: ["{car} bounces", {at: 0.25, prompt: a tiny dog}]}
"""


def test_a_films_prompts_are_rewritten_and_recipe_and_storyboard_tell_both(
    tmp_path: Path, tiny_model: Path, taught: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script, output = tmp_path / "film.yaml", tmp_path / "film.mp4"
    script.write_text(FILM)
    model = Path(shutil.copytree(taught, tmp_path / "lm"))
    command = ["script", str(script), "-o", str(output), "--model", str(tiny_model), "--expand",
               str(model), "--json"]
    assert main([*command, "--storyboard"]) == 0
    said = capsys.readouterr()
    first, second = json.loads(said.out)["shots"]
    told = f"{LONGER.rstrip('.')}, the camera pans left, by day"
    assert read_recipe(first["path"])["plan"]["prompt"] == told
    assert read_recipe(second["path"])["plan"]["prompt"] == (
        "a tiny dog, the camera pans left, by day")
    assert "the prompt 'a tiny dog' stays as it is" in said.err
    facts = read_recipe(output)["film"]["rewritten"]
    assert facts["prompts"] == [{"prompt": PROMPT, "text": LONGER}]
    assert facts["by"]["sha256"] == LanguageModel(model).sha256
    page = output.with_suffix(".html").read_text()
    assert page.count(told) == page.count(
        f"rewritten from: {PROMPT}, the camera pans left, by day") == 2
    assert script.read_text() == FILM
    assert main(command) == 0  # nothing is written anew, and nobody is asked again
    assert not any(shot["made"] for shot in json.loads(capsys.readouterr().out)["shots"])
    assert main([*command[:6], "--check", "--json"]) == 0  # off by default
    assert not any(s["rendered"] for s in json.loads(capsys.readouterr().out)["shots"])


def test_a_prompt_is_rewritten_once_and_kept_though_it_was_killed(
    tmp_path: Path, taught: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "film.yaml").write_text(FILM)
    script, shots = Script.read(tmp_path / "film.yaml"), tmp_path / "film.shots"
    asked, answer = list[str](), LanguageModel.answer

    def interrupted(self: LanguageModel, instruction: str, turns: list[str], most: int) -> str:
        asked.extend(turns)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return answer(self, instruction, turns, most)

    monkeypatch.setattr(LanguageModel, "answer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        expand_prompts(script, taught, shots, lambda _event: None)
    made = expand_prompts(script, taught, shots, lambda _event: None)
    assert made.texts == {PROMPT: LONGER}
    assert asked == [PROMPT, "a tiny dog", "a tiny dog"]
    assert expand_prompts(script, taught, shots, lambda _event: None) == made
    assert len(asked) == 3
    (shots / "prompts.json").write_text('{"x": 3}')
    assert expand_prompts(script, taught, shots, lambda _event: None) == made


def test_a_film_of_which_nothing_can_be_rewritten_is_refused(
    tmp_path: Path, tiny_model: Path, random_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "film.yaml").write_text(FILM)
    assert main(["script", str(tmp_path / "film.yaml"), "-o", str(tmp_path / "film.mp4"),
                 "--model", str(tiny_model), "--expand", str(random_model)]) == 2
    assert "made of the film's prompts is of no use: " in capsys.readouterr().err
    assert not (tmp_path / "film.mp4").exists()


def test_a_script_is_drafted_at_the_second_try(
    tmp_path: Path, tiny_model: Path, taught: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "film.yaml"
    assert main(["script", str(path), "--draft-from", IDEA, "--expand", str(taught), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["shots"] == ["one", "two"]
    script = Script.read(path)
    assert script.words(script.shots[0], script.shots[0].prompt[0].prompt) == (
        "a red car bounces across the desert")
    made = script.project.drafted_from
    assert (made.idea, made.model) == (IDEA, "taught")
    assert made.sha256 == LanguageModel(taught).sha256
    assert main(["script", str(path), "--check", "--model", str(tiny_model)]) == 0
    assert main(["script", str(path), "--draft-from", IDEA, "--expand", str(taught)]) == 2
    assert "film.yaml exists" in capsys.readouterr().err


def test_a_draft_that_is_no_script_is_refused_and_nothing_is_written(
    tmp_path: Path, random_model: Path
) -> None:
    path = tmp_path / "film.yaml"
    path.write_text("mine")
    with pytest.raises(InputError, match=r"drafted is no script: .*nothing was written"):
        write_draft(random_model, IDEA, path)
    assert path.read_text() == "mine"
    assert [each.name for each in tmp_path.iterdir()] == ["film.yaml"]


@pytest.mark.parametrize(("text", "message"), [
    ("project: {model: ../other}\nshots: [{prompt: x}]", "project can't have the key 'model'"),
    ("shots: [{prompt: x, lora: a.safetensors}]", "shots can't have the key 'lora'"),
    ("shots: [{prompt: x, first_frame: /etc/passwd}]", "shots can't have the key 'first_frame'"),
    ("characters: {a: {description: x, reference: b.png}}\nshots: [{prompt: x}]",
     "characters can't have the key 'reference'"),
    ("finish: {}\nshots: [{prompt: x}]", "script can't have the key 'finish'"),
    ("shots: [{prompt: x, narration: '@/etc/hostname'}]", "narration"),
    ("shots: [" + "{prompt: x}, " * 101 + "]", "it has 101 shots; give 100 at most"),
    ("shots: {prompt: x}", "shots must be a list"),
    ("Once upon a time", "must be a mapping"),
    ("shots: [{prompt: '{nobody} runs'}]", "unknown character or place 'nobody'"),
])
def test_a_draft_names_what_is_seen_and_said_alone(text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_draft(text)
    assert message in str(caught.value)
    assert "/tmp" not in str(caught.value)


@pytest.mark.parametrize(("words", "message"), [
    (["film.yaml", "--draft-from", "x"], "--draft-from IDEA needs --expand FOLDER"),
    (["film.yaml", "--expand", "x"], "film.yaml does not exist"),
    (["film.txt", "--draft-from", "x", "--expand", "y"], "call it film.yaml"),
    (["film.yaml", "--draft-from", " ", "--expand", "y"], "the idea is empty"),
])
def test_wrong_commands_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    words: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["script", *words]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
