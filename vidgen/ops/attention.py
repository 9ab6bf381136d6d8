"""Attention with one signature and several back ends.

`auto` takes, by measurement on two cores with avx512_bf16 (`eval/speed.py`):

* `native` on a CPU that has our kernels: a quarter of SDPA's time in bfloat16, half of it in
  float32, 0.9 in float32 with AVX2 only, with SDPA's error; it has a gradient.
* `blocked` for bfloat16 on other CPUs: scores in float32, 0.45 of SDPA's time, 1.3 times its error.
* `sdpa` elsewhere, and wherever those have no gradient.

Axes: B batch, H heads, L tokens (Lq of queries, Lk of keys), d head width.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from itertools import product
from typing import Any, cast, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from vidgen.core.errors import InputError
from vidgen.core.runtime import ATTENTION_VARIABLE
from vidgen.core.values import Attention as Backend
from vidgen.ops import native

_MAX_SCORES = 1 << 24
"""Scores that `blocked` holds at once."""
_BLOCK = 512
"""Queries of a block whose scores stay in the second-level cache."""


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, backend: Backend = "auto"
) -> Tensor:
    """Return softmax(q k^T / sqrt(d) + bias) v (Vaswani et al. 2017, eq. 1), [B, H, Lq, d].

    Args:
        q: [B, H, Lq, d].
        k: [B, H, Lk, d], of q's dtype and device.
        v: [B, H, Lk, d].
        bias: added to the scores, broadcast to [B, H, Lq, Lk]; -inf hides a key, but never all of
            a row. It gets no gradient.
        backend: one that can't run here is replaced by `auto`'s choice, with one warning that says
            why; see `require_backend`.

    Raises:
        InputError: an unknown back end.
    """
    if backend == "auto" and torch.compiler.is_compiling():
        return _sdpa(q, k, v, bias)
    return _BACKENDS[used_backend(backend, q.device, q.dtype)](q, k, v, bias)


def used_backend(backend: Backend, device: torch.device, dtype: torch.dtype) -> str:
    """Return the back end that is used without compilation; warn if it isn't the requested one."""
    backend = asked_backend() if backend == "auto" else backend
    if backend != "auto":
        reason = _unusable(backend, device, dtype)
        if reason is None:
            return backend
        if backend not in _BACKENDS:
            require_backend(backend, device, dtype)
        _warn_once(backend, reason)
    if device.type == "cpu" and dtype in native.known_dtypes():
        return "native"
    return _without_kernels(device, dtype)


def asked_backend() -> Backend:
    """Return the back end that the environment names for the whole process, or `auto`."""
    return cast(Backend, os.environ.get(ATTENTION_VARIABLE) or "auto")


def _without_kernels(device: torch.device, dtype: torch.dtype) -> str:
    return "blocked" if device.type == "cpu" and dtype == torch.bfloat16 else "sdpa"


def require_backend(backend: Backend, device: torch.device, dtype: torch.dtype) -> None:
    """Raise InputError for a back end that is unknown, or can't run on this device and dtype."""
    reason = None if backend == "auto" else _unusable(backend, device, dtype)
    if reason is not None:
        raise InputError(f"attention back end {backend!r} can't be used: {reason}")


