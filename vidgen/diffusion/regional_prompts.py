"""Regional prompts: denoise each subject of a prompt with a prompt of its own.

With a prompt of two subjects a model often draws the first one twice: layout is determined early,
and each place may become either subject (catastrophic neglect: Chefer et al. 2023,
"Attend-and-Excite"). At each step a verifier finds the subjects in the current estimate of the
clip, and around each one the model follows a prompt of that subject alone: "a mushroom above a
flamingo" becomes "a flamingo above a flamingo" where the flamingo appears. These are regional
prompts (Bar-Tal et al. 2023, "MultiDiffusion", section 4.2) with detected regions.

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
"""Weights of neighbouring frames in a middle; a wider window lags fast things."""


def with_regions(
    denoise_all: Denoise, denoise_each: Sequence[Denoise], where: Callable[[Tensor], Tensor],
    state: LatentState, labels: Tensor, strength: float, legible: float,
) -> Denoise:
    """Return a model that denoises each named subject with a prompt of its own.

    Args:
        denoise_each: n models, each with a prompt of one subject.
        where: `Verifier.where`.
        labels: [B, n], the verifier's labels of the subjects, or `NO_LABEL`.
        strength: 0 is `denoise_all`; 1 is each other model's velocity in its subject's region.
        legible: noise level below which the verifier can find subjects.
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
    """Return each subject's share of each latent, [n, F, h, w], from a clip's `Verifier.where`."""
    whose = labels != NO_LABEL
    shares = seen.new_zeros(len(labels), *seen.shape[1:])
    if int(whose.sum()) > 1:
        shares[whose] = regions(1 - seen[-1], seen[labels[whose]])
    return shares


def regions(something: Tensor, named: Tensor) -> Tensor:
    """Divide latents among subjects; return the share of each one, [n, F, h, w].

    `something` [F, h, w] is the probability that a latent shows any subject, `named` [n, F, h, w]
    that it shows each of n. Subjects are clustered by position and appearance (expectation
    maximisation, centres smoothed over time). Each cluster begins with the latents most like its
    subject, the same number for all.
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
    """Return shares [n, F, P] by appearance, scaled so that all subjects get the same total."""
    n, least = len(evidence), torch.finfo(seen.dtype).tiny
    clear = evidence / evidence.std(dim=(0, 2), keepdim=True).clamp(min=least) * 4
    owed = torch.zeros_like(clear[:, :, :1])
    for _ in range(PASSES):
        shares = (clear + owed).softmax(0)
        got = (shares * seen).sum(2, keepdim=True).clamp(min=least)
        owed = owed + ((got.sum(0, keepdim=True) / n) / got).log()
    return (clear + owed).softmax(0)


def _middles(weights: Tensor, places: Tensor) -> Tensor:
    """Return the centre of each subject in each frame, [n, F, 2], smoothed over time."""
    kernel = weights.new_tensor(OVER_TIME).view(1, 1, -1)
    around = len(OVER_TIME) // 2
    sums = torch.cat([weights @ places, weights.sum(2, keepdim=True)], dim=2)  # [n, F, 3]
    summed = F.conv1d(sums.transpose(1, 2).reshape(-1, 1, sums.shape[1]), kernel, padding=around)
    smooth = summed.view(len(weights), 3, -1).transpose(1, 2)
    return smooth[..., :2] / smooth[..., 2:].clamp(min=LEAST)
