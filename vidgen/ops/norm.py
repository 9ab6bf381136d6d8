"""RMS norms over the channels of videos; layer norms of tokens with modulation and residual.

Axes: B batch, C channels, T frames, H rows, W columns, L tokens, D width, G runs of tokens that
share a vector, U vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vidgen.ops import native


class _ChannelNormSilu(torch.autograd.Function):
    """SiLU(RMSNorm(x)) over axis 1, saving x only; five passes over memory instead of eleven.

    On a CPU in bf16 `F.rms_norm` and the composite expression take two to four times as long.
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


class _RowNormSilu(torch.autograd.Function):
    """The same by our kernels, one pass over memory each way, for channels-last x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        gain, out, width = weight.float().contiguous(), torch.empty_like(x), x.shape[1]
        native.call("norm_and_silu", x.dtype, x, gain, out, x.numel() // width, width, 1)
        ctx.save_for_backward(x, gain)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, gain = ctx.saved_tensors
        width, out = x.shape[1], torch.empty_like(x)
        grad = grads[0].movedim(1, -1).contiguous()
        sums = torch.zeros(torch.get_num_threads(), width)
        native.call(
            "norm_and_silu_backward", x.dtype, x, gain, grad, out, sums, x.numel() // width, width,
        )
        return out, sums.sum(0).view(gain.shape)


def _inverse_rms(x: Tensor) -> Tensor:
    """Return 1 / sqrt(mean of x^2 over axis 1), float32 inside, in x's dtype; finite at x = 0."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    length: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=dtype)
    return length.clamp_min(1e-12).reciprocal().mul(x.shape[1] ** 0.5).to(x.dtype)


class ChannelRMSNorm(nn.Module):
    """RMSNorm over axis 1 (Zhang & Sennrich 2019, eq. 4): x / rms(x) * weight.

    `num_axes` is the number of axes after C, so that `weight` [C, 1, ...] broadcasts.
    """

    def __init__(self, num_channels: int, num_axes: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_channels, *(1,) * num_axes))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [B, C, ...]."""
        return x * _inverse_rms(x) * self.weight.to(x.dtype)

    def silu(self, x: Tensor) -> Tensor:
        """Normalise x [B, C, ...], then apply SiLU."""
        function = _RowNormSilu if self._has_kernel(x) else _ChannelNormSilu
        made: Tensor = function.apply(x, self.weight)
        return made

    def can_write(self, x: Tensor) -> bool:
        """Return whether `write_silu` takes x: it needs no gradient, and our kernel exists."""
        return not native.needs_gradient(x, self.weight) and self._has_kernel(x)

    def _has_kernel(self, x: Tensor) -> bool:
        """Return whether our kernels take x, which lies channels-last."""
        return (
            x.shape[1] <= native.MAX_WIDTH
            and native.kernels(x) is not None
            and x.movedim(1, -1).is_contiguous()
        )

    def write_silu(self, x: Tensor, out: Tensor) -> None:
        """Write `silu(x)` to `out`, each of whose samples lies channels-last, too."""
        weight = self.weight.float().contiguous()
        for sample, target in zip(x, out, strict=True):
            assert target.movedim(0, -1).is_contiguous()
            native.call(
                "norm_and_silu", x.dtype, sample, weight, target, sample.numel() // x.shape[1],
                x.shape[1], 1,
            )


@dataclass(frozen=True)
class TokenVectors:
    """A float32 vector for each token of [B, L, D]; many tokens share one.

    Attributes:
        rows: [B, G, D], one for each run of L / G tokens; [U, D] with `index`.
        index: [B, L] int32, each token's row, or None.
    """

    rows: Tensor
    index: Tensor | None = None

    def by_run(self) -> Tensor:
        """Return [R, 1, D] of R equal runs of B * L tokens; with an index R = B * L."""
        rows = self.rows if self.index is None else F.embedding(self.index, self.rows)
        return rows.flatten(0, 1)[:, None]

    def table(self, length: int) -> tuple[Tensor, Tensor | None]:
        """Return rows [R, D], and each token's row, [B * `length`] int32, if R > 1."""
        if self.index is not None:
            return self.rows, self.index
        batch, groups = self.rows.shape[:2]
        return self.rows.flatten(0, 1), _rows_of_runs(batch, groups, length)


@lru_cache(maxsize=8)
def _rows_of_runs(batch: int, groups: int, length: int) -> Tensor | None:
    if batch * groups == 1:
        return None
    return torch.arange(batch * groups, dtype=torch.int32).repeat_interleave(length // groups)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Return LayerNorm over the last axis (Ba et al. 2016, eq. 4), float32 inside and out."""
    return F.layer_norm(x.float(), x.shape[-1:], weight.float(), bias.float(), eps)


def modulated_norm(
    x: Tensor, shift: TokenVectors, scale: TokenVectors, eps: float, dtype: torch.dtype
) -> Tensor:
    """Return LayerNorm(x) * (1 + scale) + shift of tokens [B, L, D] (Peebles & Xie 2023, fig. 3).

    It is computed in float32 and returned in `dtype`; `eps` is added to the variance.
    """
    if (fused := _fused(x, None, None, scale, shift, 1.0, eps, dtype)) is not None:
        return fused[1]
    shifts, scales = shift.by_run(), scale.by_run()
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=eps).reshape(len(shifts), -1, x.shape[-1])
    return torch.addcmul(shifts, normed, 1 + scales).view(x.shape).to(dtype)


