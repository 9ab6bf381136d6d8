"""How much each channel of a VAE's latents has to do with what is seen."""

from __future__ import annotations

import torch
from torch import Tensor

from vidgen.models.vae import CausalVAE

STEP = 0.3  # of a channel's deviation
LEAST = 0.05  # of the mean, for channels that nothing is made of: they are denoised along


@torch.no_grad()
def channel_weights(vae: CausalVAE, latents: Tensor) -> Tensor:
    """What an error in each channel comes to in pixels.

    Normalised latents vary alike in all channels, but of some the decoder makes nothing (those
    that its KL loss drowned in noise), and of a few most of the picture. A small error is added
    to one channel at a time and decoded; its square counts as in the pixels' squared error.

    Args:
        vae: whose latents they are.
        latents: normalised, [B, C, F, h, w], of some clips.

    Returns:
        [C] float32, mean 1.
    """
    draw = torch.Generator().manual_seed(0)
    noise = STEP * torch.randn(latents.shape[:1] + latents.shape[2:], generator=draw)
    as_it_is, found = vae.decode(latents), []
    for channel in range(latents.shape[1]):
        wrong = latents.clone()
        wrong[:, channel] += noise.to(latents)
        found.append((vae.decode(wrong) - as_it_is).float().square().mean())
    weights = torch.stack(found).cpu()
    weights = (weights / weights.mean()).clamp(min=LEAST)
    return weights / weights.mean()
