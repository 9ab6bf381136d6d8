"""A converted model in diffusers' stock pipeline makes the clip that ours makes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline

from tests.models import build_tiny_model
from vidgen.core.errors import ModelError
from vidgen.core.shapes import LatentShape
from vidgen.diffusion.noise import draw_noise
from vidgen.models.dit import AudioConfig, SpacetimeDiT
from vidgen.models.presets import DIT_PRESETS
from vidgen.pipeline.video import load
from vidgen.weights.convert import to_diffusers
from vidgen.weights.folder import list_embedded, open_model
from vidgen.weights.load import save_module

PROMPT = "a red car bounces across the desert at night"


def both(model: str, target: Path, frames: int, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames [T, H, W, 3] in [0, 1] of our engine and of stock diffusers, fp32."""
    folder = open_model(model)
    to_diffusers(folder, target)
    engine = load(model, device="cpu", dtype="fp32")
    clip = engine.generate(PROMPT, seed=3, frames=frames, steps=steps)
    noise = draw_noise(3, LatentShape(*clip.latents.shape[1:]))
    pipe = WanPipeline.from_pretrained(target, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    made = pipe(
        prompt=PROMPT, negative_prompt="", num_frames=frames, num_inference_steps=steps,
        height=clip.size[1], width=clip.size[0], guidance_scale=folder.defaults.guidance_scale,
        latents=noise, output_type="pt",
    ).frames[0]
    ours = torch.from_numpy(clip.frames).float() / 255
    return ours, made.permute(0, 2, 3, 1).float()


def test_a_tiny_model_makes_the_same_clip_in_diffusers(tiny_model: Path, tmp_path: Path) -> None:
    ours, theirs = both(str(tiny_model), tmp_path / "wan", frames=9, steps=4)
    assert (ours - theirs).abs().max() < 1e-3 + 0.5 / 255  # ours is rounded to 8 bits


@pytest.mark.embedded
@pytest.mark.skipif("toybox" not in list_embedded(), reason="the embedded model isn't here")
def test_the_embedded_model_makes_the_same_clip_in_diffusers(tmp_path: Path) -> None:
    ours, theirs = both("toybox", tmp_path / "wan", frames=9, steps=4)
    assert (ours - theirs).abs().max() < 1e-3 + 0.5 / 255


def test_audio_parts_are_named_and_left_behind(tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path / "tiny")
    dit = SpacetimeDiT(replace(DIT_PRESETS["tiny"], audio=AudioConfig(4, 8, 31.25)))
    save_module(dit.state_dict(), dit.config, folder / "transformer", torch.float32)
    left = to_diffusers(open_model(str(folder)), tmp_path / "wan")
    assert left
    assert all("audio" in name for name in left)


def test_an_existing_target_is_left_alone(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="exists"):
        to_diffusers(open_model(str(tiny_model)), tmp_path)
