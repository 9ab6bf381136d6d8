"""Blocks of small convolutional networks that look at pictures or at latents, frame by frame.

Axes: N frames, H rows, W columns.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def conv_block(dim: int, out: int, stride: int = 1) -> nn.Sequential:
    """3x3 convolution, batch norm, ReLU."""
    layers = nn.Conv2d(dim, out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()
    return nn.Sequential(*layers)


class Residual(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al. 2016, Fig. 2)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.first = conv_block(dim, dim)
        self.second = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Features like those given, [N, dim, H, W]."""
        return F.relu(x + self.norm(self.second(self.first(x))))
