"""Films of a tiny model: shots rendered once, continued by latents, chosen among takes, joined."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.commands import vidgen
from tests.models import add_verifier, build_tiny_model
from vidgen.cli.main import main
from vidgen.core.request import Request
from vidgen.media.clip import Clip
from vidgen.media.probe import read_recipe
from vidgen.pipeline.best_of_n import VERIFIER
from vidgen.pipeline.engine import load
from vidgen.pipeline.journal.journal import Journal
from vidgen.story.plan import plan_film
from vidgen.story.script import Script
from vidgen.weights.layouts import open_model

FILM = """\
version: 1
project: {title: A film, dtype: fp32, defaults: {duration: 1}}
characters:
  car: {description: a red car, seed: 7}
shots:
  - {id: one, prompt: "{car} bounces", caption: hello}
  - {id: two, prompt: "{car} moves left", continue_from: one, steps: 3}
  - id: three
    prompt: [a cat moves left, {at: 0.5, prompt: a cat bounces}]
    takes: 2
    seed: 3
  - {id: four, prompt: a red car, continue_from: three}
  - {id: still, prompt: a cat, frames: 1, in_film: false}
  - {id: five, prompt: a cat bounces, first_frame: {shot: still}, last_frame: {shot: one}}
"""
Edit = tuple[str, str]


@pytest.fixture(scope="module")
def rendered(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder with a script, its film and shots; and what the command told."""
    folder = tmp_path_factory.mktemp("film")
    script = folder / "film.yaml"
    script.write_text(FILM)
    return folder, vidgen("script", script, "-o", folder / "film.mp4", "--model", tiny_model)


@pytest.fixture
def film(rendered: tuple[Path, Any], tmp_path: Path) -> Path:
    """A copy of the rendered film's folder, to be changed."""
    return Path(shutil.copytree(rendered[0], tmp_path / "copy"))


@pytest.fixture
def check(film: Path, tiny_model: Path) -> Callable[..., list[str]]:
    """Which shots are still to be rendered after changes to the script."""

    def call(*edits: Edit) -> list[str]:
        text = FILM
        for old, new in edits:
            assert old in text
            text = text.replace(old, new)
        (film / "film.yaml").write_text(text)
        told = vidgen("script", film / "film.yaml", "--check", "-o", film / "film.mp4",
                      "--model", tiny_model)
        return [shot["id"] for shot in told["shots"] if not shot["rendered"]]

    return call


def frames(path: str | Path) -> np.ndarray:
    return Clip.from_file(path).frames


def test_a_film_is_its_shots_one_after_the_other(rendered):
    folder, told = rendered
    shots = {shot["id"]: shot for shot in told["shots"]}
    shown = [frames(shots[name]["path"]) for name in ("one", "two", "three", "four", "five")]
    assert [len(each) for each in shown] == [12] * 5
    assert (frames(folder / "film.mp4") == np.concatenate(shown)).all()
    recipe = read_recipe(folder / "film.mp4")
    assert [each["id"] for each in recipe["film"]["shots"]] == ["one", "two", "three", "four",
                                                               "five"]
    assert recipe["film"]["script"]["project"]["title"] == "A film"
    assert recipe["model"]["name"] == "tiny"
    assert (folder / "film.yaml").read_text() == FILM


def test_the_result_tells_those_who_join_all_they_need(rendered):
    shots = rendered[1]["shots"]
    one = shots[0]
    assert (one["num_frames"], one["duration_s"], one["seed"]) == (12, 1.0, 7)
    assert (one["fps"], one["width"], one["height"]) == ("12", 32, 32)
    assert one["shot"]["caption"] == [{"text": "hello", "at": 0.0, "duration": None}]
    assert shots[4]["shot"]["in_film"] is False


def test_a_shot_that_continues_holds_what_an_extension_adds(rendered, tiny_model):
    shots = {shot["id"]: shot for shot in rendered[1]["shots"]}
    recipe = read_recipe(shots["two"]["path"])
    assert (recipe["hand_over"], recipe["head_frames"]) == ("latents", 12)
    engine = load(str(tiny_model), device="cpu", dtype="fp32")
    whole = engine.generate("a red car moves left", seed=7, seconds=2, steps=3,
                            prefix=shots["one"]["path"])
    path = Path(shots["two"]["path"]).with_name("whole.mp4")
    whole.save(path, overwrite=True)
    assert (frames(path)[12:] == frames(shots["two"]["path"])).all()
    path.unlink()


