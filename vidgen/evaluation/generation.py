"""Many prompts at once: the pipeline's verbs on a batch.

Axes: B clips, C latent channels, F latent frames, h w latent rows and columns, T H W frames, pixel
rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vidgen.diffusion import condition
from vidgen.diffusion.noise import draw_noise
from vidgen.pipeline.plan import Plan
from vidgen.pipeline.video import Engine


@torch.no_grad()
def generate_batch(
    engine: Engine,
    plan: Plan,
    prompts: Sequence[str],
    seeds: Sequence[int],
    first_frames: Tensor | None = None,
) -> Tensor:
    """Make a clip of each prompt; the same as one by one, but for rounding.

    Args:
        engine: the model.
        plan: size, length, steps and guidance of all; its own prompt and seed are not used.
        prompts: B of them.
        seeds: one each.
        first_frames: [B, 3, 1, H, W] in [-1, 1], with which the clips are to begin, or None.

    Returns:
        Video [B, 3, T, H, W] in [-1, 1], float32, on the CPU.
    """
    contexts = [engine.encode_texts(prompts)]
    if not plan.guidance.is_off:
        contexts.append(engine.encode_texts([plan.negative] * len(prompts)))
    noise = draw_noise(seeds, replace(plan.latents, batch=len(prompts)))
    state = condition.new_state(noise.to(engine.device))
    if first_frames is not None:
        state = condition.first_frame(state, engine.encode_video(first_frames))
    return _pixels(engine, engine.sample(plan, state, contexts))


@torch.no_grad()
def round_trip(engine: Engine, video: Tensor) -> Tensor:
    """Video [B, 3, T, H, W] encoded and decoded by the model's VAE, clamped, on the CPU."""
    return _pixels(engine, engine.encode_video(video))


def _pixels(engine: Engine, latents: Tensor) -> Tensor:
    parts = engine.decode_video(latents)
    return torch.cat([part.float().clamp(-1, 1).cpu() for part in parts], dim=2)
