"""An onset detector: find the times at which something hits the ground in a clip's latents.

It is far smaller than a generator and serves to choose the one of several generated sounds that
matches the video (after the onset detector in Comunità et al. 2024, "SyncFusion"). It reads
latents, so that nothing must be decoded.

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
"""Log-odds of an onset in a part of a latent frame that an untrained detector predicts."""
_GROUPS = 8
_DROPPED = 0.1
"""Dropout rate of pooled features in training."""
SMEARS = 0.0, 0.25, 0.5
"""Amounts of blur over time whose predictions are averaged, since generated clips are blurred."""


@dataclass(frozen=True)
class OnsetDetectorConfig:
    """Architecture of an `OnsetDetector`, and the agreement that it requires.

    Args:
        latent_channels: C.
        dim: width of the network over single frames.
        num_blocks: blocks of two convolutions of the network over single frames.
        num_looks: M.
        num_values: V, without the position's two.
        time_dim: D, width of the network over time.
        num_time_blocks: blocks of two convolutions of the network over time, which see
            2 * num_time_blocks latent frames in each direction.
        num_parts: P.
        enough: agreement of a sound with the video from which no other sound is generated.
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
    """Network with attention pooling of each latent frame, then convolutions over time."""

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
        """Return features [B, D, F] of latents [B, C, F, h, w] with any F, h and w."""
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

        Ignore those of a clip's first latent frame, which is a single picture without parts.
        """
        return self.odds(self.follow(latents))

    def odds(self, features: Tensor) -> Tensor:
        """Return the log-odds [B, F, P] for features [B, D, F] from `follow`."""
        logits: Tensor = self.onsets(features)
        return logits.transpose(1, 2).float()

    @torch.no_grad()
    def expected(self, latents: Tensor) -> Tensor:
        """Return the expected number of onsets [B, F, P] in each part of a latent frame."""
        seen = latents.to(self.places.weight.dtype)
        return torch.stack([self(smeared(seen, share)).sigmoid() for share in SMEARS]).mean(0)


def smeared(latents: Tensor, share: Tensor | float) -> Tensor:
    """Blur latents [B, C, F, h, w] over time: mix frames with their neighbours' mean by `share`."""
    padded = F.pad(latents, (0, 0, 0, 0, 1, 1), mode="replicate")
    return latents + share * ((padded[:, :, :-2] + padded[:, :, 2:]) / 2 - latents)


def part_times(first: int, count: int, num_parts: int, stride_t: int, fps: float) -> Tensor:
    """Return the centres [F, P], in seconds, of the parts of `count` latent frames from `first` on.

    Latent frames after the clip's first have `stride_t` video frames each, at `fps` per second.
    """
    frames = torch.arange(first - 1, first - 1 + count)[:, None]
    parts = (torch.arange(num_parts) + 0.5) / num_parts
    return ((frames + parts) * stride_t + 1) / fps