def _reference(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    with torch.autocast(q.device.type, enabled=False):
        scores = q.float() @ k.float().transpose(-1, -2) * q.shape[-1] ** -0.5
        weights = torch.softmax(scores if bias is None else scores + bias, dim=-1)
        return (weights @ v.float()).to(q.dtype)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    mask = None if bias is None else bias.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _native(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Attend by our kernel where it can: heads of 64, 128, ... and a bias by key only."""
    d = q.shape[-1]
    per_key = bias is None or (bias.ndim == 4 and bias.shape[1:3] == (1, 1))
    if native.kernels(q, k, v) is None or d % 64 or d > 512 or not per_key or not k.shape[2]:
        return _BACKENDS[_without_kernels(q.device, q.dtype)](q, k, v, bias)
    if bias is not None:
        bias = bias.float().expand(q.shape[0], 1, 1, -1).contiguous()
    if native.needs_gradient(q, k, v):
        out: Tensor = _NativeAttention.apply(q, k, v, bias)
        return out
    return _attend(q, k, v, bias, None)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, lse: Tensor | None
) -> Tensor:
    """Call the kernel; `lse` [B, H, Lq] float32, if given, gets each row's log-sum-exp."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out = _heads_aside(q)
    failed = native.call(
        "attention", q.dtype, q, k, v, bias, out, lse, *_sizes(q, k), _strides(q, k, v, out),
        q.shape[-1] ** -0.5,
    )
    if failed:
        raise MemoryError("no memory for the keys and values of attention")
    return out


def _heads_aside(x: Tensor) -> Tensor:
    """Return an empty tensor like x [B, H, L, d], a token's heads adjacent in memory."""
    B, H, L, d = x.shape
    return torch.empty(B, L, H, d, dtype=x.dtype).transpose(1, 2)


def _sizes(q: Tensor, k: Tensor) -> tuple[int, ...]:
    return q.shape[0], q.shape[1], q.shape[2], k.shape[2], q.shape[3]


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(stride for x in tensors for stride in x.stride()[:3])


class _NativeAttention(torch.autograd.Function):
    """Saves inputs, output and log-sum-exps; the backward kernel computes the weights again."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        lse = torch.empty(q.shape[:3], dtype=torch.float32)
        out = _attend(q, k, v, bias, lse)
        ctx.save_for_backward(q, k, v, bias, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, out, lse = ctx.saved_tensors
        inputs = [x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, out, grads[0])]
        made = [_heads_aside(x) for x in (q, k, v)]
        failed = native.call(
            "attention_backward", q.dtype, *inputs, *made, bias, lse, *_sizes(q, k),
            _strides(*inputs, *made), q.shape[-1] ** -0.5,
        )
        if failed:
            raise MemoryError("no memory for the gradient of attention")
        return *made, None


def _blocked(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Attend with float32 scores of a block of one head's queries at a time, by oneDNN."""
    if native.needs_gradient(q, k, v):
        return _sdpa(q, k, v, bias)
    B, H, Lq, d = q.shape
    rows = max(1, min(_BLOCK, _MAX_SCORES // max(1, k.shape[2])))
    out = torch.empty(B, Lq, H, d, dtype=q.dtype, device=q.device).transpose(1, 2)
    exact = _onednn_products() if q.dtype == torch.bfloat16 else nullcontext()
    with torch.autocast(q.device.type, enabled=False), exact:
        for b, h in product(range(B), range(H)):
            keys = k[b, h].float().t()
            for start in range(0, Lq, rows):
                part = slice(start, start + rows)
                scores = (q[b, h, part].float() @ keys).mul_(d**-0.5)
                if bias is not None:
                    scores += bias.expand(B, H, Lq, -1)[b, h, part]
                out[b, h, part] = torch.softmax(scores, dim=-1).to(v.dtype) @ v[b, h]
    return out


@contextmanager
def _onednn_products() -> Iterator[None]:
    """Use oneDNN for products of float32 matrices of bfloat16 values; MKL is slow on some CPUs.

    With AMX oneDNN rounds values that bfloat16 can't represent.
    """
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def _xformers(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    from xformers.ops import memory_efficient_attention  # type: ignore[import-not-found]

    if bias is not None:
        bias = bias.to(q.dtype).expand(*q.shape[:3], k.shape[2]).contiguous()
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out: Tensor = memory_efficient_attention(q, k, v, attn_bias=bias)
    return out.transpose(1, 2)


_BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]] = {
    "reference": _reference,
    "native": _native,
    "blocked": _blocked,
    "sdpa": _sdpa,
    "xformers": _xformers,
}


@lru_cache(maxsize=64)
def _unusable(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why a back end can't run here, by trying it; None if it can."""
    if backend not in _BACKENDS:
        return f"unknown; choose one of {', '.join(get_args(Backend))}"
    if backend == "native":
        if device.type != "cpu":
            return "it runs on CPUs only"
        if dtype in native.known_dtypes():
            return None
        return native.why_not() or f"the CPU has no instructions for {dtype}"
    if backend != "xformers":
        return None
    probe = torch.zeros(1, 1, 8, 16, device=device, dtype=dtype)
    try:
        _xformers(probe, probe, probe, probe.new_zeros(1, 1, 1, 8))
    except Exception as error:  # whatever a third-party kernel raises
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


@lru_cache(maxsize=64)
def _warn_once(backend: str, reason: str) -> None:
    warnings.warn(f"attention back end {backend!r} replaced: {reason}", stacklevel=3)
