"""Linear layers with weights in oneDNN's layout, for inference on CPUs.

With a plain layer PyTorch's CPU products either use MKL, which is slow in float32 on some CPUs, or
reorder the weight at every call. A packed one is reordered once, and its GELU is computed while the
product is still in registers.

Axes: B batch, L tokens, D width.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from vidgen.ops import native
from vidgen.ops.quantized import Quantized

_ROWS = 1024
"""Rows of tokens for which the layout is best; others work, too."""
_HIDDEN_BYTES = 16_000_000
"""Most bytes of a feed-forward's hidden values: more exceeds caches and glibc's free lists."""
_DTYPES = (torch.bfloat16, torch.float32)


class LastLinear(nn.Linear):
    """A network's last layer, which is never packed.

    oneDNN's float32 sums have twice MKL's error, and no later layer evens that out.
    """


class PackedLinear(nn.Linear):
    """A linear layer with a packed weight; see `pack`."""

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., D_in] to [..., D_out]."""
        weight = self.weight
        if not weight.is_mkldnn:  # an adapter's full delta has been added
            return F.linear(x, weight, self.bias)
        return _product(x, weight, self.bias, "none", "")

    def gelu(self, x: Tensor, approximate: str) -> Tensor:
        """Return GELU(forward(x)); `approximate` is "tanh" or "none"."""
        return _product(x, self.weight, self.bias, "gelu", approximate)


def _product(x: Tensor, packed: Tensor, bias: Tensor | None, then: str, how: str) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, then, [], how)
    return out


def pack(module: nn.Module) -> int:
    """Pack the linear layers of a module in place, one at a time, and return their number.

    Layers that are a network's last, quantised, not on a CPU, or of a dtype without packing here
    stay as they are. Packed layers have no gradients.
    """
    count = 0
    for layer in module.modules():
        if type(layer) is not nn.Linear or type(layer.weight) is not nn.Parameter:
            continue
        if layer.weight.device.type != "cpu" or not packs(layer.weight.dtype):
            continue
        packed = packed_weight(layer.weight.detach())
        layer.weight = nn.Parameter(packed, requires_grad=False)
        layer.__class__ = PackedLinear
        count += 1
    return count


def packed_weight(weight: Tensor) -> Tensor:
    """Return a weight in oneDNN's layout, for a `PackedLinear`."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
    return packed


def plain(layer: nn.Module, name: str) -> Tensor:
    """Return a layer's parameter, which may be packed or quantised, as an ordinary tensor."""
    value = layer._parameters[name]
    assert value is not None
    if name == "weight" and isinstance(layer, Quantized):
        return layer.widened()
    return value.to_dense() if value.is_mkldnn else value


def _gelu_linear(layer: nn.Linear, x: Tensor, approximate: str) -> Tensor:
    """Return GELU(layer(x)), in one step where the layer is packed."""
    if type(layer) is PackedLinear:
        return layer.gelu(x, approximate)
    hidden = layer(x)
    if approximate == "tanh" and _can_gelu(hidden):
        out: Tensor = _NativeGelu.apply(hidden.contiguous())
        return out
    return F.gelu(hidden, approximate=approximate)


def _can_gelu(x: Tensor) -> bool:
    return x.shape[-1] % native.WIDTHS == 0 and native.kernels(x) is not None


class _NativeGelu(torch.autograd.Function):
    """GELU by tanh in half the time of PyTorch's, whose exponentials are slower."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _gelu(x, None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _gelu(ctx.saved_tensors[0], grads[0].contiguous())


def _gelu(x: Tensor, grad: Tensor | None) -> Tensor:
    """Return GELU of dense x, or with `grad` its gradient."""
    out = torch.empty_like(x)
    native.call("gelu", x.dtype, x, grad, out, x.numel())
    return out


def feed_forward(up: nn.Linear, down: nn.Linear, x: Tensor, approximate: str) -> Tensor:
    """Return down(GELU(up(x))) for x [B, L, D].

    Without a gradient it is computed by stretches of tokens, whose hidden values stay in the
    caches.
    """
    rows = _HIDDEN_BYTES // (up.out_features * x.element_size() * x[..., :1, 0].numel())
    if torch.is_grad_enabled() or x.ndim != 3 or x.shape[1] <= rows or rows < 1:
        made: Tensor = down(_gelu_linear(up, x, approximate))
        return made
    out = x.new_empty(*x.shape[:-1], down.out_features)
    for start in range(0, x.shape[1], rows):
        part = slice(start, start + rows)
        out[:, part] = down(_gelu_linear(up, x[:, part], approximate))
    return out


@lru_cache(maxsize=8)
def packs(dtype: torch.dtype) -> bool:
    """Return whether oneDNN packs and unpacks weights of a dtype here and computes with them.

    PyTorch doesn't promise it; oneDNN refuses bfloat16 on CPUs without AVX512.
    """
    if dtype not in _DTYPES or not torch.backends.mkldnn.is_available():
        return False
    weight = torch.linspace(-1, 1, 96, dtype=dtype).view(6, 16)
    x, bias = torch.linspace(-1, 1, 48, dtype=dtype).view(3, 16), torch.ones(6, dtype=dtype)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 3)
        out = _product(x, packed, bias, "gelu", "tanh")
        back = packed.to_dense()
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    right = F.gelu(F.linear(x, weight, bias), approximate="tanh")
    near = 1e-5 if dtype == torch.float32 else 2e-2
    return torch.equal(back, weight) and torch.allclose(out, right, atol=near)
