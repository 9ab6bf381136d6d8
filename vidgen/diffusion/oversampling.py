"""Clips drawn at a higher frame rate than they are shown at, once it is settled how they move.

Where noise is high a clip's motion is settled, and few latent frames hold it. Where noise is low
its things are drawn, and what moves far within one latent frame is drawn badly. So below a noise
level each latent frame becomes `factor` of them, closer in time: a cascade in time (Ho et al. 2022,
"Imagen Video", section 2.2) without a network of its own.

Axes: B batch, C latent channels, F latent frames, h w latent rows and columns, n frames.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vidgen.core.protocols import KeyTokens, OnStep, SamplerState, StepInfo
from vidgen.diffusion.flow import add_noise
from vidgen.diffusion.noise import shuffled
from vidgen.diffusion.state import FinerKnown, LatentState, are_references, finished

FINER_NOISE = -1
"""A step that no sampler takes, by which `shuffled` draws the noise of finer frames."""

Run = Callable[[LatentState, Tensor, OnStep | None, SamplerState | None], Tensor]
"""Samples a state over noise levels, from the start or a saved step on: clean latents."""


@dataclass(frozen=True)
class Pace:
    """Positions of finer latent frames relative to those of a clip, or of a stretch of it.

    Args:
        factor: of them for each.
        alone: whether the first stands for a single frame, and so is one at any rate; within a
            clip each stands for `stride_t` frames.
    """

    factor: int
    alone: bool = True

    @property
    def lead(self) -> int:
        """Finer frames before the first that ends where one of the clip's does."""
        return 0 if self.alone else self.factor - 1

    def finer(self, frames: int) -> int:
        """Return the number of finer frames for so many of the clip's."""
        return frames and 1 + (frames - 1) * self.factor + self.lead

    def coarser(self, frames: int) -> int:
        """Return the number of the clip's frames for so many finer ones."""
        return frames and 1 + (frames - 1 - self.lead) // self.factor

    def behind(self, start: int) -> Pace:
        """Return the pace of a stretch that begins with latent frame `start` of this one."""
        return replace(self, alone=self.alone and start == 0)

    def middle(self, stride_t: int) -> float:
        """Return how much later the middle of a finer frame's pictures lies than its position.

        In finer frames, against the middle of one of the clip's frames, of `stride_t` pictures.
        """
        return (self.factor - 1) * (stride_t - 1) / (2 * stride_t)


def finer_state(
    state: LatentState, denoised: Tensor | None, sigma: float, factor: int, stride_t: int
) -> LatentState:
    """A state's clip at `factor` times its frame rate, noised to `sigma`, under its conditions.

    Args:
        state: of which nothing in place is known but a first frame, or `known_finer`.
        denoised: what its clip is so far, [B, C, F, h, w]; None: its `video_finer`.
        sigma: noise level to go on from.
        factor: latent frames for each.
        stride_t: frames in a latent frame.
    """
    known, F = state.known_finer, state.latents.shape[2]
    pace = Pace(factor, alone=known is None or known.alone)
    nearest = (torch.arange(pace.finer(F)) - pace.lead + factor - 1) // factor
    noise = shuffled(state.starting_noise[:, :, nearest], FINER_NOISE)
    unknown, clean = torch.ones_like(noise[:, :1], dtype=torch.bool), torch.zeros_like(noise)
    if known is None:
        known = FinerKnown(state.clean[:, :, :1], state.denoise_mask[:, :, :1])
    count = known.latents.shape[2]
    unknown[:, :, :count], clean[:, :, :count] = known.denoise_mask, known.latents.to(clean)
    if denoised is None:
        assert state.video_finer is not None, "a clip that begins with noise is settled first"
        settled = state.video_finer.to(noise)
    else:
        settled = interpolated(denoised.float(), pace, stride_t)
    return replace(
        state, latents=add_noise(settled, noise, sigma), noise=noise, clean=clean,
        denoise_mask=unknown, keys=_finer_keys(state.keys, pace, stride_t),
        spacing=state.spacing / factor, lead=pace.lead, known_finer=None, video_finer=None,
    )


def finished_finer(latents: Tensor, pace: Pace, stride_t: int) -> LatentState:
    """A finished picture [B, C, n, h, w] as a transformer of the clip's own rate is shown it.

    To that one a latent frame's place is the middle of its pictures, which in finer ones lies later
    than where they count from.
    """
    lead = pace.lead - pace.middle(stride_t)
    return replace(finished(latents), spacing=1 / pace.factor, lead=lead)


def sample_finer(
    run: Run, state: LatentState, sigmas: Tensor, split: int, factor: int, stride_t: int, *,
    on_step: OnStep | None = None, resume: SamplerState | None = None,
) -> Tensor:
    """Sample a clip's first `split` steps as it is, and the others at `factor` times its rate.

    Both are whole runs of a sampler: what the first one ends with is noised to where the second
    begins. Steps count through, and the state after step `split` holds the first run's clip.

    Args:
        run: samples.
        state: of the clip as it is.
        sigmas: [num_steps + 1] of both.
        split: below num_steps; 0 where the state begins from a clip that it has at the other rate.
        factor: see `finer_state`.
        stride_t: likewise.
        on_step: as samplers take it.
        resume: where an earlier run with the same arguments had come to.

    Returns:
        Clean latents [B, C, n, h, w] of so many finer frames, float32.
    """
    num_steps, levels = len(sigmas) - 1, sigmas.tolist()

    def told_from(first: int) -> OnStep | None:
        if on_step is None:
            return None

        def tell(info: StepInfo) -> None:
            step = first + info.state.step
            on_step(replace(info, num_steps=num_steps, sigma_next=levels[step],
                            state=replace(info.state, step=step)))

        return tell

    settled = None
    if split and (resume is None or resume.step < split):
        ends = torch.cat([sigmas[:split], sigmas[-1:]])
        settled, resume = run(state, ends, told_from(0), resume), None
    elif split and resume is not None:  # after step `split` only its shape is needed
        settled = resume.latents if resume.step == split else state.latents
        resume = None if resume.step == split else replace(resume, step=resume.step - split)
    finer = finer_state(state, settled, levels[split], factor, stride_t)
    return run(finer, sigmas[split:], told_from(split), resume)


def interpolated(latents: Tensor, pace: Pace, stride_t: int) -> Tensor:
    """Finer latent frames drawn evenly between those given, whose centres lie where theirs do.

    A single frame's centre is itself, that of all others lies amid `stride_t` frames, so a finer
    one's isn't at a whole fraction.
    """
    last = latents.shape[2] - 1
    at = torch.arange(pace.finer(last + 1), dtype=torch.float64) - pace.lead
    at[pace.alone :] += pace.middle(stride_t)
    at = (at / pace.factor).clamp(min=0, max=last)
    before = at.floor().long().clamp(max=max(last - 1, 0))
    share = (at - before).to(latents).view(-1, 1, 1)
    return torch.lerp(latents[:, :, before], latents[:, :, (before + 1).clamp(max=last)], share)


def _finer_keys(keys: KeyTokens | None, pace: Pace, stride_t: int) -> KeyTokens | None:
    """Stills at the moments that they stand for, in finer latent frames; references stay."""
    if keys is None:
        return None
    moved = keys.positions * pace.factor - pace.middle(stride_t)
    return replace(keys, positions=torch.where(are_references(keys), keys.positions, moved))
