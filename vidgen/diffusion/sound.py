"""The state of a clip's sound: one more run of tokens with its own noise, known values and times.

Axes: B batch, C latent channels, N sound latents.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from vidgen.core.errors import InputError


@dataclass(frozen=True)
class PartlyKnown:
    """Latents between noise and the result, and their known values.

    Attributes:
        latents: [B, C, N], or [B, C, F, h, w] of a picture: the starting noise, or the latest step.
        clean: the known values, of the same shape; anything where not known.
        denoise_mask: the same of one channel, bool, True where latents are generated.
    """

    latents: Tensor
    clean: Tensor
    denoise_mask: Tensor

    @cached_property
    def any_known(self) -> bool:
        """Whether any latent in place is known."""
        return not bool(self.denoise_mask.all())

    def impose(self, latents: Tensor) -> Tensor:
        """Write the known values into latents."""
        return torch.where(self.denoise_mask, latents, self.clean.to(latents))

    def begun_by(self, latents: Tensor) -> Self:
        """Return the state with the first latents known, [B or 1, C, n] or [B or 1, C, n, h, w]."""
        count, clean, mask = latents.shape[2], self.clean.clone(), self.denoise_mask.clone()
        clean[:, :, :count] = latents.to(clean)
        mask[:, :, :count] = False
        return replace(self, clean=clean, denoise_mask=mask)


@dataclass(frozen=True)
class SoundState(PartlyKnown):
    """Sound latents between noise and the result, and their known values.

    Attributes:
        start_s: start of the first latent, in seconds after the picture's first latent frame.
        sees_picture: whether sound tokens attend to the picture's.
        takes: sounds of one picture, neighbours in the batch; the picture's rows are equal.
    """

    start_s: float = 0.0
    sees_picture: bool = True
    takes: int = 1

    def levels(self, sigma: Tensor) -> Tensor:
        """Return the noise level of each latent: sigma [B], or [B, N] with 0 where it is known."""
        if not self.any_known:
            return sigma
        return sigma[:, None] * self.denoise_mask[:, 0].to(sigma.dtype)


def new_sound(noise: Tensor, start_s: float = 0.0, takes: int = 1) -> SoundState:
    """Return sound with nothing known, from noise [B, C, N]."""
    mask = torch.ones_like(noise[:, :1], dtype=torch.bool)
    return SoundState(noise, torch.zeros_like(noise), mask, start_s, takes=takes)


def sound_begins(sound: SoundState, latents: Tensor) -> SoundState:
    """Let the sound begin with known latents [B or 1, C, n].

    Raises:
        InputError: more latents than the sound has.
    """
    count, total = latents.shape[2], sound.latents.shape[2]
    if count > total:
        raise InputError(f"{count} sound latents are known of a clip that has {total}; "
                         "cut them to its length")
    return sound.begun_by(latents)


def sound_span(
    first: int, count: int, stride_t: int, fps: Fraction | float, tokens_per_s: float
) -> tuple[int, int, float]:
    """Return the sound latents during a stretch of a clip: (first, end, `SoundState.start_s`).

    Frame j of a clip is shown from j / fps on, and its latent frame f ends with frame
    stride_t * f, at which time attention places it. The stretch are `count` latent frames from
    `first` on.
    """
    rate, fps = Fraction(tokens_per_s), Fraction(fps)
    shown = 0 if first == 0 else stride_t * (first - 1) + 1
    ends = stride_t * (first + count - 1) + 1
    begin, end = math.floor(shown / fps * rate), math.ceil(ends / fps * rate)
    return begin, end, float(begin / rate - first * stride_t / fps)
