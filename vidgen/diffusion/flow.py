"""Conventions of flow matching, noise levels of samplers and of training, and starting noise.

A straight line connects a clean clip with noise (Lipman et al. 2023, eq. 22; Liu et al. 2023):
`noisy = (1 - sigma) * clean + sigma * noise`, so sigma = 1 is noise and sigma = 0 is the clip. The
model predicts the slope of the line, `velocity = noise - clean`.

Starting noise depends only on (seed, stream, latent frame) and is drawn on the CPU: a clip has the
same noise alone, in a batch and on any number of ranks, and a longer clip begins with the noise of
a shorter one.

Axes: B batch, C latent channels, F latent frames, h w latent rows and columns.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vidgen.core.errors import InputError
from vidgen.core.shapes import LatentShape

TIMESTEPS = 1000
"""Models take `timestep = TIMESTEPS * sigma`; everything else uses sigma."""
SMALLEST_UNIFORM = 2.0**-54
"""Half the step of float64 uniform draws; it replaces 0, whose normal quantile is infinite."""


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

    Less than 1 step, or a strength outside [0, 1], raises InputError.
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