def test_a_chain_continues_from_latents_whatever_lies_between(rendered):
    shots = {shot["id"]: shot for shot in rendered[1]["shots"]}
    four, three = (read_recipe(shots[name]["path"]) for name in ("four", "three"))
    assert four["hand_over"] == three["hand_over"] == "latents"
    assert (four["head_frames"], three.get("head_frames")) == (12, None)
    assert four["tail"]["num_latents"] > three["tail"]["num_latents"]
    assert {f["kind"] for shot in shots.values() for f in shot["checks"]["findings"]}.isdisjoint(
        {"length", "fps"})
    assert main(["check", shots["two"]["path"]]) in (0, 1)
    assert vidgen("inspect", shots["two"]["path"])["recipe"]["head_frames"] == 12


def test_prompts_of_a_shot_follow_each_other_at_their_times(rendered):
    three = next(shot for shot in rendered[1]["shots"] if shot["id"] == "three")
    folder = Path(three["path"]).parent
    begins = [path for path in folder.glob("*.mp4") if Clip.from_file(path).num_frames == 6]
    assert len(begins) == 2  # of each take
    assert any((frames(path) == frames(three["path"])[:6]).all() for path in begins)
    assert read_recipe(three["path"])["plan"]["prompt"] == "a cat bounces"


def test_of_several_takes_the_best_is_kept_with_reasons(rendered):
    folder, told = rendered
    three = next(shot for shot in told["shots"] if shot["id"] == "three")
    choice = three["choice"]
    assert [take["seed"] for take in choice["takes"]] == [3, 4]
    assert choice["seed"] == three["seed"]
    assert all(take["reasons"] and not take["verified"] for take in choice["takes"])
    assert f"next was seed {7 - choice['seed']}: " in choice["why"]
    kept = next(take for take in choice["takes"] if take["seed"] == choice["seed"])
    assert folder / "film.shots" / kept["path"] == Path(three["path"])
    prefix = read_recipe(told["shots"][3]["path"])["inputs"][0]
    assert (prefix["option"], prefix["path"]) == ("prefix", Path(three["path"]).name)


def test_a_take_that_is_another_shots_is_made_once_and_compared(tmp_path, tiny_model):
    script = tmp_path / "film.yaml"
    script.write_text("shots: [{id: a, prompt: a cat, frames: 5, seed: 3},\n"
                      "  {id: b, prompt: a cat, frames: 5, seed: 3, takes: 2}]\n")
    command = ["script", script, "-o", tmp_path / "film.mp4", "--model", tiny_model]
    vidgen(*command, "--only", "a")
    one, two = vidgen(*command)["shots"]
    assert (one["made"], one["choice"]) == (False, None)
    assert [take["seed"] for take in two["choice"]["takes"]] == [3, 4]
    assert len([*(tmp_path / "film.shots").glob("*.mp4")]) == 2


def test_a_verifier_scores_each_prompt_of_every_take(tmp_path_factory, tmp_path):
    model = add_verifier(build_tiny_model(tmp_path_factory.mktemp("models") / "sure"))
    script = tmp_path / "film.yaml"
    script.write_text(FILM)
    told = vidgen("script", script, "-o", tmp_path / "film.mp4", "--only", "three", "--model",
                  model)
    (three,) = told["shots"]
    takes = three["choice"]["takes"]
    assert [[each["names"] for each in take["verified"]] for take in takes] == [["cat", "cat"]] * 2
    with load(str(model), device="cpu", dtype="fp32").loader.use(VERIFIER) as verifier:
        enough = verifier.config.enough
    for take in takes:
        assert all(0 < each["score"] < 1 for each in take["verified"])
        assert all(each["is_enough"] == (each["score"] >= enough) for each in take["verified"])
        assert f"cat ({take['verified'][1]['score']:.2f})" in take["reasons"][-1]
    best = next(take for take in takes if take["seed"] == three["seed"])
    assert three["choice"]["why"].startswith("; ".join(best["reasons"]))


