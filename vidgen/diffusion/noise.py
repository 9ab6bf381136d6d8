"""Starting noise that depends only on (seed, stream, latent frame), drawn on the CPU.

A clip therefore has the same noise alone, in a batch and on any number of ranks, and a longer clip
begins with the noise of a shorter one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from vidgen.core.shapes import LatentShape

SMALLEST_UNIFORM = 2.0**-54
"""Half the step of float64 uniform draws; it replaces 0, whose normal quantile is infinite."""


def frame_seed(seed: int, stream: str, frame: int) -> int:
    """Return the generator seed of one latent frame: the first 63 bits of a SHA-256."""
    digest = hashlib.sha256(f"vidgen noise 1|{seed}|{stream}|{frame}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def draw_noise(
    seed: int | Sequence[int], shape: LatentShape, *, stream: str = "video", first_frame: int = 0
) -> Tensor:
    """Return standard normal noise [B, C, F, h, w], float32, from latent frame `first_frame` on.

    It is the normal quantile of uniform float64 draws, rounded to float32, because `torch.randn`
    differs between processors in the last bit. `stream`, such as "video" or "audio", names
    independent noise for the same seeds, one for each clip.
    """
    seeds = [seed] if isinstance(seed, int) else list(seed)
    assert len(seeds) == shape.batch, f"{len(seeds)} seeds for a batch of {shape.batch}"
    frame_dims = (shape.channels, shape.height, shape.width)
    noise = torch.empty(shape.dims)
    generator = torch.Generator("cpu")
    for clip, clip_seed in enumerate(seeds):
        for frame in range(shape.num_frames):
            generator.manual_seed(frame_seed(clip_seed, stream, first_frame + frame))
            uniform = torch.rand(frame_dims, generator=generator, dtype=torch.float64)
            normal = torch.special.ndtri(uniform.clamp_(min=SMALLEST_UNIFORM))
            noise[clip, :, frame] = normal.float()
    return noise


def draw_sound_noise(
    seeds: Sequence[int], channels: int, begin: int, end: int, takes: Sequence[int] = (0,)
) -> Tensor:
    """Return float32 noise of sound latents `begin` to `end`, [B * n, channels, end - begin].

    The n numbers `takes` select independent noise for one clip; a clip's takes are adjacent rows.
    """
    shape = LatentShape(channels, end - begin, 1, 1, batch=len(seeds))
    streams = [f"audio {take}" if take else "audio" for take in takes]
    noise = [draw_noise(seeds, shape, stream=name, first_frame=begin) for name in streams]
    return torch.stack(noise, dim=1).flatten(0, 1)[..., 0, 0]


def shuffled(noise: Tensor, step: int) -> Tensor:
    """Return new noise for a sampling step: each latent frame's values shuffled, with random signs.

    `noise` is [B, C, F, h, w], or [B, C, K] of sound; the result depends on nothing else, and that
    of a longer clip begins with that of a shorter one.
    """
    mixed, generator = torch.empty_like(noise), torch.Generator("cpu")
    for frame in range(noise.shape[2]):
        before = noise[:, :, frame].flatten(1)
        generator.manual_seed(frame_seed(step, "shuffled", frame))
        draws = torch.rand(2, before.shape[1], generator=generator, dtype=torch.float64)
        order, signs = draws[0].argsort(), torch.where(draws[1] < 0.5, -1.0, 1.0)
        after = before[:, order.to(noise.device)] * signs.to(noise)
        mixed[:, :, frame] = after.view_as(mixed[:, :, frame])
    return mixed
