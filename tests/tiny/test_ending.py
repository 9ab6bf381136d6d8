"""Files that go on from their latents only while they end as their recipe tells."""

from __future__ import annotations

import logging
import subprocess
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from imageio_ffmpeg import get_ffmpeg_exe

from tests.models import build_tiny_model
from train.toybox.world.render import render
from train.toybox.world.scenes import compose_scene
from vidgen.cli.main import main
from vidgen.core.errors import InputError
from vidgen.core.request import Request
from vidgen.media.checks import check_file
from vidgen.media.clip import Clip
from vidgen.media.ending import ENDING, read_ending
from vidgen.media.probe import read_recipe
from vidgen.media.types import ClipInfo
from vidgen.media.video_reader import VideoReader
from vidgen.pipeline.engine import Engine, load

KEEPING = ("-movflags", "use_metadata_tags", "-c:a", "copy")  # of metadata, as mp4 is told to


def edited(source: Path, target: Path, *options: str) -> Path:
    """What another program makes of a file, metadata included."""
    command = [get_ffmpeg_exe(), "-v", "error", "-y", "-i", source, *options, *KEEPING, target]
    subprocess.run(command, check=True)
    assert read_recipe(target) is not None
    return target


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    video = render([compose_scene(7, "car", "grows", "desert")], 17, 64, 64).video[0]
    return ((video + 1) * 127.5).round().permute(1, 2, 3, 0).byte().numpy()


@pytest.fixture(scope="module")
def film(frames: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(frames, tmp_path_factory.mktemp("film") / "a.mp4")


def write(frames: np.ndarray, path: Path) -> Path:
    recipe = {"plan": {"kept_frames": len(frames)}, "model": {"name": "x"}}
    info = ClipInfo(Fraction(12), (64, 64), len(frames), recipe=recipe)
    return Clip(lambda start=0: iter([frames[start:]]), info).save(path)


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".mkv", ".gif", ".webp", ".apng"])
def test_every_format_ends_as_its_recipe_tells(frames: np.ndarray, tmp_path: Path, suffix: str):
    ending = read_ending(write(frames, tmp_path / f"a{suffix}"))
    assert len(ending.recipe[ENDING]) < 1100
    assert ending.matches_recipe
    assert (ending.num_frames, ending.size, ending.is_plain) == (17, (64, 64), True)


@pytest.mark.parametrize(("name", "options", "same"), [
    ("b.mp4", ("-crf", "35"), True),
    ("b.webm", ("-c:v", "libvpx-vp9", "-crf", "45", "-b:v", "0", "-an"), True),
    ("b.mp4", ("-vf", "hflip"), False),
    ("b.mp4", ("-vf", "eq=brightness=0.06"), False),
    ("b.mp4", ("-vf", "hue=s=0"), False),
    ("b.mp4", ("-vf", "reverse"), False),
    ("b.mp4", ("-t", "0.8"), False),
    ("b.mp4", ("-vf", "scale=96:64"), False),
])
def test_encoding_once_more_keeps_it_and_editing_does_not(
    film: Path, tmp_path: Path, name: str, options: tuple[str, ...], *, same: bool
) -> None:
    path = edited(film, tmp_path / name, *options)
    assert read_ending(path).matches_recipe is same
    assert ("ending" in {finding.kind for finding in check_file(path)}) is not same


@pytest.mark.parametrize("told", ["!", "AAAA", 7, [], {}])
def test_a_damaged_entry_is_no_ending(frames: np.ndarray, tmp_path: Path, told: object) -> None:
    ending = read_ending(write(frames, tmp_path / "a.mkv"))
    ending.recipe[ENDING] = told
    assert not ending.matches_recipe
    del ending.recipe[ENDING]
    assert ending.matches_recipe, "files from before it was written"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("models") / "heard"
    return load(build_tiny_model(folder, sound=True), dtype="fp32")


def test_an_edited_clip_continues_from_what_it_shows(
    engine: Engine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "a.mp4"
    engine.generate("a cat", seed=1, steps=1, frames=17).save(source)
    for name, options in ("mirrored", ("-vf", "hflip")), ("cut", ("-t", "0.9")):
        path = edited(source, tmp_path / f"{name}.mp4", *options)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            clip = engine.generate("a cat", seed=1, steps=1, prefix=path, seconds=2)
        assert f"{name}.mp4 doesn't end as its recipe records" in caplog.text
        assert clip.recipe["hand_over"] == "pixels"
        shown = Clip.from_file(path).frames
        assert np.array_equal(clip.frames[: len(shown)], shown)


@pytest.mark.parametrize(("options", "asked", "why"), [
    (("-ss", "0.4", "-crf", "4"), {}, "has 12 of the 17 frames that its recipe records"),
    ((), {"fps": 8}, "holds latents of another size or frame rate than requested"),
])
def test_latents_that_do_not_suit_are_reported(
    engine: Engine, tmp_path: Path, caplog: pytest.LogCaptureFixture, options: tuple[str, ...],
    asked: dict[str, int], why: str,
) -> None:
    engine.generate("a cat", seed=1, steps=1, frames=17).save(tmp_path / "a.mp4")
    path = tmp_path / "a.mp4"
    if options:
        path = edited(path, tmp_path / "b.mp4", *options)
    with caplog.at_level(logging.WARNING):
        engine.generate("a cat", seed=1, steps=1, prefix=path, seconds=3, **asked)
    assert why in caplog.text


def test_latents_that_reach_on_are_shown_without_another_window(
    engine: Engine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of 17 frames that were made 14 are shown; two more need nothing but the decoder."""
    path, model = tmp_path / "a.mp4", str(engine.folder.path)
    engine.generate("a cat", seed=1, steps=1, seconds=14 / 12).save(path)
    words = ["extend", str(path), "--seconds", str(2 / 12), "--model", model, "--dtype", "fp32"]
    with caplog.at_level(logging.WARNING):
        assert main(words) == 0
    assert "its latents hold 3 frames after its end" in caplog.text
    with VideoReader(tmp_path / "a-longer.mp4") as reader:
        assert len([*reader]) == 16
    still = np.zeros((32, 32, 3), np.uint8)
    for given in {"last_image": still, "seconds": 16 / 12}, {"frame": [(15 / 12, still)]}:
        with pytest.raises(InputError, match="falls on one of the 3 frames"):
            engine.generate("a cat", seed=1, steps=1, prefix=path, **{"seconds": 2, **given})
    caplog.clear()
    met = engine.generate(
        "a cat", seed=1, steps=1, prefix=path, seconds=2, frame=[(17 / 12, still)]
    )
    assert len(met.frames) == 24
    assert not caplog.text


def test_a_beginning_that_leaves_nothing_is_reported_before_time_is_foreseen(
    engine: Engine, tmp_path: Path
) -> None:
    engine.generate("a cat", seed=1, steps=1, frames=17).save(tmp_path / "a.mp4")
    message = "17 frames, which leaves nothing to generate in a clip of 9"
    with pytest.raises(InputError, match=message):
        engine.generate(Request.of("a cat", {"prefix": tmp_path / "a.mp4", "frames": 9}))
