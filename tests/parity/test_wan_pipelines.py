"""Every Wan variant and task: the same weights and noise make the same clip in diffusers.

Final latents within 1e-3 after 4 guided steps, decoded frames at 60 dB or more. What was measured
goes to `docs/reference/models.md` by `python -m tests.parity.test_wan_pipelines`.
"""

from __future__ import annotations

import inspect
import tempfile
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    WanImageToVideoPipeline,
    WanVideoToVideoPipeline,
)
from diffusers.pipelines.wan import pipeline_wan_video2video
from PIL import Image

from eval.toybox.quality import psnr
from tests.wan_models import make_pipeline
from vidgen.core.shapes import LatentShape
from vidgen.diffusion.flow import draw_noise
from vidgen.media.types import ClipInfo
from vidgen.media.write import write_clip
from vidgen.pipeline.engine import load

PROMPT, NEGATIVE = "a red car bounces across the desert", "blurred &amp; grey"
FRAMES, SIZE, SEED, STEPS = 9, 32, 7, 4
SAMPLERS = ("unipc", "euler")


def pictures(seed: int, count: int) -> list[np.ndarray]:
    """Smooth pictures uint8 [32, 32, 3]."""
    draw = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 5, 5, generator=draw)
    smooth = torch.nn.functional.interpolate(coarse, (SIZE, SIZE), mode="bicubic").clamp(0, 1)
    return list((smooth.permute(0, 2, 3, 1) * 255).round().byte().numpy())


STILL, LAST, SUBJECT = pictures(0, 3)
CLIP = pictures(1, FRAMES)
MASK = np.zeros((SIZE, SIZE, 3), np.uint8)
MASK[:, SIZE // 2 :] = 255


@dataclass(frozen=True)
class Case:
    """One variant under one task, as both sides are told."""

    variant: str
    task: str
    ours: dict[str, Any] = field(default_factory=dict)
    theirs: dict[str, Any] = field(default_factory=dict)
    pipeline: type[DiffusionPipeline] | None = None
    references: int = 0

    @property
    def name(self) -> str:
        return f"{self.variant} {self.task}"


def stack(frames: list[np.ndarray]) -> torch.Tensor:
    """Frames as diffusers takes a video: [1, T, 3, H, W] in [0, 1]."""
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)[None] / 255


FIRST = {"image": STILL}, {"image": Image.fromarray(STILL)}
BOTH = (
    {"image": STILL, "last_image": LAST},
    {"image": Image.fromarray(STILL), "last_image": Image.fromarray(LAST)},
)
VIDEO, WANTED = stack(CLIP), stack([MASK] * FRAMES)
LATER = torch.ones(1, FRAMES, 3, SIZE, SIZE)
LATER[:, 0] = 0
BEGINS = {"video": torch.where(LATER > 0, 0.5, stack([STILL] * FRAMES)), "mask": LATER}
PAIR = {"guidance": 4.0, "guidance_low": 3.0}, {"guidance_scale": 4.0, "guidance_scale_2": 3.0}
CASES = [
    Case("t2v", "text"),
    Case("t2v", "video", {"video": "clip", "strength": 0.5},
         {"video": [Image.fromarray(frame) for frame in CLIP], "strength": 0.5},
         WanVideoToVideoPipeline),
    Case("i2v", "first frame", *FIRST),
    Case("flf2v", "first and last frame", *BOTH),
    Case("vace", "text"),
    Case("vace", "first frame", {"image": STILL}, BEGINS),
    Case("vace", "reference", {"reference": (SUBJECT,)},
         {"reference_images": [Image.fromarray(SUBJECT)]}, references=1),
    Case("vace", "control and references", {"control": "clip", "reference": (SUBJECT, LAST)},
         {"video": VIDEO, "mask": torch.ones_like(VIDEO),
          "reference_images": [Image.fromarray(SUBJECT), Image.fromarray(LAST)]}, references=2),
    Case("vace", "mask", {"video": "clip", "mask": MASK},
         {"video": torch.where(WANTED > 0.5, 0.5, VIDEO), "mask": WANTED}),
    Case("t2v-a14b", "text", *PAIR),
    Case("i2v-a14b", "first frame", FIRST[0] | PAIR[0], FIRST[1] | PAIR[1]),
    Case("ti2v-5b", "text"),
    Case("ti2v-5b", "first frame", *FIRST, WanImageToVideoPipeline),
]


