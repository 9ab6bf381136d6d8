"""An onset detector: find the moments at which something meets the ground in a clip's latents.

A far smaller network than a generator, it finds which of several generated sounds goes with the
picture (onset detectors that a Foley model's sound follows: Comunità et al. 2024, "SyncFusion"). It
reads latents, so nothing is decoded.

Axes: B clips, C latent channels, F latent frames, h w latent rows and columns, M attention maps of
a frame, V values of a map, D width, P parts of a latent frame.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidgen.ops.conv import Residual, conv_block

_RARE = -4.0
"""Log-odds of an onset in any part of a latent frame, of an untrained detector."""
_GROUPS = 8
_DROPPED = 0.1
"""Dropout of pooled features, in training."""
SMEARS = 0.0, 0.25, 0.5
"""Smears of a clip over time whose predictions are averaged: generated clips are smeared, too."""


@dataclass(frozen=True)
class OnsetDetectorConfig:
    """Sizes of an onset detector.

    Args:
        latent_channels: C.
        dim: width of the network over single frames.
        num_blocks: its blocks of two convolutions.
        num_looks: M.
        num_values: V, besides the position.
        time_dim: D, width of the network over time.
        num_time_blocks: its blocks of two convolutions, which see 2 * num_time_blocks latent frames
            each way.
        num_parts: P.
        enough: least agreement of a sound with the picture at which no other is drawn.
    """

    latent_channels: int = 16
    dim: int = 24
    num_blocks: int = 3
    num_looks: int = 8
    num_values: int = 16
    time_dim: int = 64
    num_time_blocks: int = 4
    num_parts: int = 8
    enough: float = 0.75


class _TimeBlock(nn.Module):
    """Two convolutions over frames and a shortcut; it starts as the identity."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(_GROUPS, dim)
        self.first = nn.Conv1d(dim, dim, 3, padding=1)
        self.second = nn.Conv1d(dim, dim, 3, padding=1)
        nn.init.zeros_(self.second.weight)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.second(F.silu(self.first(F.silu(self.norm(x)))))
        return x + made


class OnsetDetector(nn.Module):
    """Attention pooling of each latent frame, then convolutions over time."""

    def __init__(self, config: OnsetDetectorConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = conv_block(config.latent_channels, config.dim)
        self.body = nn.Sequential(*(Residual(config.dim) for _ in range(config.num_blocks)))
        self.places = nn.Conv2d(config.dim, config.num_looks, 1)
        self.values = nn.Conv2d(config.dim, config.num_values, 1)
        seen = config.num_looks * (config.num_values + 2)
        self.seen = nn.Conv1d(seen, config.time_dim, 1)
        self.time = nn.Sequential(*(_TimeBlock(config.time_dim)
                                    for _ in range(config.num_time_blocks)))
        self.onsets = nn.Conv1d(config.time_dim, config.num_parts, 1)
        nn.init.constant_(self.onsets.bias, _RARE)  # type: ignore[arg-type]

    def follow(self, latents: Tensor) -> Tensor:
        """Return features [B, D, F] of latents [B, C, F, h, w] of any size and length."""
        B, _, frames, high, wide = latents.shape
        x = latents.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        x = self.body(self.stem(x))
        weights = self.places(x).float().flatten(2).softmax(2)  # [N, M, h * w]
        down = torch.linspace(-1, 1, high, device=x.device).view(1, 1, -1, 1)
        across = torch.linspace(-1, 1, wide, device=x.device).view(1, 1, 1, -1)
        where = [axis.expand(len(x), 1, high, wide) for axis in (down, across)]
        values = torch.cat([self.values(x).float(), *where], dim=1).flatten(2)
        seen = torch.einsum("nmp,nvp->nmv", weights, values).flatten(1).to(x.dtype)
        seen = self.seen(seen.unflatten(0, (B, frames)).transpose(1, 2))
        features: Tensor = self.time(F.dropout(seen, _DROPPED, self.training))
        return features

    def forward(self, latents: Tensor) -> Tensor:
        """Return log-odds [B, F, P], float32, of an onset in each part of a latent frame.

        Those of a clip's first latent frame, a single picture without parts, mean nothing.
        """
        return self.odds(self.follow(latents))

    def odds(self, features: Tensor) -> Tensor:
        """Return `forward`'s result for features of `follow`."""
        logits: Tensor = self.onsets(features)
        return logits.transpose(1, 2).float()

    @torch.no_grad()
    def expected(self, latents: Tensor) -> Tensor:
        """Return the expected number of onsets in each part of a frame: [B, F, P]."""
        seen = latents.to(self.places.weight.dtype)
        return torch.stack([self(smeared(seen, share)).sigmoid() for share in SMEARS]).mean(0)


def smeared(latents: Tensor, share: Tensor | float) -> Tensor:
    """Move latent frames of [B, C, F, h, w] by a share towards the mean of their neighbours."""
    padded = F.pad(latents, (0, 0, 0, 0, 1, 1), mode="replicate")
    return latents + share * ((padded[:, :, :-2] + padded[:, :, 2:]) / 2 - latents)


def part_times(first: int, count: int, num_parts: int, stride_t: int, fps: float) -> Tensor:
    """Return the middles [F, P], in seconds, of the parts of `count` latent frames from `first` on.

    `fps` is of pictures, of which a latent frame after the clip's first holds `stride_t`.
    """
    frames = torch.arange(first - 1, first - 1 + count)[:, None]
    parts = (torch.arange(num_parts) + 0.5) / num_parts
    return ((frames + parts) * stride_t + 1) / fps
