"""RMS norms over the channel axis of videos, layer and RMS norms of tokens.

Axes: B batch, C channels, T frames, H rows, W columns, L tokens, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _ChannelNormSilu(torch.autograd.Function):
    """silu(RMSNorm(x)) over axis 1, saving x alone; five passes over memory instead of eleven.

    On a CPU in bf16 `F.rms_norm` and the composite expression take twice to four times as long.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        scale = _inverse_rms(x)
        weight = weight.to(x.dtype)
        ctx.save_for_backward(x, scale, weight)
        return F.silu((x * scale).mul_(weight), inplace=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, scale, weight = ctx.saved_tensors
        normed = x * scale
        grad = torch.ops.aten.silu_backward(grads[0], normed * weight)
        product = (grad * normed).movedim(1, -1).flatten(0, -2)
        grad_weight = product.sum(0, dtype=torch.float32).view(weight.shape)
        inner = (product @ (weight.flatten() / x.shape[1])).view(scale.shape)
        return normed.mul_(inner).sub_(grad.mul_(weight)).mul_(-scale), grad_weight


def _inverse_rms(x: Tensor) -> Tensor:
    """1 / sqrt(mean over axis 1 of x^2), float32 inside, in x's dtype; finite for x = 0."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=dtype)
    return length.clamp_min(1e-12).reciprocal().mul(x.shape[1] ** 0.5).to(x.dtype)


class ChannelRMSNorm(nn.Module):
    """RMSNorm over axis 1 (Zhang & Sennrich 2019, eq. 4): x / rms(x) * weight.

    Args:
        num_channels: C.
        num_axes: axes behind C, so that `weight` [C, 1, ...] broadcasts.
    """

    def __init__(self, num_channels: int, num_axes: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_channels, *(1,) * num_axes))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [B, C, ...]."""
        return x * _inverse_rms(x) * self.weight.to(x.dtype)

    def silu(self, x: Tensor) -> Tensor:
        """Normalise x [B, C, ...], then apply SiLU, with a backward pass of its own."""
        out: Tensor = _ChannelNormSilu.apply(x, self.weight)
        return out


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last axis (Ba et al. 2016, eq. 4), float32 inside and out."""
    return F.layer_norm(x.float(), x.shape[-1:], weight.float(), bias.float(), eps)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift, the adaptive norm of Peebles & Xie 2023, fig. 3.

    Args:
        x: tokens [B, L, D].
        shift: [B, G, 1, D] float32; each of G runs of L / G tokens has its own.
        scale: like `shift`.
        eps: added to the variance.

    Returns:
        [B, L, D] float32.
    """
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=eps)
    grouped = normed.unflatten(1, (shift.shape[1], -1))
    return torch.addcmul(shift, grouped, 1 + scale).flatten(1, 2)
