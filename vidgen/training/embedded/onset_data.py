"""What an onset detector learns from: latents of training clips, and when something is hit there.

What a generator draws is smeared, soft and of other colours, so clips are made so, too: by that
alone what is learned on clean latents holds for drawn ones.

Axes: B clips, C latent channels, F latent frames, h w latent rows and columns, P parts of a frame.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vidgen.toybox.cues import sound_cues
from vidgen.training.embedded.toybox_data import ToyboxCache

MOVED = 2
"""Latents by which clips are moved at most, to either side."""
SMEARED, SOFTENED, TINTED = 0.5, 0.6, 0.15
"""How far at most towards the frames beside each, and the latents; and deviation of channels."""
SOME, CUT = 0.5, 0.3
"""Shares of clips that are smeared, or softened; and of batches that lose their beginning."""


def impacts_in(cache: ToyboxCache, rows: range, num_parts: int) -> Tensor:
    """When something meets the ground in clips of a cache, float 0 or 1, [N, F, P].

    A clip's first latent frame is a single picture, in which nothing happens.
    """
    config, t = cache.config, cache.strides.t
    size = config.num_frames, config.height, config.width, config.fps
    found = torch.zeros(len(rows), 1 + (config.num_frames - 1) // t, num_parts)
    for row, index in enumerate(rows):
        for cue in sound_cues(cache.scene(index), *size):
            frame, part = divmod((cue.seconds * config.fps - 1) / t, 1)  # of the first one's end
            if cue.kind == "impact" and 0 <= frame < found.shape[1] - 1:
                found[row, int(frame) + 1, int(part * num_parts)] = 1
    return found


def varied(
    latents: Tensor, impacts: Tensor, noise: float, draw: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Clips [B, C, F, h, w] as no camera took them, and their impacts [B, F, P].

    They are smeared over time, softened, tinted, moved, mirrored, cut at their beginning and
    noised, more in some frames than in others.

    Args:
        latents: float32.
        impacts: likewise.
        noise: its highest level; three in ten clips have none.
        draw: a CPU generator.
    """
    B, C, frames, high, wide = latents.shape

    def luck(*shape: int) -> Tensor:
        return torch.rand(shape, generator=draw)

    def some() -> Tensor:
        return luck(B, 1, 1, 1, 1) < SOME

    beside = F.pad(latents, (0, 0, 0, 0, 1, 1), mode="replicate")
    x = latents.lerp((beside[:, :, :-2] + beside[:, :, 2:]) / 2,
                     SMEARED * luck(B, 1, frames, 1, 1) * some())
    around = F.avg_pool3d(F.pad(x, (1, 1, 1, 1, 0, 0), mode="replicate"), (1, 3, 3), stride=1)
    x = x.lerp(around, SOFTENED * luck(B, 1, 1, 1, 1) * some())
    gain, shift = TINTED * torch.randn(2, B, C, 1, 1, 1, generator=draw)
    x = x * (1 + gain) + shift
    down, across = torch.randint(2 * MOVED + 1, (2,), generator=draw).tolist()
    x = F.pad(x, (MOVED, MOVED, MOVED, MOVED, 0, 0), mode="replicate")
    x = x[..., down : down + high, across : across + wide]
    x = x.flip(4) if luck() < 0.5 else x
    begins = int(luck() * frames / 2) if luck() < CUT else 0
    x, impacts = x[:, :, begins:], impacts[:, begins:]
    levels = noise * luck(B, 1, 1, 1, 1) * (luck(B, 1, 1, 1, 1) < 0.7)
    levels = levels * (1 - 0.6 * luck(B, 1, x.shape[2], 1, 1))
    return x.lerp(torch.randn(x.shape, generator=draw), levels), impacts