def test_what_is_there_is_not_made_again(film, tiny_model, capsys):
    before = {path: path.stat().st_mtime_ns for path in film.rglob("*.mp4")}
    told = vidgen("script", film / "film.yaml", "-o", film / "film.mp4", "--model", tiny_model)
    assert not any(shot["made"] for shot in told["shots"])
    assert "film.mp4 is done already" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in film.rglob("*.mp4")} == before


@pytest.mark.parametrize(("edits", "changed"), [
    ([], []),
    ([("caption: hello", "caption: bye, transition: dissolve, music: none")], []),
    ([("title: A film", "title: Another"), ("id: two", "id: second")], []),
    ([("  - {id: still", "  - {id: new, prompt: a cat}\n  - {id: still")], ["new"]),
    ([("a red car, seed: 7", "a cat, seed: 7")], ["one", "two", "five"]),
    ([("steps: 3", "steps: 4")], ["two"]),
    ([("takes: 2", "takes: 3")], ["three", "four"]),
    ([("prompt: a cat bounces}]", "prompt: a cat}]")], ["three", "four"]),
    ([("prompt: a cat, frames: 1", "prompt: a car, frames: 1")], ["still", "five"]),
    ([("{shot: one}}", "{shot: one, frame: first}}")], ["five"]),
    ([("dtype: fp32", "dtype: bf16")], ["one", "two", "three", "four", "still", "five"]),
])
def test_a_change_reaches_its_shot_and_those_that_depend_on_it(check, edits, changed):
    assert check(*edits) == changed


def test_a_changed_last_prompt_keeps_what_came_before(film, check, tiny_model):
    assert check(("prompt: a cat bounces}]", "prompt: a cat}]")) == ["three", "four"]
    told = vidgen("script", film / "film.yaml", "--check", "-o", film / "film.mp4", "--model",
                  tiny_model)
    three = next(shot for shot in told["shots"] if shot["id"] == "three")
    assert three["parts_left"] == 2  # the last part of each take


def test_only_renders_a_shot_and_what_it_needs(tmp_path, tiny_model):
    script = tmp_path / "film.yaml"
    script.write_text(FILM)
    told = vidgen("script", script, "-o", tmp_path / "film.mp4", "--only", "two", "--model",
                  tiny_model)
    assert (told["film"], [shot["id"] for shot in told["shots"]]) == (None, ["one", "two"])
    assert not (tmp_path / "film.mp4").exists()
    assert len(list((tmp_path / "film.shots").glob("*.mp4"))) == 2


def test_a_draft_is_fast_and_separate(film, tiny_model, monkeypatch):
    monkeypatch.chdir(film)
    text = FILM.replace("defaults: {", "defaults: {steps: 30, ")
    Path("film.yaml").write_text(text)
    told = vidgen("script", "film.yaml", "--draft", "--check", "--model", tiny_model)
    assert {shot["takes"] for shot in told["shots"]} == {1}
    film_plan = plan_film(Script.read("film.yaml"), open_model(str(tiny_model)), draft=True)
    (shot,) = [each for each in film_plan.script.shots if each.id == "one"]
    assert film_plan.request(shot, 1, 0, 12).steps == 8
    (few,) = [each for each in film_plan.script.shots if each.id == "two"]
    assert film_plan.request(few, 1, 0, 12).steps == 2  # of three
    whole = plan_film(Script.read("film.yaml"), open_model(str(tiny_model)))
    assert {plan.key for plan in whole.shots.values()}.isdisjoint(
        plan.key for plan in film_plan.shots.values())


def test_a_film_of_another_script_is_not_replaced_unasked(film, tiny_model, capsys):
    (film / "film.yaml").write_text(FILM.replace("steps: 3", "steps: 2"))
    command = ["script", str(film / "film.yaml"), "-o", str(film / "film.mp4"), "--model",
               str(tiny_model)]
    before = (film / "film.mp4").read_bytes()
    assert main(command) == 2
    assert "film.mp4 exists; give --overwrite" in capsys.readouterr().err
    assert (film / "film.mp4").read_bytes() == before
    told = vidgen(*command, "--overwrite")
    assert [shot["id"] for shot in told["shots"] if shot["made"]] == ["two"]
    assert (film / "film.mp4").read_bytes() != before
    shown = read_recipe(film / "film.mp4")["film"]["shots"]
    assert [each["address"] for each in shown] == [
        Path(shot["path"]).stem for shot in told["shots"] if shot["id"] != "still"
    ]


