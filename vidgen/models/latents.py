"""What the VAEs share: latents normalised by statistics that their config carries."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class LatentConfig(Protocol):
    """The fields of a VAE's config that describe its latents."""

    @property
    def latent_channels(self) -> int:
        """C."""

    @property
    def latents_mean(self) -> tuple[float, ...] | None:
        """[C], what normalised latents have subtracted; None: zeros."""

    @property
    def latents_std(self) -> tuple[float, ...] | None:
        """[C], what normalised latents are divided by; None: ones."""


class NormalizedLatents:
    """Mixin of a module with such a `config`; latents are [B, C, ...]."""

    config: LatentConfig

    def normalize(self, raw: Tensor) -> Tensor:
        """(raw - latents_mean) / latents_std, [B, C, ...]."""
        mean, std = self._statistics(raw)
        return (raw - mean) / std

    def denormalize(self, latents: Tensor) -> Tensor:
        """The inverse of `normalize`."""
        mean, std = self._statistics(latents)
        return latents * std + mean

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        C = self.config.latent_channels
        shape = (1, C, *(1,) * (like.dim() - 2))
        mean = like.new_tensor(self.config.latents_mean or [0.0] * C).view(shape)
        std = like.new_tensor(self.config.latents_std or [1.0] * C).view(shape)
        return mean, std
