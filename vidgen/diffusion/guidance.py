"""Classifier-free guidance: a conditional and an unconditional velocity make one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vidgen.core.errors import InputError
from vidgen.core.protocols import Denoise

NEGATIVE = "negative"
BRANCHES = ("prompt", NEGATIVE)
"""What a model is asked under, the conditional one first."""


@dataclass(frozen=True)
class Guidance:
    """How strongly, where and how tamely the prompt pulls.

    Attributes:
        scale: 1 is the conditional model alone, one call a step instead of two.
        interval: (lowest, highest) sigma at which guidance applies (Kynkaanniemi et al. 2024);
            outside of it the conditional model runs alone.
        rescale: share, 0 to 1, of the result that gets the conditional velocity's contrast back.
        low_scale: the scale below `boundary`, where another expert denoises; None is `scale`
            throughout.
        boundary: sigma.
        known_scale: the scale where frames are given, which the unconditional pass isn't shown, so
            that guidance pulls towards them, too (image guidance: Brooks et al. 2023; Blattmann et
            al. 2023, "Stable Video Diffusion"). None: `scale`, and both passes see them.
        reach: latent frames from one given in place on at which `known_scale` is full; it rises
            from 1 there, since guidance would else pull its neighbours past it (Blattmann et al.
            2023, section 4.3). 0: full everywhere.
    """

    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    rescale: float = 0.0
    low_scale: float | None = None
    boundary: float = 0.0
    known_scale: float | None = None
    reach: int = 0

    def __post_init__(self) -> None:
        for scale in (self.scale, self.low_scale, self.known_scale):
            if scale is not None and not 0 <= scale < float("inf"):
                raise InputError(f"guidance must be a number of at least 0, not {scale}")
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise InputError(f"a guidance interval must lie in 0..1 and rise, not {low}..{high}")
        if not 0 <= self.rescale <= 1:
            raise InputError(f"guidance rescale must lie in 0..1, not {self.rescale}")

    def of_clip(self, *, has_given: bool) -> Guidance:
        """That of one clip; `known_scale` is left where frames are given, to be hidden."""
        if not has_given or self.known_scale is None:
            return replace(self, known_scale=None, reach=0)
        return replace(self, scale=self.known_scale)

    def scale_at(self, sigma: float) -> float:
        """The scale of a step at `sigma`; 1 needs no unconditional velocity."""
        if not self.interval[0] <= sigma <= self.interval[1]:
            return 1.0
        if self.low_scale is not None and sigma < self.boundary:
            return self.low_scale
        return self.scale

    def branches_at(self, sigma: float) -> tuple[str, ...]:
        """Those of `BRANCHES` that a step at `sigma` needs."""
        return BRANCHES[:1] if self.scale_at(sigma) == 1 else BRANCHES

    @property
    def is_off(self) -> bool:
        """Whether no step needs the unconditional velocity."""
        return self.scale == 1 and {self.low_scale, self.known_scale} <= {None, 1}


def guide(
    conditional: Tensor,
    unconditional: Tensor,
    scale: float | Tensor,
    *,
    rescale: float = 0.0,
    denoise_mask: Tensor | None = None,
) -> Tensor:
    """Extrapolate from the unconditional velocity (Ho & Salimans 2022, eq. 6).

    Args:
        conditional: [B, C, F, h, w].
        unconditional: the same shape.
        scale: 1 gives `conditional`, 0 gives `unconditional`; of all or of each latent.
        rescale: phi of Lin et al. 2023, eq. 15-16: match the standard deviation of `conditional`.
        denoise_mask: [B, 1, F, h, w] bool; only generated latents count in that deviation.
    """
    guided_velocity = unconditional + scale * (conditional - unconditional)
    if rescale == 0:
        return guided_velocity
    contrast = _deviation(conditional, denoise_mask) / _deviation(guided_velocity, denoise_mask)
    return guided_velocity * (rescale * contrast + (1 - rescale))


def guided(
    denoise_conditional: Denoise,
    denoise_unconditional: Denoise,
    guidance: Guidance,
    *,
    denoise_mask: Tensor | None = None,
    share: Tensor | None = None,
    both: Callable[[Tensor, Tensor], tuple[Tensor, ...]] | None = None,
) -> Denoise:
    """A model under guidance, callable like the models it is made of; clips may differ in level.

    With `both`, the two velocities that a step needs come from one call of it. `share` is how much
    of what a scale has above 1 each latent gets.
    """

    def denoise(latents: Tensor, sigma: Tensor) -> Tensor:
        levels = [guidance.scale_at(level) for level in sigma.tolist()]
        if set(levels) == {1.0}:
            return denoise_conditional(latents, sigma)
        scale: float | Tensor = levels[0]
        if len(set(levels)) > 1:
            scale = latents.new_tensor(levels).view(-1, *[1] * (latents.ndim - 1))
        if both is not None:
            velocity, other = both(latents, sigma)
        else:
            velocity = denoise_conditional(latents, sigma)
            other = denoise_unconditional(latents, sigma)
        scales = scale if share is None else 1 + share * (scale - 1)
        return guide(velocity, other, scales, rescale=guidance.rescale, denoise_mask=denoise_mask)

    return denoise


def _deviation(velocity: Tensor, mask: Tensor | None) -> Tensor:
    """Each sample's standard deviation, [B, 1, 1, 1, 1]."""
    axes = tuple(range(1, velocity.ndim))
    if mask is None:
        return velocity.std(dim=axes, keepdim=True)
    weight = mask.to(velocity.dtype).expand_as(velocity)
    count = weight.sum(axes, keepdim=True)
    mean = (velocity * weight).sum(axes, keepdim=True) / count
    variance = ((velocity - mean).square() * weight).sum(axes, keepdim=True) / (count - 1)
    return torch.sqrt(variance)
