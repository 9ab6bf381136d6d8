"""Sweeps on a tiny model, and the grid they are laid out on."""

from __future__ import annotations

import json
from argparse import ArgumentTypeError
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.textures import texture
from vidgen.cli.main import main
from vidgen.cli.report import Report
from vidgen.cli.sweep import read_axis
from vidgen.media.clip import Clip
from vidgen.media.grid import MAX_SIDE, Grid
from vidgen.media.probe import read_recipe
from vidgen.media.read import load_image
from vidgen.media.types import ClipInfo
from vidgen.media.write import write_clip
from vidgen.pipeline.engine import load

Sweep = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture
def sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    tiny_model: Path,
) -> Sweep:
    monkeypatch.chdir(tmp_path)

    def run(prompt: str, *arguments: Any) -> tuple[int, dict[str, Any], str]:
        words = ["sweep", prompt, "--model", str(tiny_model), "--frames", "5", "--json"]
        code = main([*words, *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, json.loads(out) if out else {}, err

    return run


def test_a_sheet_and_a_video_hold_one_clip_of_each_setting(
    sweep: Sweep, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    over = ("--over", "prompt:car=car,cat", "--over", "guidance=1,3")
    code, result, _ = sweep("a red car", "--seed", 7, *over, "-o", "s.png")
    assert code == 0
    assert result["columns"] == 2
    labels = [cell["label"] for cell in result["cells"]]
    assert labels == [
        "car, guidance 1", "car, guidance 3", "cat, guidance 1", "cat, guidance 3"
    ]
    engine = load(str(tiny_model))
    alone = engine.generate("a red cat", seed=7, frames=5, guidance=3.0).save("alone.mp4")
    cell = Clip.from_file(result["cells"][3]["path"])
    assert np.array_equal(cell.frames, Clip.from_file(alone).frames)
    sheet, film = load_image("s.png")[0], Clip.from_file("s.mp4")
    assert film.num_frames == 5
    assert sheet.shape[1::-1] == film.size
    assert main(["replay", result["cells"][0]["path"], "-o", "again.mp4"]) == 0
    for name in ("s.mp4", "s.png"):
        assert main(["replay", name, "-o", "more.mp4"]) == 2
        assert f"{name} is made of several clips" in capsys.readouterr().err
    assert main(["extend", "s.mp4", "--seconds", "1"]) == 2
    assert "s.mp4 records no prompt; give --prompt" in capsys.readouterr().err
    assert read_recipe("s.mp4")["sweep"]["over"] == {
        "prompt:car": ["car", "cat"], "guidance": ["1", "3"]
    }


def test_a_setting_of_the_model_varies_and_is_replayed_otherwise(
    sweep: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(texture(40, 48, 0)).save("a.png")
    code, result, _ = sweep("a red car", "--seed", 7, "--image", "a.png", "--size", "32x32",
                            "--set", "encode_passes=3", "--over", "encode-passes=1,2", "-o",
                            "s.png")
    assert code == 0
    once, twice = (cell["path"] for cell in result["cells"])
    assert [cell["label"] for cell in result["cells"]] == ["encode_passes 1", "encode_passes 2"]
    assert read_recipe(twice)["request"]["settings"] == {"encode_passes": 2}
    assert not np.array_equal(Clip.from_file(once).frames, Clip.from_file(twice).frames)
    assert main(["replay", twice, "-o", "again.mp4", "--set", "encode_passes=1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["changed"] == ["encode_passes"]
    assert np.array_equal(Clip.from_file("again.mp4").frames, Clip.from_file(once).frames)
    assert main(["replay", twice, "-o", "more.mp4", "--set", "encode_pass=1"]) == 2
    assert "unknown option 'encode_pass'; did you mean 'encode_passes'" in capsys.readouterr().err


def test_each_clip_has_an_estimate_of_its_own(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    monkeypatch.setattr(Report, "expect", lambda _self, made, **_: told.append(made))
    assert sweep("a cat", "--over", "steps=1,2,8", "-o", "s.mp4")[0] == 0
    seconds = [one.stages[3].seconds for one in told[0]]
    assert [stage.stages[3].name for stage in told[0]] == ["denoise"] * 3
    assert seconds[0] < seconds[1] < seconds[2]


def test_an_estimate_is_of_the_way_that_its_clip_is_loaded(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    monkeypatch.setattr(Report, "expect", lambda _self, made, **_: told.append(made))
    over = ("--over", "offload=stage,block", "--dtype", "fp32")
    assert sweep("a cat", *over, "--steps", 1, "-o", "s.png")[0] == 0
    assert {(one.setup.offload, one.setup.dtype) for one in told[0]} == {
        ("stage", "fp32"), ("block", "fp32")
    }


def test_clips_that_are_there_are_not_made_again(sweep: Sweep) -> None:
    first = sweep("a cat", "--over", "steps=1,2", "-o", "s.mp4")[1]
    assert [cell["made"] for cell in first["cells"]] == [True, True]
    seed = first["cells"][0]["seed"]
    Path("s.png").unlink()  # as if it had been stopped
    Path("s.mp4").unlink()
    Path(first["cells"][1]["path"]).unlink()
    again = sweep("a cat", "--over", "steps=1,2,3", "-o", "s.mp4")[1]
    assert [cell["made"] for cell in again["cells"]] == [False, True, True]
    assert [cell["seed"] for cell in again["cells"]] == [seed] * 3
    other = sweep("a dog", "--over", "steps=1", "-o", "s.mp4", "--overwrite")[1]
    assert [cell["made"] for cell in other["cells"]] == [True]


def test_pictures_and_ways_of_loading_vary_too(sweep: Sweep) -> None:
    for name, value in (("a.png", 20), ("b.png", 220)):
        Image.new("RGB", (32, 32), (value, 0, 0)).save(name)
    more = ("--seed", 1, "--steps", 1, "-o", "s.png", "--overwrite")
    cells = sweep("a cat", "--over", "image=a.png,b.png", *more)[1]["cells"]
    assert len({cell["path"] for cell in cells}) == 2
    Image.new("RGB", (32, 32), (90, 0, 0)).save("a.png")
    again = sweep("a cat", "--over", "image=a.png,b.png", *more)[1]["cells"]
    assert [cell["made"] for cell in again] == [True, False]
    cells = sweep("a cat", "--over", "dtype=fp32,bf16", *more)[1]["cells"]
    assert [Clip.from_file(cell["path"]).recipe["dtype"] for cell in cells] == ["fp32", "bf16"]


def test_devices_vary_too_and_leave_again(sweep: Sweep) -> None:
    words = ("--seed", 1, "--steps", 4, "--cache", "forecast:100", "-o", "s.png")
    code, result, _ = sweep("a cat", "--over", "devices=1,2", *words)
    assert code == 0
    recipes = [Clip.from_file(cell["path"]).recipe for cell in result["cells"]]
    assert "devices" not in recipes[0]
    assert recipes[1]["devices"]["count"] == 2
    assert recipes[1]["plan"]["cache"]["method"] == "forecast"
    assert not torch.distributed.is_initialized()


def test_what_cant_be_swept_is_refused_before_anything_is_made(sweep: Sweep) -> None:
    for over, reason in (
        ("prompt:dog=cat,cow", "no 'dog' to replace"), ("step=1,2", "did you mean 'steps'?"),
        ("steps=1,no", "invalid int value"), ("seed=0..400", "a rising range of 100 numbers"),
        ("seed=0..99|0", "invalid int value"), ("image=none.png", "does not exist"),
        ("size=33x33", "33"),
    ):
        code, _, err = sweep("a cat", "--over", over, "-o", "s.png")
        assert code == 2
        assert reason in err
    assert "must end in" in sweep("a cat", "--over", "steps=1,2", "-o", "s.gif")[2]
    assert "--count" in sweep("a cat", "--over", "steps=1,2", "--count", 2)[2]
    twice = ("--over", "steps=1,2", "--over", "prompt:cat=cow", "--over")
    assert "--over steps is given 2 times" in sweep("a cat", *twice, "steps=3,4")[2]
    assert "--over prompt:cat is given 2 times" in sweep("a cat", *twice, "prompt:cat=dog")[2]
    assert "names '1' twice" in sweep("a cat", "--over", "seed=1,2,1")[2]
    many = sweep("a cat", "--over", "seed=1..50", "--over", "steps=1,2,3", "-o", "s.png")
    assert "150 clips is too large" in many[2]
    assert list(Path().iterdir()) == []


def test_what_the_checks_found_is_reported_and_strict_fails(sweep: Sweep) -> None:
    words = ("a cat", "--seed", 5, "--over", "steps=1,2", "--image", "a.png", "-o", "s.png")
    Image.new("RGB", (32, 32)).save("a.png")  # a tiny model of random weights can't draw black
    code, result, err = sweep(*words)
    assert code == 0
    assert [cell["verdict"] for cell in result["cells"]] == ["fault", "fault"]
    assert "steps 1: the first frame is unlike the picture given" in err
    assert sweep(*words, "--overwrite", "--strict")[0] == 1


def test_axes_are_read() -> None:
    assert read_axis("seed=3..6").values == ("3", "4", "5", "6")
    assert read_axis("guidance-low=1,2").key == "guidance_low"
    assert read_axis("prompt=a cat, asleep|a dog").values == ("a cat, asleep", "a dog")
    assert read_axis("prompt:red car=blue cat").word == "red car"
    for text in ("seed", "=1", "seed=", "steps:x=1"):
        with pytest.raises(ArgumentTypeError):
            read_axis(text)


def shade(path: Path, value: int, size: tuple[int, int], fps: int, num_frames: int) -> Path:
    """A clip that brightens by 10 a frame."""
    steps = value + 10 * np.arange(num_frames, dtype=np.uint8)
    frames = np.broadcast_to(steps[:, None, None, None], (num_frames, size[1], size[0], 3))
    return write_clip(path, [frames], ClipInfo(Fraction(fps), size, num_frames))


def test_a_grid_plays_clips_of_any_size_rate_and_length(tmp_path: Path) -> None:
    paths = [
        shade(tmp_path / "a.mkv", 10, (96, 64), 12, 6),
        shade(tmp_path / "b.mkv", 20, (48, 32), 6, 2),
        shade(tmp_path / "c.mkv", 30, (96, 64), 12, 3),
    ]
    grid = Grid(paths, ["one", "two", "a label far too long for the room it has here"], 2)
    frames = np.concatenate(list(grid.frames()))
    assert frames.shape == (6, grid.info.size[1], grid.info.size[0], 3)
    assert grid.info.fps == 12
    assert (grid.info.size[0] % 2, grid.info.size[1] % 2) == (0, 0)
    rows = frames.shape[1] // 2
    across = (frames.shape[2] - 4) // 2
    assert frames[:, 50, 20, 0].tolist() == [10, 20, 30, 40, 50, 60]
    assert frames[:, 50, across + 30, 0].tolist() == [20, 20, 30, 30, 30, 30]
    assert frames[:, rows + 50, 20, 0].tolist() == [30, 40, 50, 50, 50, 50]
    assert (frames[0, rows:, across + 4 :] == 255).all()  # an empty place
    assert (frames[0, :16] < 100).any()  # the labels
    assert np.array_equal(grid.still(), frames[3])


def test_a_grid_of_large_clips_is_scaled_down(tmp_path: Path) -> None:
    path = shade(tmp_path / "a.mkv", 0, (1280, 720), 12, 1)
    grid = Grid([path] * 10, ["x"] * 10, 5)
    assert max(grid.info.size) <= MAX_SIDE + 6 * 5
    assert grid.info.size[0] > 3500
