"""Temporal upsampling: a clip's motion at the model's frame rate, its details at a higher one.

Where noise is high the motion is settled, and few latent frames hold it. Where noise is low things
are drawn, and fast ones badly within one latent frame. So below a noise level each latent frame
becomes `factor` of them, closer in time: a cascade in time (Ho et al. 2022, "Imagen Video", section
2.2) without a network of its own.

Axes: B batch, C latent channels, F latent frames, h w latent rows and columns, n upsampled latent
frames.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vidgen.core.protocols import KeyTokens, OnStep, SamplerState, StepInfo
from vidgen.diffusion.flow import add_noise, shuffled
from vidgen.diffusion.state import LatentState, UpsampledKnown, are_references, finished

UPSAMPLED_NOISE = -1
"""A step that no sampler takes; `shuffled` draws the noise of upsampled frames with it."""


@dataclass(frozen=True)
class LatentRate:
    """Rate of upsampled latent frames against those of a clip, or of a stretch of it."""

    factor: int  # upsampled latent frames for each of the clip
    alone: bool = True  # whether the first one stands for a single frame, as it begins a clip

    @property
    def lead(self) -> int:
        """Upsampled frames before the first that ends where one of the clip's does."""
        return 0 if self.alone else self.factor - 1

    def num_upsampled(self, frames: int) -> int:
        """Return the number of upsampled frames for `frames` of the clip."""
        return frames and 1 + (frames - 1) * self.factor + self.lead

    def num_shown(self, frames: int) -> int:
        """Return the number of the clip's frames for `frames` upsampled ones."""
        return frames and 1 + (frames - 1 - self.lead) // self.factor

    def after(self, start: int) -> LatentRate:
        """Return the rate of a stretch that begins with latent frame `start` of this one."""
        return replace(self, alone=self.alone and start == 0)

    def middle(self, stride_t: int) -> float:
        """Return the distance, in upsampled frames, of a position from its pictures' middle."""
        return (self.factor - 1) * (stride_t - 1) / (2 * stride_t)


def upsampled_state(
    state: LatentState, denoised: Tensor | None, sigma: float, factor: int, stride_t: int
) -> LatentState:
    """Return a state at `factor` times its frame rate, noised to `sigma`, with its conditions.

    The state has nothing known in place but a first frame, or `known_upsampled`. `denoised` is its
    current clip [B, C, F, h, w]; None: its `video_upsampled`.
    """
    known, F = state.known_upsampled, state.latents.shape[2]
    rate = LatentRate(factor, alone=known is None or known.alone)
    nearest = (torch.arange(rate.num_upsampled(F)) - rate.lead + factor - 1) // factor
    noise = shuffled(state.starting_noise[:, :, nearest], UPSAMPLED_NOISE)
    unknown, clean = torch.ones_like(noise[:, :1], dtype=torch.bool), torch.zeros_like(noise)
    if known is None:
        known = UpsampledKnown(state.clean[:, :, :1], state.denoise_mask[:, :, :1])
    count = known.latents.shape[2]
    unknown[:, :, :count], clean[:, :, :count] = known.denoise_mask, known.latents.to(clean)
    if denoised is None:
        assert state.video_upsampled is not None, "a clip that begins with noise is settled first"
        settled = state.video_upsampled.to(noise)
    else:
        settled = interpolated(denoised.float(), rate, stride_t)
    return replace(state, latents=add_noise(settled, noise, sigma), noise=noise, clean=clean,
                   denoise_mask=unknown, keys=_upsampled_keys(state.keys, rate, stride_t),
                   spacing=state.spacing / factor, lead=rate.lead, known_upsampled=None,
                   video_upsampled=None)


def finished_upsampled(latents: Tensor, rate: LatentRate, stride_t: int) -> LatentState:
    """Return a finished picture [B, C, n, h, w] as a transformer of the clip's own rate sees it.

    That one places a latent frame at the middle of its pictures, which for upsampled frames lies
    later than the position they are counted from.
    """
    lead = rate.lead - rate.middle(stride_t)
    return replace(finished(latents), spacing=1 / rate.factor, lead=lead)


def sample_upsampled(
    run: Callable[..., Tensor], state: LatentState, sigmas: Tensor, split: int, factor: int,
    stride_t: int, *, on_step: OnStep | None = None, resume: SamplerState | None = None,
) -> Tensor:
    """Sample a clip's first `split` steps at its own rate, the others at `factor` times that.

    Both are whole runs of a sampler, by `run`, over parts of `sigmas` [num_steps + 1]: the result
    of the first is noised to the level at which the second begins. Steps count through; the state
    after step `split` holds the first run's clip. `split` is 0 if the state begins from a clip at
    the higher rate. Return clean latents [B, C, n, h, w], float32.
    """
    num_steps, levels = len(sigmas) - 1, sigmas.tolist()

    def counted_from(first: int) -> OnStep | None:
        if on_step is None:
            return None

        def report(info: StepInfo) -> None:
            step = first + info.state.step
            on_step(replace(info, num_steps=num_steps, sigma_next=levels[step],
                            state=replace(info.state, step=step)))

        return report

    settled = None
    if split and (resume is None or resume.step < split):
        ends = torch.cat([sigmas[:split], sigmas[-1:]])
        settled, resume = run(state, sigmas=ends, on_step=counted_from(0), resume=resume), None
    elif split and resume is not None:  # after step `split` only its shape is needed
        settled = resume.latents if resume.step == split else state.latents
        resume = None if resume.step == split else replace(resume, step=resume.step - split)
    upsampled = upsampled_state(state, settled, levels[split], factor, stride_t)
    return run(upsampled, sigmas=sigmas[split:], on_step=counted_from(split), resume=resume)


def interpolated(latents: Tensor, rate: LatentRate, stride_t: int) -> Tensor:
    """Interpolate latents [B, C, F, h, w] linearly to upsampled ones, by their centres in time."""
    last = latents.shape[2] - 1
    at = torch.arange(rate.num_upsampled(last + 1), dtype=torch.float64) - rate.lead
    at[rate.alone :] += rate.middle(stride_t)
    at = (at / rate.factor).clamp(min=0, max=last)
    before = at.floor().long().clamp(max=max(last - 1, 0))
    share = (at - before).to(latents).view(-1, 1, 1)
    return torch.lerp(latents[:, :, before], latents[:, :, (before + 1).clamp(max=last)], share)


def _upsampled_keys(keys: KeyTokens | None, rate: LatentRate, stride_t: int) -> KeyTokens | None:
    """Move stills to their moments in upsampled latent frames; references stay."""
    if keys is None:
        return None
    moved = keys.positions * rate.factor - rate.middle(stride_t)
    return replace(keys, positions=torch.where(are_references(keys), keys.positions, moved))
