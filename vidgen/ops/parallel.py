"""Sequence parallelism over several processes: DeepSpeed-Ulysses (Jacobs et al. 2023, section 3).

Each rank holds a stretch of the tokens with all heads. For attention ranks exchange, so that each
holds all tokens of some heads, and exchange back. Tokens that don't divide are padded with zeros,
which are cut off before attention; heads likewise.

All of it is differentiable, and the gradient of every weight is the mean over ranks, as
data-parallel training takes it: between `split` and `gather` gradients are R times as large, and a
weight there gets its stretch's share of R times the whole; outside, both are equal on every rank.

Axes: B batch, H heads, h heads of one rank, L tokens, l tokens of one rank, d head width, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Move = Callable[[Tensor], Tensor]


class Ranks:
    """Processes that share one sequence: a group of torch.distributed, or None for all."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def exchange(self, x: Tensor) -> Tensor:
        """Send part i of x [R, ...] to rank i; part i of the result is from rank i."""
        out: Tensor = _Moved.apply(x, self._exchanged, self._exchanged)
        return out

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """Concatenate all ranks' tensors of this shape."""
        # every rank continues with the same whole: each one's gradient is its own stretch of it
        joined, own = partial(self._joined, dim=dim), partial(self._own, dim=dim)
        out: Tensor = _Moved.apply(x, joined, lambda grad: own(grad) * self.size)
        return out

    def split(self, x: Tensor, dim: int) -> Tensor:
        """Return this rank's stretch of x, which all ranks hold; R must divide the axis."""
        joined, own = partial(self._joined, dim=dim), partial(self._own, dim=dim)
        out: Tensor = _Moved.apply(x, own, lambda grad: joined(grad) / self.size)
        return out

    def _exchanged(self, x: Tensor) -> Tensor:
        # as bytes: whatever the dtype is, it is only moved
        sent = x.contiguous().view(self.size, -1).view(torch.uint8)
        out = torch.empty_like(sent)
        dist.all_to_all_single(out, sent, group=self.group)
        return out.view(x.dtype).view(x.shape)

    def _gathered(self, x: Tensor) -> Tensor:
        sent = x.contiguous().view(-1).view(torch.uint8)
        parts = [torch.empty_like(sent) for _ in range(self.size)]
        dist.all_gather(parts, sent, group=self.group)
        return torch.stack(parts).view(x.dtype).view(self.size, *x.shape)

    def _own(self, x: Tensor, dim: int) -> Tensor:
        length = x.shape[dim] // self.size
        return x.narrow(dim, self.rank * length, length).contiguous()

    def _joined(self, x: Tensor, dim: int) -> Tensor:
        return torch.cat(self._gathered(x).unbind(), dim=dim)


class _Moved(torch.autograd.Function):
    """Moves values between ranks by `there`, and gradients by its transpose, `back`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Move, back: Move) -> Tensor:
        ctx.back = back
        return there(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(grads[0]), None, None


class Spread:
    """Layout of sequences of tokens over ranks: each is split into equal parts, with padding.

    `lengths` are the numbers of tokens of each sequence (video, sound), in the order of attention.
    """

    def __init__(self, ranks: Ranks, lengths: Sequence[int]) -> None:
        self.ranks, self.lengths = ranks, tuple(lengths)
        self.shares = tuple(-(-length // ranks.size) for length in lengths)
        """Tokens of each run on one rank, with padding."""

    def split(self, x: Tensor) -> Tensor:
        """Return this rank's stretch [B, l, ...] of a run [B, L, ...]."""
        return self.ranks.split(_filled(x, 1, self.ranks.size), 1)

    def gather(self, x: Tensor, run: int = 0) -> Tensor:
        """Return a whole run [B, L, ...] of all ranks' stretches [B, l, ...]."""
        return self.ranks.gather(x, 1)[:, : self.lengths[run]]

    def split_runs(self, x: Tensor) -> Tensor:
        """Return this rank's stretches [B, l, ...] of all runs [B, L, ...]."""
        return torch.cat([self.split(run) for run in x.split(self.lengths, dim=1)], dim=1)

    def gather_runs(self, x: Tensor) -> Tensor:
        """Return all runs [B, L, ...] of all ranks' stretches [B, l, ...]."""
        runs = enumerate(x.split(self.shares, dim=1))
        return torch.cat([self.gather(run, i) for i, run in runs], dim=1)

    def without_padding(self, x: Tensor) -> Tensor:
        """Return this rank's stretches [B, l, ...] of all runs without padding."""
        runs = zip(x.split(self.shares, dim=1), self.lengths, self.shares, strict=True)
        left = [run[:, : max(0, n - self.ranks.rank * share)] for run, n, share in runs]
        return torch.cat(left, dim=1)

    def to_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """Exchange all heads of this rank's tokens, [B, H, l, d], for all tokens of its heads."""
        size = self.ranks.size
        parts = torch.stack([_filled(x, 1, size) for x in (q, k, v)])
        parts = parts.unflatten(2, (size, -1)).movedim(2, 0)  # [R, 3, B, h, l, d]
        parts = self.ranks.exchange(parts).movedim(0, 3)  # [3, B, h, R, l, d]
        runs = parts.split(self.shares, dim=4)
        whole = [run.flatten(3, 4)[:, :, :, :n] for run, n in zip(runs, self.lengths, strict=True)]
        return (whole[0] if len(whole) == 1 else torch.cat(whole, dim=3)).unbind()

    def to_tokens(self, x: Tensor, num_heads: int) -> Tensor:
        """Exchange all tokens of this rank's heads, [B, h, L, d], for its tokens, [B, H, l, d]."""
        size = self.ranks.size
        runs = x.split(self.lengths, dim=2)
        parts = [_filled(run, 2, size).unflatten(2, (size, -1)) for run in runs]
        whole = torch.cat(parts, dim=3).movedim(2, 0)  # [R, B, h, l, d]
        return self.ranks.exchange(whole).movedim(0, 1).flatten(1, 2)[:, :num_heads]


def ulysses_attention(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor,
    spread: Spread,
) -> Tensor:
    """Return attention [B, H, l, d] over all ranks' tokens.

    `q`, `k` and `v` [B, H, l, d] are of this rank's tokens; `attend` takes all tokens and some
    heads of each, [B, h, L, d].
    """
    return spread.to_tokens(attend(*spread.to_heads(q, k, v)), q.shape[1])


def _filled(x: Tensor, dim: int, multiple: int) -> Tensor:
    missing = -x.shape[dim] % multiple
    if not missing:
        return x
    return F.pad(x, (0, 0) * (x.ndim - 1 - dim) + (0, missing))
