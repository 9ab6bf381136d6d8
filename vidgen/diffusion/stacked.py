"""Conditions in further channels of the latents: Wan's I2V and VACE.

Such models read known frames not in place but as a second clip, encoded whole with grey where
nothing is known, and a mask.

Axes: B batch, C latent channels, F latent frames, R references, h w latent rows and columns, T H W
frames, pixel rows and columns, t s temporal and spatial stride.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from vidgen.core.shapes import Strides
from vidgen.diffusion.state import LatentState


def known_frames(latents: Tensor, known: Tensor, strides: Strides) -> Tensor:
    """Return `LatentState.stacked` of Wan's I2V: [mask t | latents C] (Wan 2025, sec. 5.1.1).

    `latents` [1, C, F, h, w] are of the clip with grey where unknown, `known` [T] bool its frames.
    """
    flags = known.to(latents)
    flags = torch.cat([flags[:1].expand(strides.t), flags[1:]])  # the first latent is one frame's
    mask = rearrange(flags, "(F t) -> 1 t F 1 1", t=strides.t)
    mask = mask.expand(-1, -1, -1, *latents.shape[3:])
    return torch.cat([mask, latents], dim=1)


def control(
    state: LatentState, kept: Tensor, changed: Tensor, wanted: Tensor, references: Sequence[Tensor],
    strides: Strides, noise: Tensor,
) -> LatentState:
    """Write a clip and references into `LatentState.control` (VACE: Jiang et al. 2025, sec. 3.2).

    References become latent frames before the clip's, with noise of their own, and are dropped in
    the end: `LatentState.num_references`.

    Args:
        state: of the clip.
        kept: latents of the clip with grey where new content is wanted, [1, C, F, h, w].
        changed: latents of the clip with grey where it is kept, the same shape.
        wanted: [1, 1, T, H, W], 1 where new content is wanted.
        references: latents of stills, [1, C, 1, h, w] each.
        strides: of the VAE.
        noise: of the references, [1, C, R, h, w].
    """
    rows = control_rows(kept, changed, wanted, strides)
    for reference in references:  # the last one comes first, as the reference code has it
        empty = torch.zeros_like(rows[:, reference.shape[1] :, :1])
        rows = torch.cat([torch.cat([reference, empty], dim=1), rows], dim=2)
    before = (0, 0, 0, 0, len(references), 0)
    noise = noise.to(state.latents)
    return replace(
        state, control=rows, num_references=len(references),
        latents=torch.cat([noise, state.latents], dim=2),
        noise=None if state.noise is None else torch.cat([noise, state.noise], dim=2),
        clean=F.pad(state.clean, before),
        denoise_mask=F.pad(state.denoise_mask, before, value=True),
    )


def control_rows(kept: Tensor, changed: Tensor, wanted: Tensor, strides: Strides) -> Tensor:
    """Return `LatentState.control` without references, [kept C | changed C | mask s * s]."""
    side = strides.hw
    mask = rearrange(wanted[:, 0], "b t (h y) (w x) -> b (y x) t h w", y=side, x=side)
    mask = F.interpolate(mask, size=kept.shape[2:], mode="nearest-exact")
    return torch.cat([kept, changed, mask.to(kept)], dim=1)


def keep_beginning(state: LatentState, kept: Tensor, num_known: int) -> LatentState:
    """Write the first `num_known` latent frames of a clip into a state's `control`, as known.

    `kept` are as in `control`.
    """
    assert state.control is not None
    rows, first, channels = state.control.clone(), state.num_references, kept.shape[1]
    rows[:, :channels, first:] = kept.to(rows)
    rows[:, 2 * channels :, first : first + num_known] = 0
    return replace(state, control=rows)
