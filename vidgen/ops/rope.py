"""Rotary positions over time, rows and columns (Su et al. 2021, eq. 34), with Wan's split.

Pairs are neighbours (2i, 2i + 1). The last 2 * (d // 6) of d/2 angles belong to rows and columns in
equal parts, the others to time. Positions are real numbers; tables are computed in float64.

Axes: B batch, F latent frames, h w patch rows and columns, N sound tokens, L tokens, H heads,
d head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vidgen.ops import native

_THETA = 1e4  # base of the wavelengths


def rope_table(time: Tensor, rows: int, columns: int, head_dim: int) -> Tensor:
    """Return rotations [B or 1, F * rows * columns, d/2], complex64, of tokens in (F, h, w) order.

    `time` [B or 1, F] are positions in latent frames; `head_dim` d is even.
    """
    spatial = head_dim // 6
    where = time.device
    batch, frames = time.shape
    shape = (batch, frames, rows, columns)
    by_time = _rotation(time, head_dim // 2 - 2 * spatial)[:, :, None, None]
    by_row = _rotation(torch.arange(rows, device=where), spatial)[:, None]
    by_column = _rotation(torch.arange(columns, device=where), spatial)
    parts = [part.expand(*shape, -1) for part in (by_time, by_row, by_column)]
    return torch.cat(parts, dim=-1).flatten(1, 3)


def sound_rope_table(time: Tensor, steps: Tensor, head_dim: int) -> Tensor:
    """Return rotations [1, N, d/2], complex64, of sound tokens, many of which share a latent frame.

    Angles of `time` [N], in latent frames, hardly change from one to the next; so those of rows
    rotate by `steps` [N], in tokens, to distinguish neighbours.
    """
    spatial = head_dim // 6
    coarse = _rotation(time, head_dim // 2 - 2 * spatial)
    fine = _rotation(steps, spatial)
    return torch.cat([coarse, fine, torch.ones_like(fine)], dim=-1)[None]


def _rotation(positions: Tensor, num_angles: int) -> Tensor:
    """Map positions [...] to rotations [..., num_angles], from one radian a position down."""
    exponents = torch.arange(num_angles, device=positions.device, dtype=torch.float64) / num_angles
    angles = positions.double()[..., None] * _THETA**-exponents
    return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)


def normed_heads(
    x: Tensor, weight: Tensor, table: Tensor | None, num_heads: int, eps: float
) -> Tensor:
    """Return the heads [B, H, L, d] of RMSNorm(x) * weight, rotated to their positions.

    Norm (Zhang & Sennrich 2019, eq. 4) and rotation are computed in float32. x [B, L, H * d] is
    normed over the full width, with gain `weight` [H * d]; `eps` is added to the mean square.
    `table` [B or 1, L, d/2] complex64 is `rope_table`'s; None: no rotation.
    """
    width = x.shape[-1]
    whole = width % native.WIDTHS == 0 if table is None else width // num_heads % native.WIDTHS == 0
    if not whole or width > native.MAX_WIDTH or native.kernels(x, weight) is None:
        plain: Tensor = _NormedHeads.apply(x, weight, table, num_heads, eps)
        return plain
    turns = None if table is None else torch.view_as_real(table).flatten(0, 1).contiguous()
    if native.needs_gradient(x, weight):
        turned: Tensor = _NativeHeads.apply(x.contiguous(), weight.float(), turns, num_heads, eps)
    else:
        turned = _norm_and_turn(x.contiguous(), weight.float().contiguous(), turns, num_heads, eps)
    heads: Tensor = turned.unflatten(-1, (num_heads, -1))
    return heads.transpose(1, 2)


def _norm_and_turn(
    x: Tensor, weight: Tensor, turns: Tensor | None, num_heads: int, eps: float
) -> Tensor:
    """Call the kernel on dense x; turns [rows, d/2, 2]."""
    turned, width = torch.empty_like(x), x.shape[-1]
    native.call(
        "norm_and_turn", x.dtype, x, weight, turns, 0 if turns is None else len(turns),
        width // num_heads, turned, x.numel() // width, width, eps,
    )
    return turned


class _NativeHeads(torch.autograd.Function):
    """Saves x only, and passes over memory once each way."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, turns: Tensor | None, num_heads: int, eps: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, turns)
        ctx.num_heads, ctx.eps = num_heads, eps
        return _norm_and_turn(x, weight, turns, num_heads, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, turns = ctx.saved_tensors
        grad_x, width = torch.empty_like(x), x.shape[-1]
        sums = torch.zeros(torch.get_num_threads(), width)
        native.call(
            "norm_and_turn_backward", x.dtype, x, weight, turns,
            0 if turns is None else len(turns), width // ctx.num_heads, grads[0].contiguous(),
            grad_x, sums, x.numel() // width, width, ctx.eps,
        )
        return grad_x, sums.sum(0), None, None, None


class _NormedHeads(torch.autograd.Function):
    """Saves x only and scales while rotating: a third of autograd's passes over memory."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, table: Tensor | None, num_heads: int, eps: float
    ) -> Tensor:
        weight = weight.float()
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = (length.square_() / x.shape[-1]).add_(eps).rsqrt_()
        out: Tensor = (x.float() * weight).unflatten(-1, (num_heads, -1))
        _turn(out, scale, table)
        ctx.save_for_backward(x, weight, table, scale)
        return out.transpose(1, 2).to(x.dtype, memory_format=torch.contiguous_format)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, table, scale = ctx.saved_tensors
        grad = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        grad = grad.unflatten(-1, (grads[0].shape[1], -1)).copy_(grads[0].transpose(1, 2))
        _turn(grad, scale, None if table is None else table.conj())
        grad = grad.flatten(2)  # of x * weight, with scale held fixed
        product = grad * x
        grad_weight = product.sum((0, 1))
        # scale depends on x, too: d scale / d x = -scale^3 x / D
        inner = (product @ weight)[..., None] * scale.square() / x.shape[-1]
        grad_x = grad.mul_(weight).addcmul_(x.float(), inner, value=-1)
        return grad_x.to(x.dtype), grad_weight, None, None, None


def _turn(heads: Tensor, scale: Tensor, table: Tensor | None) -> None:
    """Scale heads [B, L, H, d] float32 by [B, L, 1] and rotate their pairs, in place."""
    if table is None:
        heads.mul_(scale[..., None])
    else:
        torch.view_as_complex(heads.unflatten(-1, (-1, 2))).mul_((table * scale)[:, :, None])
