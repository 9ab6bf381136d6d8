"""Conventions of flow matching, and noise levels of samplers and of training.

A straight line connects a clean clip with noise (Lipman et al. 2023, eq. 22; Liu et al. 2023):
`noisy = (1 - sigma) * clean + sigma * noise`, so sigma = 1 is noise and sigma = 0 is the clip. The
model predicts the slope of the line, `velocity = noise - clean`.

Axes: B batch, C latent channels, F latent frames, h w latent rows and columns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vidgen.core.errors import InputError

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


def shifted(sigma: Tensor, shift: float) -> Tensor:
    """Shift noise levels toward 1, as larger clips need (Esser et al. 2024, eq. 23)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def make_sigmas(
    num_steps: int, shift: float = 1.0, *, strength: float = 1.0, sigma_min: float = 0.0,
    reach_min: bool = False,
) -> Tensor:
    """Return float32 noise levels [steps + 1], evenly spaced, then shifted, strictly falling to 0.

    `sigma_min=0.001` gives the levels of diffusers' UniPC with flow sigmas, as in Wan's folders;
    `sigma_min=shift*0.001/(1+(shift-1)*0.001), reach_min=True` gives those of its flow Euler.

    Args:
        num_steps: number of steps from pure noise.
        strength: first level before the shift; below 1 it takes `steps_for_strength`.
        sigma_min: last evenly spaced level, before the shift.
        reach_min: keep `sigma_min` as a level before 0, instead of replacing it with 0.

    Raises:
        InputError: a step count, shift or strength out of range.
    """
    steps = steps_for_strength(num_steps, strength)
    if not (math.isfinite(shift) and shift > 0):
        raise InputError(f"shift must be a positive number, not {shift}")
    if steps == 0:
        return torch.zeros(1)
    if reach_min:
        levels = torch.linspace(strength, sigma_min, steps, dtype=torch.float64)
    else:
        levels = torch.linspace(strength, sigma_min, steps + 1, dtype=torch.float64)[:-1]
    return torch.cat([shifted(levels, shift), torch.zeros(1, dtype=torch.float64)]).float()


def steps_for_strength(num_steps: int, strength: float) -> int:
    """Return `num_steps * strength`, rounded; at least 1 unless `strength` is 0.

    Raises:
        InputError: less than 1 step, or a strength outside [0, 1].
    """
    if num_steps < 1:
        raise InputError(f"steps must be at least 1, not {num_steps}")
    if not 0 <= strength <= 1:
        raise InputError(f"strength must be from 0 to 1, not {strength}")
    return max(1, round(num_steps * strength)) if strength > 0 else 0


def draw_sigmas(
    batch: int, generator: torch.Generator, *, shift: float = 1.0, mean: float | None = 0.0,
    std: float = 1.0, between: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """Draw shifted noise levels [B] for training, float32 in (0, 1), in random order, on the CPU.

    The draw is stratified over the batch (Kingma et al. 2021, appendix I.1), which keeps the
    distribution and reduces the variance of the loss. The density is logit-normal with `mean` and
    `std` (Esser et al. 2024, eq. 19), or uniform if `mean` is None, truncated to the levels
    `between`.
    """
    strata = torch.randperm(batch, generator=generator).double()
    uniform = (strata + torch.rand(batch, generator=generator, dtype=torch.float64)) / batch
    low, high = (share_below(level, shift=shift, mean=mean, std=std) for level in between)
    uniform = (low + (high - low) * uniform).clamp(1e-6, 1 - 1e-6)
    if mean is not None:
        uniform = torch.sigmoid(mean + std * torch.special.ndtri(uniform))
    return shifted(uniform, shift).float()


def share_below(
    sigma: float, *, shift: float = 1.0, mean: float | None = 0.0, std: float = 1.0
) -> float:
    """Return the share of levels below `sigma` in the distribution of `draw_sigmas`."""
    if not 0 < sigma < 1:
        return float(sigma >= 1)
    level = sigma / (shift - (shift - 1) * sigma)  # the inverse of `shifted`
    if mean is None:
        return level
    logit = math.log(level / (1 - level))
    return 0.5 * (1 + math.erf((logit - mean) / (std * math.sqrt(2))))
