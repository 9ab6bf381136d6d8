"""Moving pixels into channels and back.

Axes: B batch, C channels, T frames, H rows, W columns, F h w the same of latents,
p patch size.
"""

from __future__ import annotations

from torch import Tensor


def patchify_pixels(video: Tensor, patch_size: int) -> Tensor:
    """[B, C, T, H, W] -> [B, C * p * p, T, H / p, W / p]; channels in the order (C, column, row).

    The result lies channels-last in memory, as convolutions want it.
    """
    p = patch_size
    if p == 1:
        return video
    B, C, T, H, W = video.shape
    x = video.reshape(B, C, T, H // p, p, W // p, p).permute(0, 2, 3, 5, 1, 6, 4)
    return x.reshape(B, T, H // p, W // p, C * p * p).permute(0, 4, 1, 2, 3)


def unpatchify_pixels(x: Tensor, patch_size: int) -> Tensor:
    """The inverse of `patchify_pixels`: [B, C * p * p, T, H, W] -> [B, C, T, H * p, W * p]."""
    p = patch_size
    if p == 1:
        return x
    B, C, T, H, W = x.shape
    x = x.reshape(B, C // (p * p), p, p, T, H, W).permute(0, 1, 4, 5, 3, 6, 2)
    return x.reshape(B, C // (p * p), T, H * p, W * p)


def patchify_latents(latents: Tensor, patch_size: int) -> Tensor:
    """[B, C, F, h, w] -> [B, F * h / p * w / p, C * p * p]; channels are (C, row, column)."""
    p = patch_size
    B, C, F, h, w = latents.shape
    x = latents.reshape(B, C, F, h // p, p, w // p, p).permute(0, 2, 3, 5, 1, 4, 6)
    return x.reshape(B, F * (h // p) * (w // p), C * p * p)


def unpatchify_latents(patches: Tensor, patch_size: int, rows: int, columns: int) -> Tensor:
    """Patches [B, F * rows * columns, p * p * C] -> latents [B, C, F, rows * p, columns * p].

    Channels of a patch lie in the order (row, column, C), as Wan's output projection has them:
    not the order that `patchify_latents` gives.
    """
    p = patch_size
    x: Tensor = patches.unflatten(1, (-1, rows, columns)).unflatten(-1, (p, p, -1))
    B, F = x.shape[:2]
    return x.permute(0, 6, 1, 2, 4, 3, 5).reshape(B, -1, F, rows * p, columns * p)
