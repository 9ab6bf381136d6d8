"""Previews: what they show, how seldom they come, and that they go when the clip is done."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eval.toybox.quality import psnr
from tests.wan_models import build_diffusers
from train.toybox.world.render import render
from train.toybox.world.scenes import sample_scenes
from vidgen.cli.main import main
from vidgen.core.errors import Cancelled
from vidgen.core.protocols import SamplerState, StepInfo
from vidgen.models.presets import VAE_PRESETS
from vidgen.pipeline import preview
from vidgen.pipeline.engine import Engine, load
from vidgen.pipeline.preview import Glimpses, open_preview, preview_path, write_preview
from vidgen.pipeline.types import Preview
from vidgen.weights.layouts import open_model

PROMPT = "a red car bounces across the desert"


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Engine:
    return load(str(tiny_model), device="cpu", dtype="fp32")


def info(step: int) -> StepInfo:
    latents = torch.randn(1, 4, 3, 4, 4)
    return StepInfo(9, 0.5, 0.4, latents, SamplerState(step, latents))


def test_python_is_shown_small_frames(engine: Engine) -> None:
    shown: list[Preview] = []
    plain = engine.generate(PROMPT, seed=1, steps=3).latents
    clip = engine.generate(PROMPT, seed=1, steps=3, on_preview=shown.append)
    assert torch.equal(clip.latents, plain)
    frames, latents = shown[0].frames, clip.latents
    side = frames.shape[1] // latents.shape[3]
    assert frames.dtype == np.uint8
    assert frames.shape == (3, side * latents.shape[3], side * latents.shape[4], 3)
    assert (shown[0].fps, shown[0].clip, shown[0].step) == (Fraction(3), 1, 1)


def test_previews_wait_fifty_times_as_long_as_they_take(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(preview.time, "monotonic", lambda: now[0])
    shown: list[int] = []

    def tell(made: Preview) -> None:
        shown.append(made.step)
        now[0] += 0.1

    glimpses = Glimpses(engine.folder, tell, Fraction(12), 1)
    for step in range(1, 13):
        glimpses.on_step(info(step))
        now[0] += 0.9
    assert shown == [1, 7]  # 0.1 s each: the next one 5 s after the first was done


def test_wans_vaes_have_published_maps_and_others_none(
    engine: Engine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert open_preview(engine.folder).weight.shape == (48, 4, 3, 3)
    for variant, channels in (("ti2v-5b", 48), ("t2v", 16)):
        folder = open_model(str(build_diffusers(tmp_path / variant, variant)))
        vae = replace(folder.components["vae"], config=VAE_PRESETS[f"wan2{1 + (channels == 48)}"])
        decoder = open_preview(replace(folder, components={"vae": vae}))
        grey = decoder(torch.zeros(1, channels, 2, 3, 5))
        assert grey.shape == (2, 3, 5, 3)
        assert np.abs(grey[0, 0, 0] - (decoder.bias.numpy() + 1) * 127.5).max() <= 0.5
    bare = replace(engine.folder, path=tmp_path, name="bare")
    assert open_preview(bare) is None
    assert "no previews: bare has no readable preview/model.safetensors" in caplog.text
    Glimpses(bare, pytest.fail, Fraction(12), 1).on_step(info(1))


@pytest.mark.embedded
def test_the_embedded_models_previews_look_like_its_clips() -> None:
    engine = load("toybox")
    decoder = open_preview(engine.folder)
    video = render(sample_scenes(123, 1), 9).video
    frames = torch.from_numpy(decoder(engine.encode_video(video)))
    small = torch.nn.functional.interpolate(
        video[0, :, ::4].transpose(0, 1), size=frames.shape[1:3], mode="area"
    )
    shown = frames.permute(0, 3, 1, 2) / 127.5 - 1
    assert float(psnr(shown[None].transpose(1, 2), small[None].transpose(1, 2))) > 20


def test_an_animation_is_next_to_the_output_until_that_is_done(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "x.mp4"
    seen: list[int] = []

    def spy(made: Preview, output: Path) -> None:
        write_preview(made, output)
        with Image.open(preview_path(out)) as picture:
            seen.append(picture.n_frames)

    monkeypatch.setattr(preview, "write_preview", spy)
    monkeypatch.setattr(preview, "PATIENCE", 0)
    arguments = ["generate", PROMPT, "--model", str(engine.folder.path), "--seed", "1", "--steps",
                 "3", "--preview", "-o", str(out)]  # fmt: skip
    assert main(arguments) == 0
    assert seen == [3, 3, 3]
    assert out.exists()
    assert not preview_path(out).exists()


def test_a_preview_that_cant_be_written_stops_nothing(
    engine: Engine, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    made: list[Preview] = []

    def stop(shown: Preview) -> None:
        made.append(shown)
        raise Cancelled("enough")

    with pytest.raises(Cancelled):
        engine.generate(PROMPT, seed=1, on_preview=stop)
    write_preview(made[0], tmp_path / "missing" / "x.mp4")
    assert "no preview" in caplog.text
