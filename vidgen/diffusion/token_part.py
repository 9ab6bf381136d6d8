"""A process's part of the tokens that a step cache sees, where several hold them together.

Axes: B batch, L tokens of all processes, l tokens of this one with what fills it up, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vidgen.ops.parallel import Spread


class TokenPart:
    """Goes between this process's tokens [B, l, D] and all [B, L, D].

    Args:
        spread: how the runs of tokens lie; all its processes call a method at the same time.
    """

    def __init__(self, spread: Spread) -> None:
        self._spread = spread

    def own(self, whole: Tensor) -> Tensor:
        """This process's tokens of all, filled up with zeros."""
        runs = torch.split(whole, list(self._spread.lengths), dim=1)
        return torch.cat([self._spread.split(run) for run in runs], dim=1)

    def whole(self, own: Tensor) -> Tensor:
        """All tokens."""
        runs = torch.split(own, list(self._spread.shares), dim=1)
        return torch.cat([self._spread.gather(run, i) for i, run in enumerate(runs)], dim=1)

    def relative_change(self, now: Tensor, before: Tensor) -> float:
        """`cache.relative_change` over all tokens: the same number in every process."""
        now, before = self._unfilled(now).double(), self._unfilled(before).double()
        sums = torch.stack([(now - before).abs().sum(), before.abs().sum()])
        change, size = self._spread.ranks.gather(sums[None], 0).sum(0)
        return float(change / size)

    def _unfilled(self, own: Tensor) -> Tensor:
        """Without the zeros that fill it up, of which blocks make something else."""
        spread, parts = self._spread, []
        runs = torch.split(own, list(self._spread.shares), dim=1)
        for run, length, share in zip(runs, spread.lengths, spread.shares, strict=True):
            parts.append(run[:, : max(0, length - spread.ranks.rank * share)])
        return torch.cat(parts, dim=1)
