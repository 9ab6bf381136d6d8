"""Conventions of flow matching.

A straight line connects a clean clip with noise (Lipman et al. 2023, eq. 22; Liu et al. 2023):
`noisy = (1 - sigma) * clean + sigma * noise`, so sigma = 1 is noise and sigma = 0 is the clip. The
model predicts the slope of the line, `velocity = noise - clean`.

Axes: B batch, C latent channels, F latent frames, h w latent rows and columns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

TIMESTEPS = 1000
"""Models take `timestep = TIMESTEPS * sigma`; everything else uses sigma."""


def add_noise(clean: Tensor, noise: Tensor, sigma: Tensor | float) -> Tensor:
    """Return the point at `sigma` on the line from `clean` to `noise`; exact at both ends.

    Both are [B, C, F, h, w]; `sigma` is a number, [B], or broadcasts against [B, 1, F, h, w].
    """
    sigma = _per_sample(sigma, clean)
    return (1 - sigma) * clean + sigma * noise


def velocity_of(clean: Tensor, noise: Tensor) -> Tensor:
    """Return the velocity that the model learns to predict, the slope dnoisy/dsigma."""
    return noise - clean


def denoised_of(noisy: Tensor, velocity: Tensor, sigma: Tensor | float) -> Tensor:
    """Return the clean latents that `noisy` and `velocity` at `sigma` imply."""
    return noisy - _per_sample(sigma, noisy) * velocity


def to_timestep(sigma: Tensor, *, whole: bool = False) -> Tensor:
    """Return the timestep of a noise level for a model.

    `whole` truncates it to an integer, as diffusers' UniPC does for Wan's transformer.
    """
    timestep = sigma.float() * TIMESTEPS
    return timestep.floor() if whole else timestep


def half_log_snr(sigma: float) -> float:
    """Return half the logarithm of the signal-to-noise ratio at a sigma in (0, 1)."""
    return math.log1p(-sigma) - math.log(sigma)


def velocity_loss(
    velocity: Tensor, clean: Tensor, noise: Tensor, weight: Tensor | None = None
) -> Tensor:
    """Return the mean squared error of each sample's velocity, [B] float32.

    The loss is that of Esser et al. 2024, eq. 2, with unit weight over noise levels. `weight`
    [B, 1, F, h, w], such as a `denoise_mask`, weights the elements of the mean.
    """
    return squared_error(velocity, velocity_of(clean, noise), weight)


def squared_error(made: Tensor, wanted: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return the mean squared error of each sample, [B] float32; see `velocity_loss`."""
    error = (made.float() - wanted.float()).square()
    if weight is None:
        return error.flatten(1).mean(1)
    weight = weight.to(error.dtype).expand_as(error)
    return (error * weight).flatten(1).sum(1) / weight.flatten(1).sum(1).clamp(min=1)


def _per_sample(sigma: Tensor | float, like: Tensor) -> Tensor | float:
    if isinstance(sigma, Tensor) and sigma.ndim == 1:
        return sigma.view(-1, *[1] * (like.ndim - 1)).to(torch.float32)
    return sigma