def test_a_continued_shot_can_be_replayed(film, rendered):
    two = next(shot for shot in rendered[1]["shots"] if shot["id"] == "two")
    told = vidgen("replay", two["path"], "-o", film / "again.mp4")
    assert told["identical"], told
    assert Clip.from_file(film / "again.mp4").num_frames == 12


def test_references_and_pictures_shape_the_address(tmp_path, tiny_model):
    folder = open_model(str(tiny_model))
    text = ("characters: {cat: {description: a cat, reference: cat.png}}\n"
            "shots: [{id: a, prompt: '{cat}'}, {id: b, prompt: x}]\n")
    (tmp_path / "film.yaml").write_text(text)

    def keys() -> list[str]:
        film = plan_film(Script.read(tmp_path / "film.yaml"), folder)
        shot = film.script.shots[0]
        assert film.request(shot, 1, 0, 9).reference == (str(tmp_path / "cat.png"),)
        return [plan.key for plan in film.shots.values()]

    Image.new("RGB", (32, 32), "red").save(tmp_path / "cat.png")
    red = keys()
    assert keys() == red
    Image.new("RGB", (32, 32), "blue").save(tmp_path / "cat.png")
    blue = keys()
    assert (red[0] != blue[0], red[1] == blue[1]) == (True, True)


def test_characters_bring_their_adapters_into_their_shots(tmp_path, tiny_model):
    (tmp_path / "film.yaml").write_text(
        "project: {defaults: {lora: style.st}}\n"
        "characters: {cat: {description: a cat, lora: [cat.st:0.5, style.st]}, dog: a dog}\n"
        "shots: [{id: a, prompt: '{cat}'}, {id: b, prompt: '{dog}'},\n"
        "  {id: c, prompt: x, characters: cat, lora: own.st}]\n")
    for name in ("style", "cat", "own"):
        (tmp_path / f"{name}.st").write_text(name)
    film = plan_film(Script.read(tmp_path / "film.yaml"), open_model(str(tiny_model)))
    asked = [[Path(each).name for each in film.request(shot, 1, 0, 9).lora]
             for shot in film.script.shots]
    assert asked == [["cat.st:0.5", "style.st"], ["style.st"], ["cat.st:0.5", "style.st", "own.st"]]


def test_keys_of_a_shot_are_options_of_its_request(tmp_path, tiny_model):
    (tmp_path / "film.yaml").write_text(
        "project: {size: 48x32, fps: 10, style: by day,\n"
        "  defaults: {duration: 1, negative: a dog, sampler: euler, shift: 2, guidance: 3}}\n"
        "shots: [{id: a, prompt: a cat, steps: 4, guidance: 2, first_frame: a.png,\n"
        "  last_frame: b.png}, {id: b, prompt: x, sampler: unipc, negative: ''}]\n")
    for name in ("a.png", "b.png"):
        Image.new("RGB", (32, 32), "red").save(tmp_path / name)
    film = plan_film(Script.read(tmp_path / "film.yaml"), open_model(str(tiny_model)))
    one, two = (film.request(shot, 7, 0, 9) for shot in film.script.shots)
    assert one == Request(
        prompt="a cat, by day", seed=7, size="48x32", fps=10, seconds=0.9, negative="a dog",
        sampler="euler", shift=2, steps=4, guidance=2, image=str(tmp_path / "a.png"),
        last_image=str(tmp_path / "b.png"), audio="none")
    assert (two.sampler, two.negative, two.guidance, two.steps) == ("unipc", "", 3, None)


@pytest.mark.parametrize("suffix", [".mkv", ".webm"])
def test_other_formats_have_shots_of_their_own(tmp_path, tiny_model, suffix):
    (tmp_path / "list.txt").write_text("a red car\na cat\n")
    output = tmp_path / f"film{suffix}"
    told = vidgen("script", tmp_path / "list.txt", "-o", output, "--model", tiny_model)
    shown = [frames(shot["path"]) for shot in told["shots"]]
    assert (frames(output) == np.concatenate(shown)).all()
    assert {path.suffix for path in (tmp_path / "film.shots").iterdir()} == {suffix, ".json"}


