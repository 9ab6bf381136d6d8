"""Compile what surrounds a transformer's matrix products, where no kernels of ours are.

That makes one pass over memory of each function. Torch takes seconds to compile one; whole blocks
would take a minute for each of the many shapes that batches of training have. Needs Triton on a
GPU, a C++ compiler on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from vidgen.ops import norm, rope


@contextmanager
def fusing(*, on: bool = True) -> Iterator[None]:
    """Compile these functions, and their gradients, at their first call inside the block."""
    before = norm.by_runs, rope.plain_heads
    norm.by_runs, rope.plain_heads = (_fused_by_runs, _fused_heads) if on else _PLAIN
    try:
        yield
    finally:
        norm.by_runs, rope.plain_heads = before


_PLAIN = norm.by_runs, rope.plain_heads


def is_fusing() -> bool:
    """Return whether this is inside such a block."""
    return rope.plain_heads is _fused_heads


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


def _fused(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function of tokens [B, L, ...] or [N, D], compiled once for any number of them."""
    tensors = [value for value in args if isinstance(value, Tensor)]
    for value in tensors:
        for axis in range(min(2, value.ndim - 1)):
            torch._dynamo.maybe_mark_dynamic(value, axis)
    with torch.autocast(tensors[0].device.type, enabled=False):  # one case less to compile
        return _compiled(function)(*args)


def _fused_by_runs(function: Callable[..., Any], vectors: norm.TokenVectors, *args: Any) -> Any:
    """Call it compiled, but not where each token is a run of its own, as in few batches."""
    return _fused(function, *args) if vectors.index is None else function(*args)


def _fused_heads(
    x: Tensor, weight: Tensor, table: Tensor | None, num_heads: int, eps: float
) -> Tensor:
    turns = None if table is None else torch.view_as_real(table)
    made: Tensor = _fused(_real_heads, x, weight, turns, num_heads, eps)
    return made


def _real_heads(
    x: Tensor, weight: Tensor, turns: Tensor | None, num_heads: int, eps: float
) -> Tensor:
    """Use real numbers and plain operators, which compilers know; turns [B or 1, L, d/2, 2]."""
    wide = x.float()
    scale = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    heads = (wide * scale * weight.float()).unflatten(-1, (num_heads, -1))
    if turns is not None:
        first, second = heads.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = turns[:, :, None].unbind(-1)
        turned = first * cos - second * sin, first * sin + second * cos
        heads = torch.stack(turned, dim=-1).flatten(-2)
    out: Tensor = heads.to(x.dtype).transpose(1, 2)
    return out
