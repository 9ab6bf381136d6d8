"""Starting noise that depends on nothing but (seed, stream, latent frame).

So the n-th clip of a batch has the noise it would have alone, on any number of ranks, and a longer
clip starts with the shorter one's noise. It is drawn on the CPU, whatever device samples from it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from vidgen.core.shapes import LatentShape

SMALLEST_UNIFORM = 2.0**-54
"""Half the grid of a float64 uniform draw: keeps the normal quantile of a drawn 0 finite."""


def frame_seed(seed: int, stream: str, frame: int) -> int:
    """The generator seed of one latent frame: the first 63 bits of a SHA-256, big-endian."""
    digest = hashlib.sha256(f"vidgen noise 1|{seed}|{stream}|{frame}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def draw_noise(
    seed: int | Sequence[int], shape: LatentShape, *, stream: str = "video", first_frame: int = 0
) -> Tensor:
    """Standard normal noise, a generator a latent frame.

    Uniform float64 draws go through the normal quantile function and are then rounded to float32:
    `torch.randn` takes other code paths on other processors, which would show in the last bit.

    Args:
        seed: one for each clip of the batch; a single number stands for a batch of one.
        shape: of the whole batch.
        stream: "video", "audio", ...: independent noise for one seed.
        first_frame: latent frame of the clip that this noise starts with.

    Returns:
        [B, C, F, h, w] float32.
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
    """Noise of each clip's sound latents `begin` to `end`, [B * n, channels, end - begin].

    Float32. Each of several sounds for one picture has noise of its own; those of n `takes`, by
    number, follow each other.
    """
    shape = LatentShape(channels, end - begin, 1, 1, batch=len(seeds))
    streams = [f"audio {take}" if take else "audio" for take in takes]
    noise = [draw_noise(seeds, shape, stream=name, first_frame=begin) for name in streams]
    return torch.stack(noise, dim=1).flatten(0, 1)[..., 0, 0]


def shuffled(noise: Tensor, step: int) -> Tensor:
    """Noise as good as fresh: another order within each latent frame, and other signs.

    It depends on `noise` and `step` alone, so whoever has a clip's starting noise has all of it,
    and that of a longer clip begins with the shorter one's.

    Args:
        noise: [B, C, F, h, w], or of sound [B, C, K]; standard normal.
        step: of sampling; each has orders and signs of its own.
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