def test_init_writes_an_example_that_is_a_script(tmp_path):
    path = tmp_path / "mine.yaml"
    assert vidgen("script", "--init", path) == {"path": str(path)}
    script = Script.read(path)
    assert len(script.shots) == 5
    assert "# " in path.read_text()


def test_a_bad_shot_in_the_middle_names_itself(film, tiny_model, capsys):
    """A picture whose head is whole is known to be damaged only when it is needed."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(film / "broken.png")
    (film / "broken.png").write_bytes((film / "broken.png").read_bytes()[:2000])
    (film / "film.yaml").write_text(FILM + "  - {id: six, prompt: a cat, first_frame: broken.png}")
    assert main(["script", str(film / "film.yaml"), "-o", str(film / "more.mp4"), "--only", "six",
                 "--model", str(tiny_model)]) == 2
    assert "line 15: shot 'six': image " in capsys.readouterr().err
    assert not (film / "more.mp4").exists()


def test_files_next_to_a_film_that_is_done_stay_as_they_are(film, tiny_model, capsys):
    command = ["script", film / "film.yaml", "-o", film / "film.mp4", "--model", tiny_model,
               "--storyboard", "--otio"]
    written = [film / f"film{suffix}" for suffix in (".srt", ".vtt", ".html", ".otio")]
    assert vidgen(*command)["files"] == [str(written[n]) for n in (0, 1, 3, 2)]
    before = [path.read_bytes() for path in written]
    for path in written[::2]:
        path.write_text("by hand")
    written[1].unlink()
    vidgen(*command)
    told = capsys.readouterr().err
    assert [f"{path} exists and differs" in told for path in written] == [True, False, True, False]
    assert [path.read_text() for path in written[::2]] == ["by hand"] * 2
    assert [path.read_bytes() for path in written[1::2]] == before[1::2]
    vidgen(*command, "--overwrite")
    assert [path.read_bytes() for path in written] == before
    (film / "film.otio").unlink()
    (film / "film.otio").mkdir()
    (film / "film.otio/x.txt").touch()
    vidgen(*command, code=2)


def test_texts_of_an_earlier_version_go_with_it(film, tiny_model, capsys):
    command = ["script", film / "film.yaml", "-o", film / "film.mp4", "--model", tiny_model,
               "--overwrite"]
    (film / "film.yaml").write_text(FILM.replace(", caption: hello", ""))
    vidgen(*command)
    assert "film.srt was removed; the film has no texts any more" in capsys.readouterr().err
    assert not [*film.glob("film.srt"), *film.glob("film.vtt")]
    (film / "film.srt").write_text("somebody's own")
    (film / "film.yaml").write_text(FILM.replace(", caption: hello", ", transition: dissolve"))
    vidgen(*command)
    assert (film / "film.srt").read_text() == "somebody's own"


def test_shots_that_are_there_are_counted_when_one_is_interrupted(
    tmp_path, tiny_model, capsys, monkeypatch
):
    script = tmp_path / "film.yaml"
    script.write_text("shots: [{id: a, prompt: a cat, frames: 5}, {id: b, prompt: a car, "
                      "frames: 9}]")
    command = ["script", str(script), "-o", str(tmp_path / "film.mp4"), "--model", str(tiny_model)]
    vidgen(*command, "--only", "a")

    save_step = Journal.on_step

    def interrupted(*args, **kwargs):
        save_step(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "on_step", interrupted)
        assert main(command) == 130
    err = capsys.readouterr().err
    assert "1 of 2 shots finished (shot b: sample, step 1 of " in err
    assert "Run the same command to continue." in err


def test_a_film_continues_as_any_clip_does_and_its_script_makes_it_again(film, tiny_model, capsys):
    whole = film / "film.mp4"
    assert main(["extend", str(whole), "--seconds", "0.25"]) == 2
    assert "film.mp4 records no prompt; give --prompt" in capsys.readouterr().err
    told = vidgen("extend", whole, "--seconds", "0.25", "--prompt", "a cat", "--model", tiny_model,
                  "--steps", 2)
    assert (told["hand_over"], told["num_frames"]) == ("pixels", 63)
    assert main(["replay", str(whole)]) == 2
    assert "made of several clips; make it again with vidgen script" in capsys.readouterr().err
