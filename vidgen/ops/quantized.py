"""Layers whose weights stay quantised in memory, and the quantisation of plain weights.

A layer holds the stored numbers as `weight`, and their scales as the buffers `weight_scale` and
`weight_whole`. Its forward pass widens the weight to the dtype of the network. Every offload mode
holds the same numbers, so results are equal bit for bit in all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vidgen.core.errors import InputError, nearest

Quantization = Literal["int8", "fp8"]
"""Quantisation of plain weights: 8 bits a number, with a float32 scale for each row."""
SCALE, WHOLE = "weight_scale", "weight_whole"
"""Names of a layer's buffers: the scales of rows or blocks, and the scale of the matrix."""
QUANTIZED = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}
"""Dtype and largest number of each quantisation."""


@dataclass(frozen=True)
class Packing:
    """The form of a quantised matrix.

    Attributes:
        kind: "scaled", "mxfp8", "nvfp4" or a type of ggml's blocks; see `ops.dequantize`.
        shape: of the matrix, [N, K].
        group: inputs that were rotated together; 0 if they weren't.
    """

    kind: str
    shape: tuple[int, ...]
    group: int = 0

    def widen(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Return the matrix, from its parts by the names of a layer's parameter and buffers."""
        from vidgen.ops import dequantize  # few models need it

        data = parts["weight"]
        if self.kind in dequantize.GGUF_TYPES:
            return dequantize.gguf(data, self.kind, (-1, *self.shape[1:]), dtype)
        if self.kind == "nvfp4":
            return dequantize.nvfp4(data, parts[SCALE], parts[WHOLE], dtype)
        if self.kind == "mxfp8":
            return dequantize.mxfp8(data, parts[SCALE], dtype)
        if not self.group:
            return dequantize.scaled(data, parts[SCALE], dtype)
        wide = dequantize.scaled(data, parts[SCALE], torch.float32)
        return dequantize.unrotate(wide, self.group).to(dtype)


class Quantized(nn.Module):
    """A layer with a quantised weight; `dtype` is that of the network."""

    packing: Packing
    dtype: torch.dtype

    def parts(self) -> dict[str, Tensor]:
        """Return the stored numbers and scales, by name."""
        found = {**self._parameters, **self._buffers}
        return {name: part for name, part in found.items() if part is not None}

    def widened(self) -> Tensor:
        """Return the weight in the network's dtype."""
        return self.packing.widen(self.parts(), self.dtype)


class QuantizedLinear(Quantized, nn.Linear):
    """A linear layer with a quantised weight."""

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., D_in] to [..., D_out]."""
        weight = self.weight
        if weight is self._parameters["weight"]:  # otherwise an adapter's sum of weight and delta
            weight = self.widened()
        return F.linear(x, weight, self.bias)


class QuantizedEmbedding(Quantized, nn.Embedding):
    """An embedding with a quantised table, of which it widens the rows that are looked up."""

    def forward(self, ids: Tensor) -> Tensor:
        """Map ids [...] to [..., D], in the dtype of the network."""
        rows = ids.flatten()
        parts = {name: part if part.numel() == 1 else part[rows]
                 for name, part in self.parts().items()}
        return self.packing.widen(parts, self.dtype).view(*ids.shape, -1)


def weight_dtype(layer: nn.Module) -> torch.dtype:
    """Return the dtype of a layer's weight, for a quantised one that of the widened weight."""
    if isinstance(layer, Quantized):
        return layer.dtype
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.dtype


def hold_quantized(layer: nn.Module, packing: Packing, dtype: torch.dtype) -> bool:
    """Turn a layer of the same shape into one that holds a quantised weight.

    Args:
        dtype: of the network.

    Returns:
        False if the layer can't hold it; it is unchanged then.
    """
    if type(layer) is nn.Embedding and packing.kind not in ("mxfp8", "nvfp4"):  # tiled scales
        layer.__class__ = QuantizedEmbedding
    elif isinstance(layer, nn.Linear):
        layer.__class__ = QuantizedLinear
    else:
        return False
    layer.__dict__.update(packing=packing, dtype=dtype)
    return True


def check_quantization(kind: str | None) -> None:
    """Raise InputError for an unknown quantisation; None is none."""
    if kind is not None and kind not in QUANTIZED:
        raise InputError(f"quantize is {kind!r}; {nearest(kind, get_args(Quantization))}")


def quantize(weight: Tensor, kind: Quantization) -> tuple[Tensor, Tensor]:
    """Quantise a matrix: return 8-bit numbers [N, K] and float32 scales [N, 1].

    Raises:
        InputError: an unknown `kind`.
    """
    check_quantization(kind)
    dtype, largest = QUANTIZED[kind]
    wide = weight.float()
    scale = wide.abs().amax(1, keepdim=True).clamp_(min=1e-12).div_(largest)
    numbers = wide / scale
    return (numbers.round_() if dtype == torch.int8 else numbers).to(dtype), scale


def quantized_bytes(shape: tuple[int, ...]) -> int:
    """Return the size of a matrix [N, K] that `quantize` made, in bytes."""
    return shape[0] * (shape[1] + 4)
