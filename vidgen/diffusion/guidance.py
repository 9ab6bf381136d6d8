"""Classifier-free guidance by the prompt, by given frames and by reference images.

Axes: B batch, C latent channels, F latent frames, h w latent rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vidgen.core.errors import InputError
from vidgen.core.protocols import Denoise
from vidgen.diffusion.condition import without_references
from vidgen.diffusion.state import LatentState

PROMPT, NEGATIVE = "prompt", "negative"
BRANCHES = (PROMPT, NEGATIVE)
"""Passes of a model, the conditional one first."""
UNSHOWN = "unshown"
"""A third pass, with the prompt but without the reference images."""


@dataclass(frozen=True)
class Guidance:
    """Scales and limits of guidance.

    With `known_scale` the unconditional pass doesn't see given frames, so guidance pulls toward
    them as well (image guidance: Brooks et al. 2023; Blattmann et al. 2023, "Stable Video
    Diffusion"). A full scale pushes a given frame's neighbours past it, so it rises linearly from 1
    at the frame over `reach` latent frames (Blattmann et al. 2023, section 4.3).
    """

    scale: float = 1.0  # 1 is the conditional model, with one call a step instead of two
    interval: tuple[float, float] = (0.0, 1.0)  # sigmas with guidance (Kynkaanniemi et al. 2024)
    rescale: float = 0.0  # share, 0 to 1, rescaled to the conditional velocity's contrast
    low_scale: float | None = None  # below `boundary`, where another expert runs; None: `scale`
    boundary: float = 0.0
    known_scale: float | None = None  # for clips with given frames; None: `scale`
    # weight of the difference that reference images make to the conditional velocity (Brooks et al.
    # 2023, eq. 3), for clips without given frames
    reference_scale: float = 0.0
    reach: int = 0  # 0: `known_scale` applies fully everywhere

    def __post_init__(self) -> None:
        for scale in (self.scale, self.low_scale, self.known_scale, self.reference_scale):
            if scale is not None and not 0 <= scale < float("inf"):
                raise InputError(f"guidance must be a number of at least 0, not {scale}")
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise InputError(f"a guidance interval must rise and be in 0..1, not {low}..{high}")
        if not 0 <= self.rescale <= 1:
            raise InputError(f"guidance rescale must be from 0 to 1, not {self.rescale}")

    def of_clip(self, *, has_given: bool) -> Guidance:
        """Return the guidance of a clip with or without given frames, with one scale to use."""
        if not has_given:
            return replace(self, known_scale=None, reach=0)
        if self.known_scale is None:
            return replace(self, reference_scale=0.0, reach=0)
        return replace(self, scale=self.known_scale, reference_scale=0.0)

    def scale_at(self, sigma: float) -> float:
        """Return the scale of a step at `sigma`; at 1 the unconditional pass isn't needed."""
        if not self._applies_at(sigma):
            return 1.0
        if self.low_scale is not None and sigma < self.boundary:
            return self.low_scale
        return self.scale

    def reference_scale_at(self, sigma: float) -> float:
        """Return `reference_scale` where guidance applies, else 0."""
        return self.reference_scale if self._applies_at(sigma) else 0.0

    def branches_at(self, sigma: float) -> tuple[str, ...]:
        """Return the passes of `BRANCHES` and `UNSHOWN` that a step at `sigma` needs."""
        branches = BRANCHES[:1] if self.scale_at(sigma) == 1 else BRANCHES
        return (*branches, UNSHOWN) if self.reference_scale_at(sigma) else branches

    def _applies_at(self, sigma: float) -> bool:
        return self.interval[0] <= sigma <= self.interval[1]

    @property
    def is_off(self) -> bool:
        """True if no step needs the velocity under the negative prompt."""
        return self.scale == 1 and {self.low_scale, self.known_scale} <= {None, 1}


def guide(
    conditional: Tensor, unconditional: Tensor, scale: float | Tensor, *,
    pull: Tensor | float = 0.0, rescale: float = 0.0, denoise_mask: Tensor | None = None,
) -> Tensor:
    """Extrapolate from the unconditional velocity (Ho & Salimans 2022, eq. 6), and add `pull`.

    `rescale` is phi of Lin et al. 2023, eq. 15-16; 1 matches the standard deviation of
    `conditional`, over the latents in `denoise_mask` [B, 1, F, h, w] (None: all).
    """
    guided_velocity = unconditional + scale * (conditional - unconditional) + pull
    if rescale == 0:
        return guided_velocity
    contrast = _deviation(conditional, denoise_mask) / _deviation(guided_velocity, denoise_mask)
    return guided_velocity * (rescale * contrast + (1 - rescale))


def guided(
    denoise_conditional: Denoise, denoise_unconditional: Denoise, guidance: Guidance, *,
    denoise_mask: Tensor | None = None, share: Tensor | None = None,
    both: Callable[[Tensor, Tensor], tuple[Tensor, ...]] | None = None,
    denoise_unshown: Denoise | None = None,
) -> Denoise:
    """Return a guided model from models with the prompt and with the negative prompt.

    Args:
        share: share of the scale's excess over 1 for each latent, see `guidance_share`.
        both: returns the velocities of both passes in one call, in place of the first two models.
        denoise_unshown: model without reference images, if these have their own scale.
    """

    def denoise(latents: Tensor, sigma: Tensor) -> Tensor:
        scales = [guidance.scale_at(level) for level in sigma.tolist()]
        alone = set(scales) == {1.0}
        if alone:
            velocity = other = denoise_conditional(latents, sigma)
        elif both is not None:
            velocity, other = both(latents, sigma)
        else:
            velocity = denoise_conditional(latents, sigma)
            other = denoise_unconditional(latents, sigma)
        pulls = [guidance.reference_scale_at(level) for level in sigma.tolist()]
        pull: Tensor | float = 0.0
        if denoise_unshown is not None and any(pulls):
            pull = _of_clips(pulls, latents) * (velocity - denoise_unshown(latents, sigma))
        elif alone:
            return velocity
        scale = _of_clips(scales, latents)
        scale = scale if share is None else 1 + share * (scale - 1)
        return guide(velocity, other, scale, pull=pull, rescale=guidance.rescale,
                     denoise_mask=denoise_mask)

    return denoise


def as_negative(state: LatentState, *, hides_given: bool) -> LatentState:
    """Return the state for the negative pass; guidance pulls toward all conditions removed from it.

    Reference images are removed, given frames with `hides_given`, and for sound the picture, whose
    influence is otherwise small compared with that of the prompt.
    """
    return replace(state, keys=None if hides_given else without_references(state.keys),
                   hides_known=hides_given,
                   sound=None if state.sound is None else replace(state.sound, sees_picture=False))


def unshown(state: LatentState) -> LatentState:
    """Return the state without its reference images."""
    return replace(state, keys=without_references(state.keys))


def guidance_share(state: LatentState, reach: int) -> Tensor | None:
    """Return each latent's distance from frames given in place, in units of `reach`, at most 1.

    The result broadcasts to a sampler's layout and is 1 for sound. It is None if `reach` is 0.
    """
    if reach == 0:
        return None
    made = state.denoise_mask.flatten(3)[:, 0].any(-1)  # [B, F], whether any of a frame is
    moments = torch.arange(made.shape[1], device=made.device, dtype=torch.float32)
    given = moments.expand(made.shape).masked_fill(made, float("inf"))
    off = (moments[:, None] - given[:, None]).abs().amin(-1)
    share = (off * state.spacing / reach).clamp(max=1)[:, None, :, None, None]
    sound = None if state.sound is None else torch.ones_like(state.sound.latents[:, :1])
    return state.pack(share, sound)


def _of_clips(scales: list[float], latents: Tensor) -> Tensor | float:
    """Return scales of clips, broadcast to latents; one number where they agree."""
    if len(set(scales)) == 1:
        return scales[0]
    return latents.new_tensor(scales).view(-1, *[1] * (latents.ndim - 1))


def _deviation(velocity: Tensor, mask: Tensor | None) -> Tensor:
    """Return each sample's standard deviation, [B, 1, 1, 1, 1]."""
    axes = tuple(range(1, velocity.ndim))
    if mask is None:
        return velocity.std(dim=axes, keepdim=True)
    weight = mask.to(velocity.dtype).expand_as(velocity)
    count = weight.sum(axes, keepdim=True)
    mean = (velocity * weight).sum(axes, keepdim=True) / count
    variance = ((velocity - mean).square() * weight).sum(axes, keepdim=True) / (count - 1)
    return torch.sqrt(variance)
