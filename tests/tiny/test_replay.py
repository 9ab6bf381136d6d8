"""Replay on a tiny model: every condition and kind of file again, changes, what is missing."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save, save_file

from tests.lora_models import make_adapter, make_dit
from vidgen.cli.main import main
from vidgen.cli.replay import typed_options
from vidgen.core.errors import InputError
from vidgen.core.request import Request
from vidgen.core.runtime import sha256_file
from vidgen.media.clip import Clip
from vidgen.media.probe import read_recipe
from vidgen.media.types import ClipInfo
from vidgen.media.write import write_clip
from vidgen.pipeline.engine import Engine, load
from vidgen.pipeline.inputs import read_inputs
from vidgen.pipeline.recipe import make_recipe
from vidgen.pipeline.recorded import FACTS, differences
from vidgen.pipeline.replay import (
    compare,
    loading_from_recipe,
    recorded_threads,
    request_from_recipe,
)
from vidgen.weights.lora import write_lora

PROMPT = "a red car bounces across the desert"
RANDOM = np.random.default_rng(0)
PICTURE = RANDOM.integers(0, 255, (40, 48, 3), dtype=np.uint8)
Replay = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Engine:
    return load(str(tiny_model), device="cpu", dtype="fp32")


@pytest.fixture
def replay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Replay:
    """Run a replay in a folder of inputs: exit code, result, what was said on stderr."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(PICTURE).save("a.png")
    Image.fromarray(PICTURE).save("b.jpg")
    halves = np.zeros((32, 32, 3), np.uint8)
    halves[:, 16:] = 255
    Image.fromarray(halves).save("mask.png")
    frames = RANDOM.integers(0, 255, (9, 32, 32, 3), dtype=np.uint8)
    write_clip("clip.mkv", [frames], ClipInfo(Fraction(12), (32, 32), 9))

    def run(*arguments: Any) -> tuple[int, dict[str, Any], str]:
        code = main(["replay", *map(str, arguments), "--json"])
        out, err = capsys.readouterr()
        return code, json.loads(out) if out else {}, err

    return run


CASES: dict[str, dict[str, Any]] = {
    "trimmed": {"seconds": 0.5, "steps": 3, "guidance": 2.5, "negative": "a cat"},
    "settings": {"frames": 5, "fps": "24000/1001", "size": "48x32", "sampler": "euler",
                 "shift": 2.0, "guidance_interval": (0.1, 0.8), "guidance_rescale": 0.5},
    "scheduler": {"sampler": FlowMatchEulerDiscreteScheduler(shift=4.0)},
    "noise": {"latents": torch.randn(1, 4, 3, 4, 4)},
    "image": {"image": "a.png", "fit": "pad"},
    "pixels": {"image": PICTURE, "last_image": "b.jpg"},
    "frames": {"frame": [(0.25, "a.png"), (0.5, PICTURE)]},
    "references": {"reference": ["a.png", "b.jpg"]},
    "masked": {"video": "clip.mkv", "mask": "mask.png"},
    "masked picture": {"image": "a.png", "mask": "mask.png"},
    "strength": {"video": "clip.mkv", "strength": 0.6},
    "prefix": {"prefix": "clip.mkv", "frames": 13},
}


@pytest.mark.parametrize("case", CASES)
def test_every_condition_gives_identical_frames_without_its_files(
    engine: Engine, replay: Replay, case: str
) -> None:
    engine.generate(PROMPT, seed=5, **CASES[case]).save("made.mkv")
    for path in ("a.png", "b.jpg", "mask.png", "clip.mkv"):
        Path(path).unlink()
    code, result, err = replay("made.mkv", "-o", "again.mkv")
    assert (code, err) == (0, "")
    assert result["identical"]
    assert result["differences"] == {}
    assert np.array_equal(Clip.from_file("again.mkv").frames, Clip.from_file("made.mkv").frames)


@pytest.mark.parametrize("name", ["x.mp4", "x.webm", "x.gif", "x.webp", "x.apng", "x.png",
                                  "x.jpg", "x/"])  # fmt: skip
def test_every_kind_of_file_can_be_replayed(engine: Engine, replay: Replay, name: str) -> None:
    options = {"frames": 1} if name in ("x.png", "x.jpg") else {}
    engine.generate(PROMPT, seed=5, reference=["a.png"], **options).save(name)
    code, result, err = replay(name)
    assert (code, err) == (0, "")
    assert result["identical"]
    assert result["path"] == name.replace("x", "x-again")


