"""Latents of a clip's frames at another frame rate: what goes on at one rate from another.

Axes: B batch, C latent channels, F latent frames, h w latent rows and columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vidgen.core.shapes import Tiles
    from vidgen.pipeline.video import Engine


def at_rate(
    engine: Engine, latents: Tensor, had: int, wanted: int, tiles: Tiles | None = None,
    passes: int = 1,
) -> Tensor:
    """Latents of the frames that latents [B, C, F, h, w] end with, at another oversampling.

    They are decoded and encoded: no network foretells one from the other, and in the clip itself
    stand those that were made. The first of them is a single frame; frames that don't fill a
    latent frame before it are left out.

    Args:
        engine: the model.
        latents: the clip's.
        had: their oversampling.
        wanted: that of what is returned.
        tiles: that the VAE takes a picture in.
        passes: of the encoder.
    """
    t = engine.vae_config.strides.t
    decoded = engine.decode_video(latents, tiles=tiles, oversampling=had)
    shown = torch.cat([part.float().clamp(-1, 1).cpu() for part in decoded], dim=2)
    whole = 1 + (shown.shape[2] - 1) // t * t
    return engine.encode_video(shown[:, :, -whole:], tiles, passes, wanted).cpu()
