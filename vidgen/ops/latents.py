"""Normalise latents with a VAE's statistics; convert latents and pixels to patches and back.

Axes: B batch, C channels, T frames, H rows, W columns, F h w the same of latents, p patch size.
"""

from __future__ import annotations

from typing import Any

from einops import rearrange
from torch import Tensor


def check_positive(config: object, *names: str) -> None:
    """Raise ValueError unless these fields of a config are 1 or more."""
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be 1 or more, not {getattr(config, name)}")


def check_statistics(config: Any) -> None:
    """Raise ValueError unless `latents_mean` and `latents_std` have a value for each channel."""
    for name in ("latents_mean", "latents_std"):
        values = getattr(config, name)
        if values is not None and len(values) != config.latent_channels:
            raise ValueError(
                f"{name} has {len(values)} values for {config.latent_channels} latent channels"
            )


class NormalizedLatents:
    """Mixin for a VAE whose `config` has `latent_channels` C, and `latents_mean` and `latents_std`.

    The last two are [C], or None for zeros and ones; latents are [B, C, ...].
    """

    config: Any

    def normalize(self, raw: Tensor) -> Tensor:
        """Return (raw - latents_mean) / latents_std, [B, C, ...]."""
        mean, std = self._statistics(raw)
        return (raw - mean) / std

    def denormalize(self, latents: Tensor) -> Tensor:
        """Undo `normalize`."""
        mean, std = self._statistics(latents)
        return latents * std + mean

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        C = self.config.latent_channels
        shape = (1, C, *(1,) * (like.dim() - 2))
        mean = like.new_tensor(self.config.latents_mean or [0.0] * C).view(shape)
        std = like.new_tensor(self.config.latents_std or [1.0] * C).view(shape)
        return mean, std


def patchify_pixels(video: Tensor, patch_size: int) -> Tensor:
    """Map [B, C, T, H, W] to [B, C * p * p, T, H / p, W / p], channels as (C, column, row).

    The result lies channels-last in memory, as convolutions want it.
    """
    p = patch_size
    if p == 1:
        return video
    patches = rearrange(video, "B C T (h p) (w q) -> B T h w (C q p)", p=p, q=p)
    return patches.permute(0, 4, 1, 2, 3)


def unpatchify_pixels(x: Tensor, patch_size: int) -> Tensor:
    """Undo `patchify_pixels`: map [B, C * p * p, T, H, W] to [B, C, T, H * p, W * p]."""
    p = patch_size
    if p == 1:
        return x
    return rearrange(x, "B (C q p) T h w -> B C T (h p) (w q)", p=p, q=p)


def patchify_latents(latents: Tensor, patch_size: int) -> Tensor:
    """Map [B, C, F, h, w] to [B, F * h / p * w / p, C * p * p], channels as (C, row, column)."""
    p = patch_size
    return rearrange(latents, "B C F (h p) (w q) -> B (F h w) (C p q)", p=p, q=p)


def unpatchify_latents(patches: Tensor, patch_size: int, rows: int, columns: int) -> Tensor:
    """Map patches [B, F * rows * columns, p * p * C] to [B, C, F, rows * p, columns * p].

    Channels of a patch lie as (row, column, C), as Wan's output projection has them: not in the
    order of `patchify_latents`.
    """
    p = patch_size
    pattern = "B (F h w) (p q C) -> B C F (h p) (w q)"
    return rearrange(patches, pattern, h=rows, w=columns, p=p, q=p)
