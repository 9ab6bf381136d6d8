"""Prompt suites, and clips and networks that are found by name."""

import json

import pytest

from vidgen.core.errors import InputError
from vidgen.evaluation.suite import (
    EvaluatedClip,
    PromptSuite,
    file_stem,
    find_items,
    picture_of,
    prompt_of,
)
from vidgen.evaluation.temporal.run import network_hash, parse_networks


def test_prompts_stand_in_names():
    assert prompt_of("a cat runs-3") == "a cat runs"
    assert prompt_of("a cat") == "a cat"
    assert prompt_of("a half-open door-12") == "a half-open door"


def test_prompt_suites_as_lines_and_as_vbench_has_them(tmp_path):
    lines, full = tmp_path / "p.txt", tmp_path / "p.json"
    lines.write_text("a cat\n\na dog\n")
    full.write_text('[{"prompt_en": "a cat", "dimension": ["x"]}, {"prompt_en": "a dog"}]')
    assert PromptSuite.read(lines).prompts == PromptSuite.read(full).prompts == ("a cat", "a dog")
    full.write_text('{"a": 1}')
    with pytest.raises(InputError, match="prompt_en"):
        PromptSuite.read(full)
    lines.write_text("\n")
    with pytest.raises(InputError, match="no prompt"):
        PromptSuite.read(lines)


def test_vbenchs_lists_say_dimensions_and_pictures(tmp_path):
    suite = tmp_path / "i2v.json"
    suite.write_text(json.dumps([
        {"prompt_en": "a lake", "dimension": ["i2v_background"], "image_name": "lake 1.jpg"},
        {"prompt_en": "a lake", "dimension": ["subject_consistency"]},
        {"prompt_en": "a fox, camera pans left", "dimension": ["camera_motion"]},
        "a bare prompt",
    ]))  # fmt: skip
    read = PromptSuite.read(suite)
    assert read.prompts == ("a lake", "a fox, camera pans left", "a bare prompt")
    assert read.counts("a lake", "i2v_background")
    assert read.counts("a lake", "subject_consistency")
    assert not read.counts("a lake", "camera_motion")
    assert not read.counts("a bare prompt", "camera_motion")
    pictures = {name: tmp_path / name for name in ("lake 1", "a fox", "a_b")}
    assert picture_of("a lake", pictures, read) == tmp_path / "lake 1"
    assert picture_of("a fox, camera pans left", pictures, read) == tmp_path / "a fox"
    assert picture_of("a/b", pictures, None) == tmp_path / "a_b"
    assert picture_of("a bare prompt", pictures, read) is None
    suite.write_text('["a lake"]')
    assert PromptSuite.read(suite).counts("a lake", "camera_motion"), "no list of dimensions"
    suite.write_text('[{"prompt_en": "a lake", "dimension": "camera_motion"}]')
    with pytest.raises(InputError, match="dimension a list"):
        PromptSuite.read(suite)
    suite.write_text('[{"prompt_en": "a lake", "image_name": ["lake.jpg"]}]')
    with pytest.raises(InputError, match="image_name must be text"):
        PromptSuite.read(suite)
    suite.write_text(json.dumps([{"prompt_en": ["x"] * 5000}]))
    with pytest.raises(InputError, match="prompt_en and image_name must be text") as caught:
        PromptSuite.read(suite)
    assert len(str(caught.value)) < 500


def test_clips_are_known_by_the_suites_name_for_them(tmp_path):
    (tmp_path / "p.txt").write_text("\ufeffa cat/dog\na fox\n" + "long " * 60, "utf-8")
    suite = PromptSuite.read(tmp_path / "p.txt")
    cut = file_stem(suite.prompts[2])
    assert len(cut) < len(suite.prompts[2])
    told = {"a cat_dog-0": "a cat_dog", "a fox-1": "a fox, told at length", f"{cut}-0": cut}
    items = [EvaluatedClip(tmp_path / f"{name}.mp4", name, prompt, None)
             for name, prompt in told.items()]
    other = EvaluatedClip(tmp_path / "x.mp4", "x", "x", None)
    inside, outside, missing = suite.split([*items, other])
    assert [item.prompt for item in inside] == list(suite.prompts)
    assert [item.name for item in outside] == ["x"]
    assert missing == []


def test_folders_without_clips_are_refused(tmp_path):
    with pytest.raises(InputError, match="is not a folder"):
        find_items(tmp_path / "none")
    with pytest.raises(InputError, match="holds no clip"):
        find_items(tmp_path)
    (tmp_path / "a.mp4").write_bytes(b"x")
    (tmp_path / "a.webm").write_bytes(b"x")
    with pytest.raises(InputError, match="two clips named 'a'"):
        find_items(tmp_path)


def test_networks_are_named_and_hashed(tmp_path):
    with pytest.raises(InputError, match="did you mean 'dino'"):
        parse_networks(["dinno=x"])
    with pytest.raises(InputError, match=r"config\.json is missing"):
        parse_networks([f"dino={tmp_path}"])
    with pytest.raises(InputError, match="is none and holds none"):
        parse_networks([f"raft={tmp_path}"])
    (tmp_path / "i3d.pt").write_text("1")
    assert parse_networks([f"i3d={tmp_path}"]) == {"i3d": tmp_path / "i3d.pt"}
    (tmp_path / "other.pt").write_text("2")
    with pytest.raises(InputError, match="holds 2: name one"):
        parse_networks([f"i3d={tmp_path}"])
    with pytest.raises(InputError, match="amt is given twice"):
        parse_networks([f"amt={tmp_path / 'i3d.pt'}", f"amt={tmp_path / 'other.pt'}"])
    (tmp_path / "config.json").write_text("{}")
    before = network_hash(tmp_path)
    assert parse_networks([f"clip={tmp_path}"]) == {"clip": tmp_path}
    (tmp_path / "weights").write_text("1")
    assert network_hash(tmp_path) != before
