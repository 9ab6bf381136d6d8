"""`vidgen extend` on a tiny model: old frames untouched, the recipe goes on, mistakes in words."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.commands import vidgen
from vidgen.cli.main import main
from vidgen.media.checks import ClipChecker
from vidgen.media.clip import Clip
from vidgen.media.manifest import read_marks
from vidgen.media.probe import read_recipe
from vidgen.media.sound import read_sound
from vidgen.media.video_reader import VideoReader
from vidgen.pipeline.engine import load
from vidgen.pipeline.recorded import own_options

PROMPT = "a red car bounces across the desert"
extend = partial(vidgen, "extend")


@pytest.fixture(scope="module")
def short(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    engine = load(str(tiny_model), device="cpu", dtype="fp32")
    clip = engine.generate(PROMPT, seed=5, seconds=1.6, guidance=1.0)
    return clip.save(tmp_path_factory.mktemp("clips") / "short.mp4")


def frames_of(path: Path) -> list[np.ndarray]:
    with VideoReader(path) as reader:
        return [*reader]


def test_a_clip_is_continued_repeatedly_by_its_own_recipe(short, tmp_path):
    longer, longest = tmp_path / "longer.mp4", tmp_path / "longest.mp4"
    facts = extend(short, "--seconds", 1, "-o", longer)
    assert facts["num_frames"] == 31
    assert facts["seed"] == 5
    assert facts["hand_over"] == "latents"
    extend(longer, "--seconds", 0.5, "--prompt", "a cat over the meadow", "-o", longest)
    for earlier, later in ((short, longer), (longer, longest)):
        old, new = frames_of(earlier), frames_of(later)
        assert all(map(np.array_equal, old, new))
    assert len(new) == 37
    before, recipe = read_recipe(short), read_recipe(longest)
    assert recipe["plan"]["prompt"] == "a cat over the meadow"
    for name in ("num_steps", "shift", "guidance", "sampler"):
        assert recipe["plan"][name] == before["plan"][name]


def test_guidance_towards_given_frames_continues_too(short):
    recipe = read_recipe(short)
    assert "image_guidance" not in own_options(recipe)["settings"]
    recipe["plan"]["guidance"] |= {"scale": 4.0, "known_scale": 3.0, "reach": 5}
    options = own_options(recipe)
    assert (options["guidance"], options["settings"]["image_guidance"]) == (4.0, 3.0)
    assert options["settings"]["image_guidance_reach"] == 5
    assert "reference_guidance" not in options["settings"]
    recipe["plan"]["guidance"]["reference_scale"] = 2.0
    assert own_options(recipe)["settings"]["reference_guidance"] == 2.0


def test_a_rate_that_was_asked_for_goes_on(short):
    recipe = read_recipe(short)
    assert "temporal_upsampling" not in own_options(recipe)["settings"]
    recipe["request"]["settings"] = {"temporal_upsampling": 1}
    assert own_options(recipe)["settings"]["temporal_upsampling"] == 1


def test_the_same_command_gives_the_same_file_but_for_its_marks(short, tmp_path):
    one, two = tmp_path / "one.mkv", tmp_path / "two.mkv"
    for path in (one, two):
        extend(short, "--seconds", 0.5, "-o", path)
    assert all(map(np.array_equal, frames_of(one), frames_of(two)))


def test_a_foreign_clip_needs_a_prompt_and_continues_from_its_pixels(
    short, tmp_path, tiny_model, capsys
):
    bare = tmp_path / "bare.mp4"
    clip = Clip.from_file(short)
    Clip(clip.chunks, replace(clip.info, recipe=None)).save(bare)
    assert main(["extend", str(bare), "--seconds", "1"]) == 2
    assert "give --prompt" in capsys.readouterr().err
    facts = extend(bare, "--seconds", "1", "--prompt", PROMPT, "--model", tiny_model,
                   "--dtype", "fp32", "-o", tmp_path / "longer.mp4")
    assert facts["hand_over"] == "pixels"
    assert all(map(np.array_equal, frames_of(bare), frames_of(tmp_path / "longer.mp4")))


def test_a_cache_and_devices_are_recorded_and_a_cache_goes_on(short, tmp_path):
    one, two, more = (tmp_path / f"{name}.mkv" for name in ("one", "two", "more"))
    words = (short, "--seconds", 0.5, "--steps", 8, "--cache", "forecast:100")
    extend(*words, "-o", one)
    extend(*words, "-o", two, "--devices", 2)
    extend(two, "--seconds", 0.5, "-o", more)
    recipes = [read_recipe(path) for path in (one, two, more)]
    assert [recipe["plan"]["cache"]["threshold"] for recipe in recipes] == [100.0] * 3
    assert [recipe.get("devices", {}).get("count") for recipe in recipes] == [None, 2, None]
    assert recipes[1]["devices"]["sequence"] == 2
    for alone, shared in zip(frames_of(one), frames_of(two), strict=True):
        assert np.abs(alone.astype(int) - shared).max() <= 1
    extend(two, "--seconds", 0.5, "-o", more, "--cache", "none", "--overwrite")
    assert read_recipe(more)["plan"]["cache"] is None


@pytest.mark.parametrize(("words", "message"), [
    (["--seconds", "1", "--shard"], "--devices 2 or more"),
    (["--seconds", "1", "--devices", "0"], "devices is 0"),
    (["--seconds", "0"], "seconds is 0.0"),
    (["--seconds", "nan"], "seconds is nan"),
    (["--seconds", "inf"], "seconds is inf"),
    (["--seconds", "4000"], "seconds is 4000"),
    (["--seconds", "1", "-o", "x.png"], "holds one picture"),
    (["--seconds", "0.01"], "less than a frame"),
    (["--seconds", "1", "-o", "SELF", "--overwrite"], "is the clip itself"),
    (["--seconds", "1", "-o", "x.avi"], "unknown suffix"),
    (["--seconds", "1", "--set", "overlap=9"], "overlap is 9"),
    (["--seconds", "1", "--set", "colour_hold=2"], "colour_hold is 2"),
])
def test_mistakes_are_reported(short, capsys, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    words = [str(short) if word == "SELF" else word for word in words]
    assert main(["extend", str(short), *words]) == 2
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_a_folder_of_pictures_cannot_go_on(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("frames").mkdir()
    assert main(["extend", "frames/", "--seconds", "1"]) == 2
    assert "if vidgen wrote it, vidgen replay frames/ -o frames.mp4" in capsys.readouterr().err


def test_the_result_and_the_file_tell_what_the_checks_found(short, tmp_path):
    """Over the whole clip, the frames that were there before too."""
    facts = extend(short, "--seconds", 1, "-o", tmp_path / "longer.mp4")
    assert facts["checks"] == read_recipe(tmp_path / "longer.mp4")["checks"]
    whole = Clip.from_file(tmp_path / "longer.mp4")
    checker = ClipChecker(whole.info)
    checker.feed(whole.frames)
    assert {found["kind"] for found in facts["checks"]["findings"]} == {
        found.kind for found in checker.findings
    }


def test_a_label_is_burnt_into_the_opening_once(short, tmp_path, caplog):
    one, two, three = (tmp_path / f"{number}.mkv" for number in (1, 2, 3))
    extend(short, "--seconds", 1, "-o", one)
    extend(short, "--seconds", 1, "-o", two, "--label", "visible")
    assert "encoded again: a label is burnt into the opening" in caplog.text
    plain, labelled = (np.stack(frames_of(path)) for path in (one, two))
    changed = (plain != labelled).any(axis=(1, 2, 3))
    assert changed[:24].all()  # 2 seconds
    assert not changed[24:].any()
    caplog.clear()
    assert extend(two, "--seconds", 1, "-o", three)["num_frames"] == 43
    assert "encoded again" not in caplog.text
    assert read_recipe(three)["label"] == "visible"
    assert all(map(np.array_equal, labelled, frames_of(three)))


def test_the_field_of_who_made_it_is_written_on_request_and_stays(short, tmp_path):
    one, two, three = (tmp_path / f"{number}.mp4" for number in (1, 2, 3))
    extend(short, "--seconds", 0.5, "-o", one, "--aigc", "ACME")
    extend(one, "--seconds", 0.5, "-o", two)
    extend(two, "--seconds", 0.5, "-o", three, "--aigc", "Other")
    producers = [(read_marks(path).aigc or {}).get("ContentProducer")
                 for path in (short, one, two, three)]
    assert producers == [None, "ACME", "ACME", "Other"]


def test_sound_stays_where_frames_are_encoded_once_more(short, tmp_path):
    loud, out = tmp_path / "loud.mkv", tmp_path / "longer.mkv"
    clip = Clip.from_file(short)
    sound = np.sin(np.arange(24_000) / 10).astype(np.float32)[:, None] / 2
    Clip(clip.chunks, replace(clip.info, sound=sound)).save(loud)
    facts = extend(loud, "--seconds", 1, "--label", "visible", "-o", out)
    before, after = read_sound(loud)[0][1_000:23_000, 0], read_sound(out)[0]
    assert np.corrcoef(after[1_000:23_000, 0], before)[0, 1] > 0.99
    assert len(after) == round(facts["seconds"] * 48_000)
    assert not {f["kind"] for f in facts["checks"]["findings"]} & {"sound-length", "silence"}


def test_a_picture_continues_at_its_recipes_rate_or_at_the_models(tiny_model, tmp_path):
    engine = load(tiny_model, dtype="fp32")
    engine.generate("a cat", frames=1, steps=1, seed=1, fps=8).save(tmp_path / "a.png")
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "b.png")
    words = ("--seconds", "1", "--model", str(tiny_model), "--steps", "1", "--prompt", "a cat")
    for name, fps in (("a", 8), ("b", 12)):
        longer = tmp_path / f"{name}.mp4"
        assert main(["extend", str(tmp_path / f"{name}.png"), "-o", str(longer), *words]) == 0
        with VideoReader(longer) as reader:
            assert reader.fps == fps
            assert reader.length() == fps + 1
