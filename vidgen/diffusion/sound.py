"""Sound beside the picture: latents of its own in one state, and one tensor of both for samplers.

A clip's sound is one more run of tokens with its own noise, known values and times: text to both,
sound for a known picture and a picture for known sound differ in nothing but what is known.
Samplers work element by element, so they are given both packed into one tensor and see no
difference.

Axes: B batch, C latent channels, F latent frames, h w latent rows and columns, N sound latents,
n numbers of a clip's picture and sound together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

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
    """

    latents: Tensor
    clean: Tensor
    denoise_mask: Tensor
    start_s: float = 0.0

    def impose(self, latents: Tensor) -> Tensor:
        """Write the known values into latents, exactly."""
        return torch.where(self.denoise_mask, latents, self.clean.to(latents))

    def levels(self, sigma: Tensor) -> Tensor:
        """The noise level of each latent: sigma [B], or [B, N] with 0 where it is known."""
        if bool(self.denoise_mask.all()):
            return sigma
        return sigma[:, None] * self.denoise_mask[:, 0].to(sigma.dtype)


def new_sound(noise: Tensor, start_s: float = 0.0) -> SoundState:
    """Sound of which nothing is known, from noise [B, C, N]."""
    mask = torch.ones_like(noise[:, :1], dtype=torch.bool)
    return SoundState(noise, torch.zeros_like(noise), mask, start_s)


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
    """How picture [B, C, F, h, w] and sound [B, C, N] lie in one tensor [B, n].

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
