"""Clips whose pictures the VAE takes in tiles: asked for, chosen, recorded, resumed, shared."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.wan_models import build_diffusers
from vidgen.cli.main import main
from vidgen.core.errors import InputError, ModelError, OutputError
from vidgen.core.request import Loading, Request
from vidgen.core.shapes import Tiles
from vidgen.media.clip import Clip
from vidgen.models.vae_tiles import grids
from vidgen.pipeline import codec, setups
from vidgen.pipeline.engine import Engine, load
from vidgen.pipeline.journal.journal import Journal
from vidgen.pipeline.memory import estimate
from vidgen.pipeline.parallel.devices import start_devices
from vidgen.pipeline.plan import settle
from vidgen.pipeline.replay import loading_from_recipe, request_from_recipe
from vidgen.pipeline.setups import choose
from vidgen.pipeline.types import Setup
from vidgen.weights.layouts import open_model

PROMPT = "a red car bounces across the desert"
CPU = torch.device("cpu")
OPTIONS = {"seed": 7, "size": "96x64", "steps": 1}


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Engine:
    return load(str(tiny_model), device="cpu", dtype="fp32")


def in_tiles(engine: Engine, tiles: str) -> Engine:
    return Engine(engine.folder, CPU, engine.loading.replace(tiles=tiles))


def test_tiles_show_nowhere_but_in_the_plan(engine: Engine, tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8)
    whole, cut = (
        in_tiles(engine, tiles).generate(PROMPT, **OPTIONS, image=picture)
        for tiles in ("auto", "2x3")
    )
    assert (whole.latents - cut.latents).abs().max() < 1e-5
    assert np.abs(whole.frames.astype(int) - cut.frames).max() <= 1
    assert np.abs(whole.frames.astype(int) - cut.frames).mean() < 0.01
    assert whole.recipe["plan"]["tiles"] is None
    assert cut.recipe["plan"]["tiles"] == {"rows": 2, "columns": 3}
    assert "tiles" not in cut.recipe["request"]
    again, loading = request_from_recipe(cut.recipe, tmp_path), loading_from_recipe(cut.recipe)
    assert loading["tiles"] == "2x3"
    assert np.array_equal(load(**loading).generate(again).frames, cut.frames)
    assert loading_from_recipe(whole.recipe)["tiles"] == "none"


@pytest.mark.parametrize("variant", ["vace", "ti2v-5b"])
def test_every_encoding_and_decoding_of_wan_is_cut(tmp_path: Path, variant: str) -> None:
    wan = load(str(build_diffusers(tmp_path / "wan", variant)), device="cpu", dtype="fp32")
    picture = np.full((64, 64, 3), 90, np.uint8)
    options = {"seed": 1, "steps": 1, "size": "64x64", "frames": 9, "guidance": 1.0}
    whole, cut = (
        in_tiles(wan, tiles).generate(PROMPT, **options, image=picture) for tiles in ("none", "2x2")
    )
    assert (whole.latents - cut.latents).abs().max() < 1e-4 * float(whole.latents.abs().max())
    assert np.abs(whole.frames.astype(int) - cut.frames).max() <= 1


def test_a_long_clip_is_decoded_in_tiles(engine: Engine) -> None:
    options = {**OPTIONS, "frames": 37, "guidance": 1.0}
    whole, cut = (in_tiles(engine, tiles).generate(PROMPT, **options) for tiles in ("none", "1x2"))
    assert np.abs(whole.frames.astype(int) - cut.frames).max() <= 1


def test_frames_dont_depend_on_where_decoding_begins_nor_on_devices(
    engine: Engine, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = torch.randn(1, 4, 64, 4, 4, generator=torch.Generator().manual_seed(0))
    tiles = Tiles(1, 2)
    alone = [*engine.decode_video(latents, 0, tiles)]
    assert len(alone) == 64
    assert all(map(torch.equal, alone[50:], engine.decode_video(latents, 1 + 49 * 4, tiles)))
    devices = start_devices(2, CPU)
    try:
        asked = Loading(offload="none", dtype="fp32")
        both = Engine(open_model(str(tiny_model)), CPU, asked, devices=devices)
        sent, send = [], devices._send
        monkeypatch.setattr(devices, "_send", lambda *order: sent.append(order) or send(*order))
        shared = [*both.decode_video(latents, 0, tiles)]
        assert sent.pop()[1] == "decode", "too short to be shared"
    finally:
        devices.close()
    assert all(map(torch.equal, alone, shared))


def test_tiles_are_chosen_only_where_the_whole_does_not_fit(tiny_model: Path) -> None:
    folder = open_model(str(tiny_model))
    request = Request.of(PROMPT, {"seed": 1, "size": "512x512", "frames": 9})
    plan = settle(folder, request)

    def need(offload: str, tiles: Tiles | None = None) -> int:
        return estimate(folder, plan, request, Setup(CPU, "fp32", offload, tiles=tiles)).peak_bytes

    def chosen(have: int, tiles: str = "auto", **options: str) -> Setup:
        loading = Loading(tiles=tiles, **options)
        return choose(folder, plan, request, loading, CPU, have, dtype="fp32").setup

    least = min(map(need, ("none", "stage", "block")))
    assert chosen(least).tiles is None
    found = chosen(least - 1)
    assert found.tiles == next(grids(64, 64)) == Tiles(2, 2)
    assert found.offload == "none", "tiles don't need weights to leave"
    assert found.dtype == "fp32", "nor another dtype, which changes results"
    smaller = need("none", Tiles(2, 2))
    assert smaller < 0.8 * least
    assert chosen(smaller - 1).tiles in (Tiles(2, 2), Tiles(3, 3))
    assert chosen(1 << 40, tiles="3x2").tiles == Tiles(3, 2)
    with pytest.raises(ModelError, match=r"these fit:.* --tiles 2x2 \("):
        chosen(least - 1, tiles="none", dtype="fp32")
    with pytest.raises(ModelError, match="these fit"):
        chosen(need("block", Tiles(8, 8)) // 2)


def test_a_clip_that_was_cut_continues_cut(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"seed": 3, "size": "256x256", "frames": 9, "steps": 1, "guidance": 1.0}
    plan = engine.plan(*engine.read(Request.of(PROMPT, options)))
    setup = Setup(CPU, "fp32", "none")
    request = Request.of(PROMPT, options)
    wholes = [estimate(engine.folder, plan, request, replace(setup, offload=offload)).peak_bytes
              for offload in ("none", "stage", "block")]
    held = sum(engine.loader.needed_bytes(role, offload="stage") for role in engine.loader.resident)
    monkeypatch.setattr(setups, "available_memory", lambda _: min(wholes) - 1 - held)
    told, journal = [], Journal(tmp_path / "clip.mkv")
    straight = engine.generate(request, on_estimate=told.append)
    tiles = told[0].setup.tiles
    assert tiles is not None
    assert "--tiles 2x2: " in told[0].choice
    with journal.running(straight.recipe):
        journal.keep_latents(straight.latents)
        journal.pause()
    monkeypatch.setattr(setups, "available_memory", lambda _: 1 << 40)
    resumed = engine.generate(request, journal=Journal(tmp_path / "clip.mkv", resume=True))
    assert resumed.recipe["plan"]["tiles"] == straight.recipe["plan"]["tiles"]
    assert np.array_equal(resumed.frames, straight.frames)
    with pytest.raises(InputError, match=r"plan\.tiles"):
        in_tiles(engine, "none").generate(
            request, journal=Journal(tmp_path / "clip.mkv", resume=True))


def test_what_tiles_keep_lies_in_files_and_a_full_disk_is_reported(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = torch.randn(1, 4, 6, 8, 12)
    expected = [*engine.decode_video(latents, 0, Tiles(2, 2))]
    monkeypatch.setattr(codec, "IN_MEMORY", 0)
    found = engine.decode_video(latents, 0, Tiles(2, 2))
    assert all(map(torch.equal, expected, found))

    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(codec, "os", SimpleNamespace(posix_fallocate=full))
    with pytest.raises(OutputError, match="space"):
        [*engine.decode_video(latents, 0, Tiles(2, 2))]


@pytest.mark.parametrize(("tiles", "message"), [
    ("2", "tiles is '2'; give auto, none, or"), ("0x2", "tiles is '0x2'"), ("100x1", "1 to 99"),
    ("9x1", "the clip has 8x12 latents"),
])  # fmt: skip
def test_tiles_that_cannot_be_are_refused(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], tiles: str, message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["generate", PROMPT, "--model", str(tiny_model), "--size", "96x64", "--tiles",
                 tiles, "-o", "x.mp4"]) == 2
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_extend_and_plan_take_tiles(
    engine: Engine, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logging.disable(logging.WARNING)
    monkeypatch.setattr("vidgen.pipeline.timing.measure_rates", lambda *_: None)
    clip, longer = tmp_path / "x.mkv", tmp_path / "longer.mkv"
    engine.generate(PROMPT, **OPTIONS, frames=9).save(clip)
    assert main(["extend", str(clip), "--seconds", "0.5", "--tiles", "1x2", "-o", str(longer)]) == 0
    assert Clip.from_file(longer).recipe["plan"]["tiles"] == {"rows": 1, "columns": 2}
    capsys.readouterr()
    assert main(["plan", PROMPT, "--model", str(tiny_model), "--tiles", "2x2", "--json"]) == 0
    assert '"tiles": "2x2"' in capsys.readouterr().out
    logging.disable(logging.NOTSET)