def add_gated(x: Tensor, update: Tensor, gate: TokenVectors) -> Tensor:
    """Return x + gate * update of tokens [B, L, D], computed in float32, in x's dtype."""
    if (fused := _fused(x, update, gate, None, None, 0.0, 0.0, x.dtype)) is not None:
        return fused[0]
    gates = gate.by_run()
    runs = len(gates), -1, x.shape[-1]
    added = torch.addcmul(x.float().reshape(runs), update.float().reshape(runs), gates)
    return added.view(x.shape).to(x.dtype)


def add_gated_and_norm(
    x: Tensor, update: Tensor, gate: TokenVectors, weight: Tensor, bias: Tensor, eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return `add_gated`, and its `layer_norm` in `dtype`, in one pass over memory."""
    gain, offset = (TokenVectors(vector.float()[None, None]) for vector in (weight, bias))
    if (fused := _fused(x, update, gate, gain, offset, 0.0, eps, dtype)) is not None:
        return fused
    total = add_gated(x, update, gate)
    return total, layer_norm(total, weight, bias, eps).to(dtype)


def add_and_modulated_norm(
    x: Tensor, update: Tensor, shift: TokenVectors, scale: TokenVectors, eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return x + update in x's dtype, and its `modulated_norm`, in one pass over memory."""
    if (fused := _fused(x, update, None, scale, shift, 1.0, eps, dtype)) is not None:
        return fused
    total = x + update.to(x.dtype)
    return total, modulated_norm(total, shift, scale, eps, dtype)


def _fused(
    x: Tensor, update: Tensor | None, gate: TokenVectors | None, scale: TokenVectors | None,
    shift: TokenVectors | None, base: float, eps: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor] | None:
    """Return (x + gate * update, its norm * (base + scale) + shift) by our kernel, if it can.

    Without `scale` the second is the first, without `update` the first is x.
    """
    width, narrow = x.shape[-1], dtype if update is None else update.dtype
    if width % native.WIDTHS or width > native.MAX_WIDTH or native.kernels(x) is None:
        return None
    mixed = (x.dtype, narrow) == (torch.float32, torch.bfloat16)
    if (mixed and torch.bfloat16 not in native.known_dtypes()) or not (mixed or narrow == x.dtype):
        return None
    if scale is not None and dtype != narrow:
        return None
    index, tables = None, []
    for vectors in (gate, scale, shift):
        rows, own = (None, None) if vectors is None else vectors.table(x.shape[1])
        index = index if own is None else own
        tables.append(rows if rows is None or rows.stride(-1) == 1 else rows.contiguous())
    update = None if update is None else update.contiguous()
    if native.needs_gradient(*(part for part in (x, update, *tables) if part is not None)):
        made = _AddAndNorm.apply(x.contiguous(), update, *tables, index, (base, eps, mixed))
    else:
        made = _add_and_norm(x.contiguous(), update, tables, index, base, eps, mixed=mixed)
    total = x if made[0] is None else made[0]
    return total, total if made[1] is None else made[1]


def _add_and_norm(
    x: Tensor, update: Tensor | None, tables: Sequence[Tensor | None], index: Tensor | None,
    base: float, eps: float, stats: Tensor | None = None, *, mixed: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Call the kernel on dense x and update; `tables` are gate, scale and shift."""
    width = x.shape[-1]
    total = None if update is None else torch.empty_like(x)
    narrow = torch.bfloat16 if mixed else x.dtype
    normed = None if tables[1] is None else torch.empty_like(x, dtype=narrow)
    native.call(
        "add_and_norm", x.dtype, x, update, *_with_strides(tables), index, base, total, normed,
        stats, x.numel() // width, width, eps, mixed=mixed,
    )
    return total, normed


def _with_strides(tables: Sequence[Tensor | None]) -> list[object]:
    """Return each table and the stride of its rows, 0 for a single row."""
    return [
        part for rows in tables
        for part in (rows, 0 if rows is None or len(rows) == 1 else rows.stride(0))
    ]


class _AddAndNorm(torch.autograd.Function):
    """Saves the sum and two numbers a row, and passes over memory once each way."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, update: Tensor | None, gate: Tensor | None, scale: Tensor | None,
        shift: Tensor | None, index: Tensor | None, options: tuple[float, float, bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        base, eps, mixed = options
        stats = None if scale is None else torch.empty(x.numel() // x.shape[-1], 2)
        total, normed = _add_and_norm(
            x, update, (gate, scale, shift), index, base, eps, stats, mixed=mixed
        )
        ctx.save_for_backward(x if total is None else total, update, gate, scale, index, stats)
        ctx.base, ctx.mixed = base, mixed
        ctx.set_materialize_grads(False)
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        total, update, gate, scale, index, stats = ctx.saved_tensors
        width, threads = total.shape[-1], torch.get_num_threads()
        grad_sum, grad_out = (None if grad is None else grad.contiguous() for grad in grads)
        grad_x = torch.empty_like(total)
        grad_update = None if update is None else torch.empty_like(update)
        sums = [None if rows is None else torch.zeros(threads, *rows.shape)
                for rows in (gate, scale, scale)]
        native.call(
            "add_and_norm_backward", total.dtype, total, update,
            *_with_strides((gate, scale)), index, ctx.base, stats, grad_sum, grad_out, grad_x,
            grad_update,
            *(number for part in sums for number in _sum_strides(part)),
            total.numel() // width, width, mixed=ctx.mixed,
        )
        gates, scales, shifts = (None if part is None else part.sum(0) for part in sums)
        return grad_x, grad_update, gates, scales, shifts, None, None


def _sum_strides(sums: Tensor | None) -> tuple[object, int, int]:
    """Return sums [threads, rows, D] and their strides, 0 for a single row."""
    if sums is None:
        return None, 0, 0
    return sums, sums.stride(0), 0 if sums.shape[1] == 1 else sums.stride(1)