def diffusers_pipeline(case: Case, sampler: str) -> DiffusionPipeline:
    """Diffusers' pipeline of the case's task, with the variant's weights."""
    pipe = make_pipeline(case.variant)
    if case.pipeline is not None:
        wanted = inspect.signature(case.pipeline.__init__).parameters
        parts = {name: part for name, part in pipe.components.items() if name in wanted}
        if "expand_timesteps" in wanted:
            parts["expand_timesteps"] = pipe.config.expand_timesteps
        pipe = case.pipeline(**parts)
    if sampler == "euler":
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=pipe.scheduler.config.flow_shift)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def compare(case: Case, sampler: Any, folder: Path) -> tuple[float, float]:
    """The largest difference of final latents, and the PSNR of the decoded frames in dB."""
    clip_file = folder.parent / "clip.mkv"
    if not folder.exists():
        make_pipeline(case.variant).save_pretrained(folder)
    if not clip_file.exists():
        write_clip(clip_file, [np.stack(CLIP)], ClipInfo(Fraction(16), (SIZE, SIZE), FRAMES))
    pipe = diffusers_pipeline(case, sampler)
    options = {k: str(clip_file) if isinstance(v, str) else v for k, v in case.ours.items()}
    if case.task == "video":  # our own samplers start exactly at the strength, not at a step
        sampler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    clip = load(str(folder), device="cpu", dtype="fp32").generate(
        PROMPT, negative=NEGATIVE, seed=SEED, frames=FRAMES, size=(SIZE, SIZE), fps=16,
        steps=STEPS, sampler=sampler, **({"guidance": 4.0} | options),
    )
    noise = draw_noise(SEED, LatentShape(*clip.latents.shape[1:]))
    if case.references:
        still = LatentShape(noise.shape[1], case.references, *noise.shape[3:])
        noise = torch.cat([draw_noise(SEED, still, stream="references"), noise], dim=2)
    told = {
        "prompt": PROMPT, "negative_prompt": NEGATIVE, "num_inference_steps": STEPS,
        "guidance_scale": 4.0, "height": SIZE, "width": SIZE, "output_type": "latent",
        **case.theirs,
    }
    if case.task == "video":  # takes no noise
        with patch.object(pipeline_wan_video2video, "randn_tensor", lambda *_, **__: noise):
            latents = pipe(**told).frames
    else:
        latents = pipe(**told, num_frames=FRAMES, latents=noise).frames
    latents = latents[:, :, case.references :]
    theirs = decode(pipe, latents)
    ours = torch.from_numpy(clip.frames).permute(3, 0, 1, 2)[None] / 127.5 - 1
    rounded = ((theirs + 1) * 127.5).round() / 127.5 - 1
    return float((clip.latents - latents).abs().max()), float(psnr(ours, rounded))


def decode(pipe: DiffusionPipeline, latents: torch.Tensor) -> torch.Tensor:
    """Video [1, 3, T, H, W] in [-1, 1] by diffusers' VAE."""
    config = pipe.vae.config
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (config.latents_mean,
                                                                 config.latents_std))
    with torch.no_grad():
        return pipe.vae.decode(latents * std + mean).sample.clamp(-1, 1)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_same_weights_make_the_same_clip(
    case: Case, sampler: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    difference, quality = compare(case, sampler, tmp_path_factory.getbasetemp() / case.variant)
    assert difference < 1e-3
    assert quality >= 60


def main() -> None:
    """Print the table of `docs/reference/models.md`."""
    print("| variant | task | sampler | largest difference of latents | frames, dB |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            for sampler in SAMPLERS:
                difference, quality = compare(case, sampler, Path(folder) / case.variant)
                shown = "equal" if quality == float("inf") else f"{quality:.1f}"
                print(f"| {case.variant} | {case.task} | {sampler} | {difference:.1e} | {shown} |")


if __name__ == "__main__":
    main()