def test_attention_is_computed_by_the_same_again(
    engine: Engine, replay: Replay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIDGEN_ATTENTION", "reference")
    engine.generate(PROMPT, seed=5).save("x.mp4")
    monkeypatch.delenv("VIDGEN_ATTENTION")
    code, result, err = replay("x.mp4", "-o", "again.mp4")
    assert (code, err, result["differences"]) == (0, "", {})
    assert result["identical"]


def test_extended_clips_are_replayed_with_all_they_continue_from(
    engine: Engine, replay: Replay
) -> None:
    engine.generate(PROMPT, seed=5, seconds=1).save("one.mp4")
    engine.generate("a cat moves left", seed=6, prefix="one.mp4", seconds=1.5).save("two.mp4")
    engine.generate(PROMPT, seed=7, prefix="two.mp4", seconds=2).save("three.mp4")
    Path("one.mp4").unlink()
    Path("two.mp4").unlink()
    code, result, err = replay("three.mp4", "-o", "again.mp4")
    assert (code, err) == (0, "")
    assert result["identical"]
    assert result["differences"] == {}
    assert Clip.from_file("again.mp4").num_frames == 24


def test_clips_of_several_windows_are_replayed(engine: Engine, replay: Replay) -> None:
    engine.generate(PROMPT, seed=5, frames=29, image="a.png").save("long.mp4")
    Path("a.png").unlink()
    assert replay("long.mp4")[1]["identical"]


def test_a_replay_of_a_replay_is_the_same_again(engine: Engine, replay: Replay) -> None:
    engine.generate(PROMPT, seed=5, seconds=0.5, image=PICTURE).save("made.mkv")
    replay("made.mkv", "-o", "again.mkv")
    assert replay("again.mkv", "-o", "more.mkv")[1]["identical"]


def test_a_clip_of_a_batch_is_replayed_alone(engine: Engine, replay: Replay) -> None:
    engine.generate(PROMPT, seed=5, count=2)[1].save("second.mkv")
    assert replay("second.mkv", "-o", "again.mkv")[1]["identical"]


def test_adapters_are_found_by_path_or_hash(engine: Engine, replay: Replay) -> None:
    write_lora(make_adapter(make_dit()), Path("style.safetensors"), "wan")
    engine.generate(PROMPT, seed=5, lora=["style.safetensors:0.5"]).save("made.mkv")
    assert replay("made.mkv", "-o", "again.mkv")[1]["identical"]
    shutil.move("style.safetensors", "moved.safetensors")
    digest = sha256_file("moved.safetensors")
    code, _, err = replay("made.mkv", "-o", "more.mkv")
    assert code == 2
    assert digest in err
    assert "--input lora=PATH" in err
    moved = ("--input", "lora=moved.safetensors")
    assert replay("made.mkv", "-o", "more.mkv", *moved)[1]["identical"]
    without = replay("made.mkv", "-o", "plain.mkv", "--set", "lora=")[1]
    assert not without["identical"]
    plain = engine.generate(PROMPT, seed=5).frames
    assert np.array_equal(Clip.from_file("plain.mkv").frames, plain)


def test_a_large_input_is_named_by_hash_and_option_when_it_is_gone(
    engine: Engine, replay: Replay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vidgen.pipeline.inputs.EMBED_LIMIT", 100)
    engine.generate(PROMPT, seed=5, image="a.png").save("made.mkv")
    assert replay("made.mkv", "-o", "again.mkv")[1]["identical"]
    shutil.move("a.png", "c.png")
    digest = sha256_file("c.png")
    code, _, err = replay("made.mkv", "-o", "x.mkv")
    assert code == 2
    assert "is missing" in err
    assert f"{digest}; give it with --input image=PATH, or another with --set image=PATH" in err
    Image.fromarray(PICTURE[:, ::-1]).save("a.png")
    code, _, err = replay("made.mkv", "-o", "x.mkv")
    assert code == 2
    assert "was changed" in err
    code, _, err = replay("made.mkv", "-o", "x.mkv", "--input", "image=b.jpg")
    assert code == 2
    assert "b.jpg is a different file" in err
    code, _, err = replay("made.mkv", "-o", "x.mkv", "--input", "imag=c.png")
    assert code == 2
    assert "did you mean 'image'?" in err
    assert not Path("x.mkv").exists()
    assert replay("made.mkv", "-o", "x.mkv", "--input", "image=c.png")[1]["identical"]
    assert replay("made.mkv", "-o", "y.mkv", "--input", f"{digest[:8]}=c.png")[1]["identical"]
    assert not replay("made.mkv", "-o", "z.mkv", "--set", "image=b.jpg")[1]["identical"]


def test_an_input_given_for_one_in_the_recipe_must_be_that_one(
    engine: Engine, replay: Replay
) -> None:
    engine.generate(PROMPT, seed=5, image="a.png").save("made.mkv")
    code, _, err = replay("made.mkv", "-o", "x.mkv", "--input", "image=b.jpg")
    assert code == 2
    assert "b.jpg is a different file" in err
    assert "--set image=PATH" in err
    shutil.copy("a.png", "same.png")
    assert replay("made.mkv", "-o", "x.mkv", "--input", "image=same.png")[1]["identical"]


def test_noise_too_large_for_the_recipe_comes_from_a_file(
    engine: Engine, replay: Replay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vidgen.pipeline.inputs.EMBED_LIMIT", 100)
    noise = torch.randn(1, 4, 3, 4, 4)
    engine.generate(PROMPT, seed=5, latents=noise).save("made.mkv")
    digest = read_recipe("made.mkv")["inputs"][0]["sha256"]
    assert digest == hashlib.sha256(save({"latents": noise})).hexdigest()
    code, _, err = replay("made.mkv")
    assert code == 2
    assert digest in err
    assert "--input latents=PATH" in err
    for wrong in ({"latents": noise + 1}, {"noise": noise}):
        save_file(wrong, "noise.safetensors")
        err = replay("made.mkv", "--input", "latents=noise.safetensors")[2]
        assert "is a different file" in err
    save_file({"latents": noise, "more": noise + 1}, "noise.safetensors", {"by": "somebody"})
    assert replay("made.mkv", "--input", "latents=noise.safetensors")[1]["identical"]


def test_one_change_keeps_all_else(engine: Engine, replay: Replay) -> None:
    engine.generate(PROMPT, seed=5, seconds=0.5, image="a.png", steps=3).save("made.mkv")
    result = replay("made.mkv", "-o", "cat.mkv", "--set", "prompt=a cat moves left")[1]
    assert result["changed"] == ["prompt"]
    assert not result["identical"]
    assert result["psnr_db"] > 0
    assert result["differences"] == {
        "plan.prompt": {"recorded": PROMPT, "now": "a cat moves left"}
    }
    other = engine.generate("a cat moves left", seed=5, seconds=0.5, image="a.png", steps=3)
    assert np.array_equal(Clip.from_file("cat.mkv").frames, other.frames)


def test_a_length_or_picture_that_is_set_takes_the_place_of_its_rival(
    engine: Engine, tmp_path: Path
) -> None:
    recipe = engine.generate(PROMPT, seed=5, seconds=0.5, image=PICTURE).recipe
    longer = request_from_recipe(recipe, tmp_path, changes={"frames": 9})
    assert (longer.frames, longer.seconds) == (9, None)
    drawn = request_from_recipe(recipe, tmp_path, changes={"first_frame_model": "sdxl"})
    assert drawn.image is None
    assert drawn.first_frame_model == "sdxl"
    with pytest.raises(InputError, match="both given"):
        request_from_recipe(recipe, tmp_path, changes={"frames": 9, "seconds": 1.0})


def test_other_scales_follow_a_guidance_that_is_set(engine: Engine, tmp_path: Path) -> None:
    recipe = json.loads(json.dumps(engine.generate(PROMPT, seed=5, image=PICTURE).recipe))
    recipe["plan"]["guidance"] |= {"known_scale": 3.0, "low_scale": 2.0}
    kept = request_from_recipe(recipe, tmp_path, changes={"steps": 3})
    assert kept.guidance_low == 2.0
    assert kept.settings.items() >= {"image_guidance": 3.0, "image_guidance_reach": 0}.items()
    recipe["plan"]["guidance"]["reach"] = 5
    assert request_from_recipe(recipe, tmp_path).settings["image_guidance_reach"] == 5
    del recipe["plan"]["guidance"]["reach"]  # as recipes were before there was one
    assert request_from_recipe(recipe, tmp_path).settings["image_guidance_reach"] == 0
    assert request_from_recipe(recipe, tmp_path).settings["reference_guidance"] == 0
    del recipe["plan"]["guidance"]["reference_scale"]  # nor this
    assert request_from_recipe(recipe, tmp_path).settings["reference_guidance"] == 0
    recipe["plan"]["guidance"]["reference_scale"] = 2.0
    other = request_from_recipe(recipe, tmp_path, changes={"guidance": 6.0})
    assert other.settings["reference_guidance"] == 2.0
    shown = request_from_recipe(recipe, tmp_path, changes={"reference": [PICTURE]})
    assert "reference_guidance" not in shown.settings
    assert (other.guidance, other.guidance_low) == (6.0, None)
    assert "image_guidance" not in other.settings
    changes = {"guidance": 6.0, "settings": {"image_guidance": 2.0}}
    both = request_from_recipe(recipe, tmp_path, changes=changes)
    assert (both.settings["image_guidance"], both.guidance_low) == (2.0, None)


def test_what_was_left_to_a_model_is_left_to_the_one_that_takes_its_place(
    engine: Engine, tiny_model: Path, tmp_path: Path
) -> None:
    recipe = json.loads(json.dumps(engine.generate(PROMPT, seed=5, steps=3, fps=10).recipe))
    recipe["plan"] |= {"candidates": 4, "regional_prompts": 1.0, "temporal_upsampling": 2,
                       "negative": "a cat"}
    recipe["model"]["sha256"] = "0" * 64  # of one with a verifier and a finer rate
    with pytest.raises(InputError, match="tiny has no"):
        engine.generate(request_from_recipe(recipe, tmp_path))
    other = request_from_recipe(recipe, tmp_path, changes={"model": str(tiny_model)})
    assert (other.prompt, other.seed, other.steps, other.fps) == (PROMPT, 5, 3, 10)
    assert (other.settings, other.size, other.shift) == ({}, None, None)
    assert other.negative is None
    assert engine.generate(other).recipe["plan"]["num_steps"] == 3
    recipe["model"]["sha256"] = engine.folder.content_hash  # the same in another place
    same = request_from_recipe(recipe, tmp_path, changes={"model": str(tiny_model)})
    assert (same.settings["candidates"], same.negative) == (4, "a cat")


def test_a_first_frame_is_taken_as_it_was(engine: Engine, tmp_path: Path) -> None:
    recipe = json.loads(json.dumps(engine.generate(PROMPT, seed=5, image=PICTURE).recipe))
    for option, name, plain in (("refine", "refine_steps", 0),
                                ("encode_passes", "encode_passes", 1)):
        assert request_from_recipe(recipe, tmp_path).settings[option] == plain
        recipe["plan"][name] = 9
        assert request_from_recipe(recipe, tmp_path).settings[option] == 9
        del recipe["plan"][name]  # as recipes were before there was a choice
        assert request_from_recipe(recipe, tmp_path).settings[option] == plain


def test_another_model_is_refused_unless_it_will_do(
    engine: Engine, replay: Replay, tiny_model: Path
) -> None:
    shutil.copytree(tiny_model, "model")
    load("model", device="cpu", dtype="fp32").generate(PROMPT, seed=5).save("made.mkv")
    shutil.move("model", "moved")
    code, _, err = replay("made.mkv", "-o", "x.mkv")
    assert code == 2
    assert engine.folder.content_hash in err
    assert "--input model=FOLDER" in err
    assert replay("made.mkv", "-o", "a.mkv", "--input", "model=moved")[1]["identical"]
    assert replay("made.mkv", "-o", "b.mkv", "--set", f"model={tiny_model}")[1]["identical"]
    info = json.loads(Path("moved/model.json").read_text())
    Path("moved/note.txt").write_text("another model")
    info["files"]["note.txt"] = sha256_file("moved/note.txt")
    Path("moved/model.json").write_text(json.dumps(info))
    shutil.move("moved", "model")
    code, _, err = replay("made.mkv", "-o", "x.mkv")
    assert code == 2
    assert "--anyway" in err
    code, result, _ = replay("made.mkv", "-o", "x.mkv", "--anyway")
    assert code == 0
    assert list(result["differences"]) == ["model.sha256"]
    assert result["identical"]  # a note makes no other frames


def test_what_differs_is_reported_where_frames_do(
    engine: Engine, replay: Replay, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = engine.generate(PROMPT, seed=5)
    clip.recipe["machine"]["torch"] = "1.0"
    altered = 255 - clip.frames
    write_clip("made.mkv", [altered], clip.info)
    result = replay("made.mkv", "-o", "again.mkv")[1]
    assert not result["identical"]
    assert result["differences"]["machine.torch"]["recorded"] == "1.0"
    assert main(["replay", "made.mkv", "-o", "more.mkv"]) == 0
    out = capsys.readouterr().out
    assert "PSNR" in out
    assert f"machine.torch: {torch.__version__}, recorded 1.0" in out


def test_differences_are_in_the_order_of_their_names() -> None:
    names = sorted(FACTS - {"model", "inputs", "loras"})
    found = differences(dict.fromkeys(names, "old"), dict.fromkeys(reversed(names), "new"))
    assert [*found] == names


def test_a_change_that_no_recorded_fact_shows_is_named(
    engine: Engine, replay: Replay, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.generate(PROMPT, seed=5, size="64x64").save("made.mkv")
    assert main(["replay", "made.mkv", "-o", "more.mkv", "--set", "label=visible"]) == 0
    out = capsys.readouterr().out
    assert "changed by --set: label" in out
    assert Clip.from_file("more.mkv").recipe["label"] == "visible"
    assert main(["replay", "more.mkv", "-o", "third.mkv"]) == 0
    assert "identical" in capsys.readouterr().out
    assert "may have been changed" not in out
    code, _, err = replay("made.mkv", "-o", "x.jpg")
    assert code == 2
    assert "holds one picture" in err


def test_recorded_threads_dtype_and_device_are_used(engine: Engine) -> None:
    recipe = engine.generate(PROMPT, seed=5).recipe | {"dtype": "bf16", "offload": "stage"}
    recipe["machine"] = {"threads": 2}
    before = torch.get_num_threads()
    with recorded_threads(recipe):
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == before
    loading = loading_from_recipe(recipe)
    assert (loading["dtype"], loading["offload"], loading["device"]) == ("bf16", "stage", "cpu")
    assert loading_from_recipe(recipe, changes={"dtype": "fp32"})["dtype"] == "fp32"


def test_it_refuses_what_it_cant_follow_or_write(engine: Engine, replay: Replay) -> None:
    code, _, err = replay("a.png")
    assert code == 2
    assert "holds no recipe" in err
    engine.generate(PROMPT, seed=5).save("made.mkv")
    assert "is the file to replay" in replay("made.mkv", "-o", "./made.mkv", "--overwrite")[2]
    assert "exists" in replay("made.mkv", "-o", "clip.mkv")[2]
    assert "did you mean 'steps'?" in replay("made.mkv", "--set", "step=3")[2]
    assert "KEY=VALUE" in replay("made.mkv", "--set", "steps")[2]
    write_clip("newer.png", [PICTURE[None]], ClipInfo(Fraction(1), (48, 40), 1, recipe={
        "format_version": 99, "machine": {"threads": 1}}))  # fmt: skip
    assert "format 99" in replay("newer.png")[2]


def test_values_are_read_as_generate_reads_them() -> None:
    options = typed_options([
        ("steps", "9"), ("guidance-interval", "0.1,0.9"), ("frame", "1=a.png"),
        ("frame", "2=b.png"), ("prompt", "--seed 3"), ("negative", "--no"), ("image", ""),
        ("reference", ""), ("fit", "pad"), ("model", "wan"), ("prefix", "a.mp4"),
    ])  # fmt: skip
    assert options == {
        "steps": 9, "guidance_interval": [0.1, 0.9], "frame": [(1.0, "a.png"), (2.0, "b.png")],
        "prompt": "--seed 3", "negative": "--no", "image": None, "reference": (), "fit": "pad",
        "model": "wan", "prefix": "a.mp4",
    }
    with pytest.raises(InputError, match="nine"):
        typed_options([("steps", "nine")])
    with pytest.raises(InputError, match="unknown option 'latents'"):
        typed_options([("latents", "x")])


@pytest.fixture(scope="module")
def recipe(engine: Engine) -> dict[str, Any]:
    clip = engine.generate(PROMPT, seed=5, image=PICTURE, frame=[(0.5, PICTURE)])
    return json.loads(json.dumps(clip.recipe))


@settings(max_examples=60, deadline=None, suppress_health_check=[
    HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_recipe_of_anything_is_refused_or_read(
    recipe: dict[str, Any], tmp_path: Path, data: st.DataObject
) -> None:
    changed = json.loads(json.dumps(recipe))
    part: Any = changed
    for _ in range(data.draw(st.integers(1, 3))):
        keys = list(part) if isinstance(part, dict) else range(len(part))
        key = data.draw(st.sampled_from(list(keys)))
        owner, part = part, part[key]
        if not isinstance(part, dict | list) or not part:
            break
    junk = st.one_of(st.none(), st.integers(-9, 9), st.text(max_size=5), st.just([]), st.just({}))
    owner[key] = data.draw(junk)
    try:
        request = request_from_recipe(changed, tmp_path)
        with recorded_threads(changed):
            pass
    except InputError:
        return
    assert isinstance(request, Request)


LENGTHS = st.one_of(
    st.just({}), st.builds(lambda n: {"frames": 1 + 4 * n}, st.integers(0, 30)),
    st.builds(lambda s: {"seconds": s}, st.floats(0.1, 20)),
)
OPTIONS = st.fixed_dictionaries({}, optional={
    "fps": st.sampled_from(["12", "23.976", "30000/1001", "7.5"]),
    "size": st.sampled_from(["32x32", "48x64"]), "steps": st.integers(1, 99),
    "shift": st.floats(0.1, 9), "guidance": st.floats(0, 9), "guidance_rescale": st.floats(0, 1),
    "guidance_interval": st.sampled_from([(0.0, 0.5), (0.25, 1.0)]),
    "sampler": st.sampled_from(["euler", "unipc"]), "negative": st.text(max_size=5),
    "control_scale": st.floats(0, 2),
})  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[
    HealthCheck.function_scoped_fixture])
@given(length=LENGTHS, options=OPTIONS)
def test_any_request_is_planned_alike_from_its_recipe(
    engine: Engine, tmp_path: Path, length: dict[str, Any], options: dict[str, Any]
) -> None:
    request = Request.of(PROMPT, {"seed": 5, "reference": [PICTURE], **length, **options})
    inputs = read_inputs(request)
    plan = engine.plan(request, inputs)
    recipe = json.loads(json.dumps(make_recipe(engine, plan, request, inputs)))
    again = request_from_recipe(recipe, tmp_path)
    assert engine.plan(again, read_inputs(again)) == plan


def test_files_are_compared_by_what_they_show(tmp_path: Path) -> None:
    frames = RANDOM.integers(0, 255, (3, 32, 48, 3), dtype=np.uint8)

    def write(name: str, shown: np.ndarray, sound: np.ndarray | None = None) -> Path:
        info = ClipInfo(Fraction(12), (shown.shape[2], shown.shape[1]), len(shown), sound)
        return write_clip(tmp_path / name, [shown], info)

    path = write("a.mkv", frames)
    assert compare(path, write("b.mkv", frames)).identical
    off = frames.astype(int) + np.where(frames < 128, 1, -1)
    near = compare(path, write("c.mkv", off.astype(np.uint8)))
    assert near.psnr_db == pytest.approx(20 * np.log10(255))
    assert "number of frames" in compare(path, write("d.mkv", frames[:2])).text
    assert "size" in compare(path, write("e.mkv", frames[:, :, :32])).text
    loud = compare(path, write("f.mkv", frames, np.zeros((12000, 1), np.float32)))
    assert not loud.identical
    assert "sound" in loud.text


def test_the_recipe_is_in_the_file_as_in_the_clip(engine: Engine, tmp_path: Path) -> None:
    clip = engine.generate(PROMPT, seed=5, image=PICTURE)
    found = read_recipe(clip.save(tmp_path / "a.mp4"))
    made = json.loads(json.dumps(clip.recipe))
    assert {name: found[name] for name in made} == made
