"""Sound with the picture: latents of its own in one state, and one tensor of both for samplers.

A clip's sound is one more run of tokens with its own noise, known values and times: sound for a
known picture and a picture for known sound differ in nothing but what is known.
Samplers work element by element, so they are given both packed into one tensor and see no
difference.

Axes: B batch, C latent channels, F latent frames, h w latent rows and columns, N sound latents,
n numbers of a clip's picture and sound together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property

import torch
from torch import Tensor

from vidgen.core.errors import InputError


@dataclass(frozen=True)
class SoundState:
    """Sound latents on their way from noise, and what is known of the sound beforehand.

    Attributes:
        latents: [B, C, N], the starting noise, or where sampling has come to.
        clean: [B, C, N], the known values; anything where not known.
        denoise_mask: [B, 1, N] bool, True where sound is to be generated.
        start_s: when the first latent begins, in seconds after the picture's first latent frame.
        sees_picture: whether it is denoised in view of the picture.
        takes: sounds of one picture, neighbours in the batch; the picture's rows are alike.
    """

    latents: Tensor
    clean: Tensor
    denoise_mask: Tensor
    start_s: float = 0.0
    sees_picture: bool = True
    takes: int = 1

    @cached_property
    def any_known(self) -> bool:
        """Whether any of the sound is known."""
        return not bool(self.denoise_mask.all())

    def impose(self, latents: Tensor) -> Tensor:
        """Write the known values into latents, exactly."""
        return torch.where(self.denoise_mask, latents, self.clean.to(latents))

    def levels(self, sigma: Tensor) -> Tensor:
        """The noise level of each latent: sigma [B], or [B, N] with 0 where it is known."""
        if not self.any_known:
            return sigma
        return sigma[:, None] * self.denoise_mask[:, 0].to(sigma.dtype)


def new_sound(noise: Tensor, start_s: float = 0.0, takes: int = 1) -> SoundState:
    """Sound of which nothing is known, from noise [B, C, N]; attributes as in `SoundState`."""
    mask = torch.ones_like(noise[:, :1], dtype=torch.bool)
    return SoundState(noise, torch.zeros_like(noise), mask, start_s, takes=takes)


def sound_begins(sound: SoundState, latents: Tensor) -> SoundState:
    """The sound begins with these latents [B or 1, C, n]; with all of them it is known.

    Raises:
        InputError: more latents than the sound has.
    """
    count, total = latents.shape[2], sound.latents.shape[2]
    if count > total:
        raise InputError(f"{count} sound latents are known of a clip that has {total}; "
                         "cut them to its length")
    clean, mask = sound.clean.clone(), sound.denoise_mask.clone()
    clean[:, :, :count] = latents.to(clean)
    mask[:, :, :count] = False
    return replace(sound, clean=clean, denoise_mask=mask)


@dataclass(frozen=True)
class Packing:
    """Layout of picture [B, C, F, h, w] and sound [B, C, N] in one tensor [B, n].

    Attributes:
        picture: the picture's C, F, h, w.
        sound: the sound's C, N.
    """

    picture: tuple[int, ...]
    sound: tuple[int, ...]

    @classmethod
    def of(cls, picture: Tensor, sound: Tensor) -> Packing:
        """The packing of tensors like these."""
        return cls(tuple(picture.shape[1:]), tuple(sound.shape[1:]))

    def pack(self, picture: Tensor, sound: Tensor) -> Tensor:
        """One tensor [B, n]; what is narrower than C, as masks are, counts for all channels."""
        parts = (part.expand(-1, *shape).flatten(1)
                 for part, shape in ((picture, self.picture), (sound, self.sound)))
        return torch.cat(list(parts), dim=1)

    def unpack(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        """The picture [B, C, F, h, w] and the sound [B, C, N]."""
        size = torch.Size(self.picture).numel()
        picture = packed[:, :size].reshape(-1, *self.picture)
        return picture, packed[:, size:].reshape(-1, *self.sound)


def sound_span(
    first: int, count: int, stride_t: int, fps: Fraction | float, tokens_per_s: float
) -> tuple[int, int, float]:
    """The sound latents that go with a stretch of a clip's latent frames.

    Frame j of a clip is shown from j / fps on, and its latent frame f ends with frame
    stride_t * f, at which time attention places it.

    Args:
        first: latent frame that the stretch begins with.
        count: its latent frames.
        stride_t: frames of a latent frame, but for the clip's first.
        fps: frames a second.
        tokens_per_s: sound latents a second.

    Returns:
        (first sound latent, the one after the last, `SoundState.start_s`): all that are heard
        while the stretch is shown.
    """
    rate, fps = Fraction(tokens_per_s), Fraction(fps)
    shown = 0 if first == 0 else stride_t * (first - 1) + 1
    ends = stride_t * (first + count - 1) + 1
    begin, end = math.floor(shown / fps * rate), math.ceil(ends / fps * rate)
    return begin, end, float(begin / rate - first * stride_t / fps)
