"""Regional prompts: each of several things that a prompt names is drawn by its own words.

A model under a prompt of two things often draws the first twice: it settles first where things are,
and each of them may become either (catastrophic neglect: Chefer et al. 2023, "Attend-and-Excite").
So a verifier looks at the guess of the clip at each step and gives each thing that it finds one of
the names, whose own words hold around it: "a mushroom above a flamingo" is "a flamingo above a
flamingo" where the flamingo will be, and "a flamingo and a flamingo" while looks are settled. These
are regional prompts (Bar-Tal et al. 2023, "MultiDiffusion", section 4.2) whose regions are found.

Axes: B clips, n things with prompts of their own, C latent channels, F latent frames, h w latent
rows and columns, P latents of a frame, K labels of the verifier.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vidgen.core.protocols import Denoise
from vidgen.diffusion.flow import denoised_of
from vidgen.diffusion.state import LatentState

NO_LABEL = -1
"""Stands for a label where a clip names fewer things than others."""
PASSES = 8
"""Iterations of the clustering."""
SIZE = 0.125
"""Standard deviation of a thing around its middle, in shorter sides of the picture."""
LEAST_DISTANCE = 1.25 * SIZE
"""Distance of the middles of two things below which they count as one."""
SEEN = 0.3
"""Share of something shown in a latent, or a neighbour, from which words hold there."""
TRUST = 0.5
"""Weight of the evidence for a name, against the distance from its middle."""
CLEAREST = 2.0
"""Largest evidence; more counts as this."""
LEAST = 1e-3
"""Smallest share of a name."""
OVER_TIME = (1.0, 2.0, 1.0)
"""Weights of neighbouring frames in a middle; a wider window lags behind fast things."""


def with_regions(
    denoise_all: Denoise, denoise_each: Sequence[Denoise], where: Callable[[Tensor], Tensor],
    state: LatentState, labels: Tensor, strength: float, legible: float,
) -> Denoise:
    """Return the model under a prompt, with each named thing drawn by its own words.

    `denoise_each` are n models, each under a prompt of one thing alone; `where` is
    `Verifier.where`; `labels` [B, n] are numbers, or `NO_LABEL`. A strength of 0 leaves
    `denoise_all`, 1 takes the others' velocities where their things are. Below the noise level
    `legible` a guess shows that.
    """
    def denoise(latents: Tensor, sigma: Tensor) -> Tensor:
        velocity = denoise_all(latents, sigma)
        if not float(sigma.max()) < legible:
            return velocity
        guess, _ = state.unpack(denoised_of(latents, velocity, sigma))
        seen = where(guess)
        shares = torch.stack([
            _shares(clip, own) for clip, own in zip(seen, labels, strict=True)
        ]).to(velocity)  # [B, n, F, h, w]
        if not bool(shares.any()):
            return velocity
        picture, sound = state.unpack(velocity)
        led = picture
        for number, alone in enumerate(denoise_each):
            other, _ = state.unpack(alone(latents, sigma))
            led = led + strength * shares[:, number, None] * (other - picture)
        return state.pack(led, sound)

    return denoise


def _shares(seen: Tensor, labels: Tensor) -> Tensor:
    """Return each thing's share of each latent, [n, F, h, w], of `Verifier.where`'s of a clip."""
    whose = labels != NO_LABEL
    shares = seen.new_zeros(len(labels), *seen.shape[1:])
    if int(whose.sum()) > 1:
        shares[whose] = regions(1 - seen[-1], seen[labels[whose]])
    return shares


def regions(something: Tensor, named: Tensor) -> Tensor:
    """Divide latents among things; return the share of each thing, [n, F, h, w].

    `something` [F, h, w] is how surely each latent shows anything, `named` [n, F, h, w] how surely
    each of n things. Clusters by place and looks (expectation maximisation, middles smoothed over
    time) begin with the latents that look most like each thing, as many for all: however little a
    thing looks like its name, it looks less like the others'.
    """
    _, height, width = something.shape
    places = torch.cartesian_prod(torch.arange(height), torch.arange(width))  # [P, 2]
    places = places.to(something) / min(height, width)
    seen = something.flatten(1)  # [F, P]
    around = F.avg_pool2d(something[None], 3, 1, 1).clamp(min=LEAST)  # means with neighbours
    evidence = F.avg_pool2d((named + LEAST).log() * something, 3, 1, 1) / around
    evidence = (evidence - evidence.mean(0)).flatten(2)  # [n, F, P]
    shares = _even(evidence, seen)
    trusted = TRUST * evidence.clamp(-CLEAREST, CLEAREST)
    for _ in range(PASSES):
        middles = _middles(shares * seen, places)
        far = (places - middles[:, :, None]).square().sum(3)  # [n, F, P]
        shares = (trusted - far / (2 * SIZE**2)).softmax(0)
    gaps = [(one - other).norm(dim=1) for one, other in itertools.combinations(middles, 2)]
    distinct = torch.stack(gaps).amin(0) > LEAST_DISTANCE  # [F]
    near = F.max_pool2d(something[:, None], 3, 1, 1)[:, 0] > SEEN
    return shares.view_as(named) * (near & distinct[:, None, None])


def _even(evidence: Tensor, seen: Tensor) -> Tensor:
    """Give each latent to what it looks like most, so that all get as much: shares [n, F, P]."""
    n, least = len(evidence), torch.finfo(seen.dtype).tiny
    clear = evidence / evidence.std(dim=(0, 2), keepdim=True).clamp(min=least) * 4
    owed = torch.zeros_like(clear[:, :, :1])
    for _ in range(PASSES):
        shares = (clear + owed).softmax(0)
        got = (shares * seen).sum(2, keepdim=True).clamp(min=least)
        owed = owed + ((got.sum(0, keepdim=True) / n) / got).log()
    return (clear + owed).softmax(0)


def _middles(weights: Tensor, places: Tensor) -> Tensor:
    """Return the middle of each thing in each frame, [n, F, 2], smoothed over time."""
    kernel = weights.new_tensor(OVER_TIME).view(1, 1, -1)
    around = len(OVER_TIME) // 2
    sums = torch.cat([weights @ places, weights.sum(2, keepdim=True)], dim=2)  # [n, F, 3]
    summed = F.conv1d(sums.transpose(1, 2).reshape(-1, 1, sums.shape[1]), kernel, padding=around)
    smooth = summed.view(len(weights), 3, -1).transpose(1, 2)
    return smooth[..., :2] / smooth[..., 2:].clamp(min=LEAST)
