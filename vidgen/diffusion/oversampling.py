"""Clips drawn at a higher frame rate than they are shown at, once it is settled how they move.

Where noise is high a clip's motion is settled, and few latent frames hold it. Where noise is low
its things are drawn, and what moves far within one latent frame is drawn badly. So below a noise
level each latent frame becomes `factor` of them, closer in time: a cascade in time (Ho et al. 2022,
"Imagen Video", section 2.2) without a network of its own.

Axes: B batch, C latent channels, F latent frames, h w latent rows and columns, n frames.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from vidgen.core.protocols import KeyTokens, OnStep, SamplerState, StepInfo
from vidgen.diffusion.condition import LatentState, are_references
from vidgen.diffusion.flow import add_noise
from vidgen.diffusion.noise import shuffled

FINER_NOISE = -1
"""A step that no sampler takes, by which `shuffled` draws the noise of finer frames."""


def finer_length(num_frames: int, factor: int) -> int:
    """Latent frames that F of them become: the first one, a single frame, stays one."""
    return 1 + (num_frames - 1) * factor


def finer_state(
    state: LatentState, denoised: Tensor, sigma: float, factor: int, stride_t: int
) -> LatentState:
    """A state's clip at `factor` times its frame rate, noised to `sigma`, under its conditions.

    Args:
        state: of which nothing in place is known but the first latent frame, or nothing.
        denoised: what its clip is so far, [B, C, F, h, w].
        sigma: noise level to go on from.
        factor: latent frames for each but the first.
        stride_t: frames in a latent frame.
    """
    F = state.latents.shape[2]
    nearest = (torch.arange(finer_length(F, factor)) + factor - 1) // factor
    noise = shuffled(state.starting_noise[:, :, nearest], FINER_NOISE)
    known = torch.ones_like(noise[:, :1], dtype=torch.bool)
    known[:, :, :1] = state.denoise_mask[:, :, :1]
    clean = torch.zeros_like(noise)
    clean[:, :, :1] = state.clean[:, :, :1]
    begun = add_noise(_between(denoised.float(), factor, stride_t), noise, sigma)
    return replace(
        state, latents=begun, noise=noise, clean=clean, denoise_mask=known,
        keys=_finer_keys(state.keys, factor, stride_t), spacing=state.spacing / factor,
    )


Run = Callable[[LatentState, Tensor, OnStep | None, SamplerState | None], Tensor]
"""Samples a state over noise levels, told steps, or from where a run had come to: clean latents."""


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
        split: from 1 to num_steps - 1.
        factor: see `finer_state`.
        stride_t: likewise.
        on_step: as samplers take it.
        resume: where an earlier run with the same arguments had come to.

    Returns:
        Clean latents [B, C, factor * (F - 1) + 1, h, w], float32.
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

    if resume is None or resume.step < split:
        ends = torch.cat([sigmas[:split], sigmas[-1:]])
        settled, resume = run(state, ends, told_from(0), resume), None
    else:  # behind step `split` no more than its shape is needed
        settled = resume.latents if resume.step == split else state.latents
        resume = None if resume.step == split else replace(resume, step=resume.step - split)
    finer = finer_state(state, settled, levels[split], factor, stride_t)
    return run(finer, sigmas[split:], told_from(split), resume)

def every(videos: Iterable[Tensor], factor: int) -> Iterator[Tensor]:
    """Of a clip's pieces [B, 3, n, H, W] the first frame, and every `factor`-th behind it."""
    if factor == 1:
        yield from videos
        return
    passed = 0
    for video in videos:
        yield video[:, :, -passed % factor :: factor]
        passed += video.shape[2]


def _between(latents: Tensor, factor: int, stride_t: int) -> Tensor:
    """Latent frames drawn evenly between those given, whose centres lie where theirs do.

    The first one stands for one frame, each other for `stride_t`, so a finer one's centre isn't
    at a whole fraction.
    """
    last = latents.shape[2] - 1
    at = torch.arange(finer_length(last + 1, factor), dtype=torch.float64) / factor
    at[1:] += (stride_t - 1) / (2 * stride_t) * (1 - 1 / factor)
    at = at.clamp(max=last)
    before = at.floor().long().clamp(max=max(last - 1, 0))
    share = (at - before).to(latents).view(-1, 1, 1)
    return torch.lerp(latents[:, :, before], latents[:, :, (before + 1).clamp(max=last)], share)


def _finer_keys(keys: KeyTokens | None, factor: int, stride_t: int) -> KeyTokens | None:
    """Stills at the moments that they stand for, in finer latent frames; references stay."""
    if keys is None:
        return None
    moved = keys.positions * factor - (factor - 1) * (stride_t - 1) / (2 * stride_t)
    return replace(keys, positions=torch.where(are_references(keys), keys.positions, moved))
