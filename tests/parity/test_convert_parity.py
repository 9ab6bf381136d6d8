"""A converted model in diffusers' stock pipelines: the same weights, settings and clips."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, WanPipeline
from PIL import Image

from tests.wan_models import VARIANTS, build_original, make_pipeline
from vidgen.core.shapes import LatentShape
from vidgen.diffusion.flow import draw_noise
from vidgen.pipeline.engine import load
from vidgen.weights.convert import convert
from vidgen.weights.folder import list_embedded
from vidgen.weights.layouts import open_model

PROMPT = "a red car bounces across the desert at night"


def both(model: str, target: Path, frames: int, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames [T, H, W, 3] in [0, 1] of our engine and of stock diffusers, fp32."""
    folder = open_model(model)
    convert(folder, target, "diffusers")
    engine = load(model, device="cpu", dtype="fp32")
    # without sound, at one frame rate, at all levels under guidance: WanPipeline knows no other
    given = {"seed": 3, "frames": frames, "steps": steps, "sampler": "unipc",
             "guidance_interval": (0.0, 1.0), "settings": {"temporal_upsampling": 1}}
    clip = engine.generate(PROMPT, **given, audio="none")
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


@pytest.mark.parametrize("kind", ["tiny_model", "tiny_experts"])
def test_a_tiny_model_makes_the_same_clip_in_diffusers(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(kind)
    ours, theirs = both(str(model), tmp_path / "wan", frames=9, steps=4)
    assert (ours - theirs).abs().max() < 1e-3 + 0.5 / 255  # ours is rounded to 8 bits


@pytest.mark.embedded
@pytest.mark.skipif("toybox" not in list_embedded(), reason="the embedded model isn't here")
def test_the_embedded_model_makes_the_same_clip_in_diffusers(tmp_path: Path) -> None:
    ours, theirs = both("toybox", tmp_path / "wan", frames=9, steps=4)
    assert (ours - theirs).abs().max() < 1e-3 + 0.5 / 255


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_converted_wan_release_is_diffusers_own_pipeline(variant: str, tmp_path: Path) -> None:
    source = build_original(tmp_path / "source", variant)
    convert(open_model(str(source)), tmp_path / "theirs", "diffusers")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "theirs")
    expected = make_pipeline(variant)
    assert type(pipe) is type(expected)
    assert pipe.config.get("boundary_ratio") == expected.config.get("boundary_ratio")
    assert pipe.config.get("expand_timesteps") == expected.config.get("expand_timesteps")
    for name, part in expected.components.items():
        if isinstance(part, torch.nn.Module):
            state, theirs = getattr(pipe, name).state_dict(), part.state_dict()
            assert state.keys() == theirs.keys()
            assert all(torch.equal(state[key], theirs[key]) for key in theirs), name
        else:
            assert (getattr(pipe, name, None) is None) == (part is None), name
    assert pipe.tokenizer("a red car").input_ids == expected.tokenizer("a red car").input_ids
    if variant in ("i2v", "flf2v"):
        picture = Image.radial_gradient("L").convert("RGB")
        seen = [p.image_processor(picture, return_tensors="pt") for p in (pipe, expected)]
        assert torch.equal(seen[0].pixel_values, seen[1].pixel_values)
