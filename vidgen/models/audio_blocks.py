"""The pieces of the causal VAE for sound: ConvNeXt blocks, encoder and decoder.

Axes: B batch, T frames, K latents, C latent channels, D width. With a cache, input follows that of
earlier calls.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidgen.ops.conv import StreamCache

if TYPE_CHECKING:
    from vidgen.models.audio import AudioVAEConfig

_QUIET = -2.0  # log of a fresh decoder's magnitudes


class CausalConv1d(nn.Conv1d):
    """Depthwise convolution over [B, T, D] whose output frame t sees input frames up to t."""

    cache_key: str = ""

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__(dim, dim, kernel_size, groups=dim)
        self.num_history = kernel_size - 1

    def forward(self, x: Tensor, cache: StreamCache | None = None) -> Tensor:
        """[B, T, D] -> the same; with a cache, x follows the frames of earlier calls."""
        before = None if cache is None else cache.tensors.get(self.cache_key)
        if before is None:
            before = x.new_zeros(x.shape[0], self.num_history, x.shape[2])
        x = torch.cat([before, x], 1)
        if cache is not None:
            cache.tensors[self.cache_key] = x[:, x.shape[1] - self.num_history :].clone()
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class ConvNeXtBlock(nn.Module):
    """x + scaled feed-forward of a depthwise convolution (Liu et al. 2022, fig. 4)."""

    def __init__(self, dim: int, kernel_size: int, expansion: int, scale: float) -> None:
        super().__init__()
        self.conv = CausalConv1d(dim, kernel_size)
        self.norm = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, expansion * dim)
        self.contract = nn.Linear(expansion * dim, dim)
        self.scale = nn.Parameter(torch.full((dim,), scale))

    def forward(self, x: Tensor, cache: StreamCache | None = None) -> Tensor:
        """[B, T, D] -> the same."""
        y = self.norm(self.conv(x, cache))
        return x + self.scale * self.contract(F.gelu(self.expand(y)))


class _Stack(nn.ModuleList):
    """Blocks one after the other."""

    def __init__(self, dim: int, layers: int, config: AudioVAEConfig) -> None:
        super().__init__(
            ConvNeXtBlock(dim, config.kernel_size, config.expansion, 1 / max(layers, 1))
            for _ in range(layers)
        )

    def forward(self, x: Tensor, cache: StreamCache | None = None) -> Tensor:
        for block in self:
            x = block(x, cache)
        return x


class AudioEncoder(nn.Module):
    """Spectra to moments."""

    def __init__(self, config: AudioVAEConfig) -> None:
        super().__init__()
        dim, per_token = config.encoder_dim, config.frames_per_token
        self.embed = nn.Linear(3 * config.num_bins, dim)
        self.frames = _Stack(dim, config.encoder_layers[0], config)
        self.gather = nn.Linear(per_token * dim, dim)
        self.tokens = _Stack(dim, config.encoder_layers[1], config)
        self.norm = nn.LayerNorm(dim)
        self.to_moments = nn.Linear(dim, 2 * config.latent_channels)

    def forward(self, x: Tensor, per_token: int, cache: StreamCache | None = None) -> Tensor:
        """[B, T, 3 * bins] -> [B, K, 2 * C], mean and log-variance."""
        x = self.frames(self.embed(x), cache)
        x = self.gather(x.unflatten(1, (-1, per_token)).flatten(2))
        return self.to_moments(self.norm(self.tokens(x, cache)))


class AudioDecoder(nn.Module):
    """Latents to spectra."""

    def __init__(self, config: AudioVAEConfig) -> None:
        super().__init__()
        dim, per_token = config.decoder_dim, config.frames_per_token
        self.from_latents = nn.Linear(config.latent_channels, dim)
        self.tokens = _Stack(dim, config.decoder_layers[0], config)
        self.spread = nn.Linear(dim, per_token * dim)
        self.frames = _Stack(dim, config.decoder_layers[1], config)
        self.norm = nn.LayerNorm(dim)
        bins = config.num_bins
        self.head = nn.Linear(dim, 3 * bins + 2 * config.gains_per_frame)
        with torch.no_grad():
            self.head.bias.zero_()
            self.head.bias[bins : 3 * bins] = _QUIET

    def forward(self, x: Tensor, per_token: int, cache: StreamCache | None = None) -> Tensor:
        """[B, K, C] -> [B, T, 3 * bins + 2 * gains], float32.

        The advance of the phase, and the logs of tone, noise and of the gains of both.

        The head computes in float32, for what it says of phases adds up.
        """
        x = self.spread(self.tokens(self.from_latents(x), cache))
        x = self.frames(x.unflatten(2, (per_token, -1)).flatten(1, 2), cache)
        x = self.norm(x)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.head.weight.float(), self.head.bias.float())
