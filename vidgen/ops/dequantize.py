"""Widen quantised matrices to floating point.

* `scaled`: float8 or int8 numbers with a scale for the matrix, each row, or each block of a row.
* `mxfp8`: float8 with a power of two (E8M0) for each 32 numbers of a row; OCP Microscaling 1.0.
* `nvfp4`: E2M1 numbers, two in a byte, with a float8 scale for each 16 and one for the matrix.
* `unrotate`: undoes the Hadamard rotation of a matrix's inputs (ConvRot).
* `gguf`: ggml's blocks of 32 or 256 numbers, defined by llama.cpp's `ggml-quants.c`.

Axes: N rows, K columns, n blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

MX_BLOCK, NV_BLOCK = 32, 16
"""Consecutive numbers of a row with a common scale."""
_TILE_ROWS, _TILE_COLUMNS = 128, 4
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""Values of the 4-bit codes of IQ4_NL and IQ4_XS."""


def scaled(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply stored numbers by their scale in float32, and cast the products to `dtype`.

    Args:
        values: [N, ...], float8 or int8.
        scale: one number, one for each row ([N] or [N, 1]), or one for each block of a row
            ([N, n, 1]).

    Raises:
        ValueError: the scale has another shape.
    """
    if not fits(values.shape, scale.shape):
        raise ValueError(f"a scale of shape {list(scale.shape)} for {list(values.shape)} numbers")
    rows, count = len(values), scale.numel()
    shape = (rows, count // rows, -1) if count > 1 else (1, 1, -1)
    wide = values.float().reshape(shape).mul_(scale.float().reshape(*shape[:2], 1))
    return wide.to(dtype).reshape(values.shape)


def fits(values: torch.Size, scale: torch.Size) -> bool:
    """Return True if a scale has one number for a matrix, each row, or each block of a row."""
    rows, count = values[0] if values else 0, scale.numel()
    return count == 1 or (scale[0] == rows and count % rows == 0 and values.numel() % count == 0)


def mxfp8(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Widen microscaled float8.

    Args:
        values: [N, K], float8.
        scale: exponents with a bias of 127, as uint8 or E8M0; [N, K / 32], or tiled: see `untiled`.
    """
    rows, columns = values.shape
    bits = _laid_out(scale.view(torch.uint8), rows, columns // MX_BLOCK)
    return scaled(values, torch.exp2(bits.float() - 127)[..., None], dtype)


def nvfp4(values: Tensor, scale: Tensor, whole: Tensor, dtype: torch.dtype) -> Tensor:
    """Widen 4-bit floating point.

    Args:
        values: [N, K / 2], uint8; the high half of each byte is the first of two numbers.
        scale: float8 (E4M3), [N, K / 16], or tiled: see `untiled`.
        whole: scale of the matrix.
    """
    rows, columns = len(values), 2 * values.shape[1]
    codes = torch.stack((values >> 4, values & 15), dim=-1).reshape(rows, columns)
    table = torch.tensor(_E2M1 + tuple(-each for each in _E2M1), device=values.device)
    each = _laid_out(scale, rows, columns // NV_BLOCK).float() * whole.float()
    return scaled(table[codes.int()], each[..., None], dtype)


def untiled(scales: Tensor, rows: int, columns: int) -> Tensor:
    """Return scales [rows, columns] from the tiled layout of NVIDIA's matrix products.

    A tile holds 128 rows and 4 columns, in 32 lines; line i holds rows i, i + 32, i + 64 and i + 96
    (cuBLAS, "block scaling factors layout"). Rows and columns are padded to whole tiles.
    """
    down, across = -(-rows // _TILE_ROWS), -(-columns // _TILE_COLUMNS)
    tiles = scales.reshape(down, across, 32, 4, _TILE_COLUMNS)
    plain = tiles.permute(0, 3, 2, 1, 4).reshape(down * _TILE_ROWS, across * _TILE_COLUMNS)
    return plain[:rows, :columns]


def _laid_out(scales: Tensor, rows: int, columns: int) -> Tensor:
    """Return scales [rows, columns] from a plain or a tiled layout.

    If no padding is needed, both layouts have the same size; files with such matrices are tiled.
    """
    check_blocks(scales.shape, rows, columns)
    if scales.numel() == _padded(rows, columns):
        return untiled(scales, rows, columns)
    return scales.reshape(rows, columns)


def check_blocks(shape: torch.Size, rows: int, columns: int) -> None:
    """Raise ValueError if scales of this shape aren't those of rows x columns blocks."""
    if shape.numel() not in (rows * columns, _padded(rows, columns)):
        raise ValueError(f"scales of shape {list(shape)} for {rows}x{columns} blocks")


def _padded(rows: int, columns: int) -> int:
    return -(-rows // _TILE_ROWS) * _TILE_ROWS * -(-columns // _TILE_COLUMNS) * _TILE_COLUMNS


def unrotate(weight: Tensor, group: int) -> Tensor:
    """Undo the rotation of a matrix's inputs, [N, K], in groups of `group`.

    ConvRot's regular Hadamard matrix is symmetric and orthogonal, so it is its own inverse.

    Raises:
        ValueError: `group` isn't a power of 4, or K isn't a multiple of it.
    """
    rotation = _hadamard(group).to(weight)
    if weight.shape[1] % group:
        raise ValueError(f"{weight.shape[1]} columns in groups of {group}")
    return (weight.reshape(-1, group) @ rotation).reshape(weight.shape)


@cache
def _hadamard(size: int) -> Tensor:
    smallest = torch.ones(4, 4) - 2 * torch.eye(4).flip(0)
    matrix: Tensor = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(matrix, smallest)
    if len(matrix) != size:
        raise ValueError(f"groups of {size}, which is no power of 4")
    return matrix.div(size**0.5)


class GGUFType(NamedTuple):
    """A type of ggml's blocks: `widen` maps uint8 [n, num_bytes] to float32 [n, numbers]."""

    numbers: int
    num_bytes: int
    widen: Callable[[Tensor], Tensor]


def gguf(data: Tensor, kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Widen ggml's blocks.

    Args:
        data: all blocks in order, uint8.
        kind: a key of `GGUF_TYPES`.
        shape: of the result.
    """
    blocks = data.reshape(-1, GGUF_TYPES[kind].num_bytes)
    return GGUF_TYPES[kind].widen(blocks).to(dtype).reshape(shape)


def _half(block: Tensor, at: int) -> Tensor:
    """Return the float16 at byte `at` of each block, as float32 [n, 1]."""
    return block[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """Return the low and then the high halves, [n, 2, b], of bytes [n, b]."""
    return torch.stack((packed & 15, packed >> 4), dim=1)


def _bits(packed: Tensor) -> Tensor:
    """Return the bits, [n, 8 b], of bytes [n, b], lowest first."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (packed[..., None] >> shifts & 1).flatten(1)


def _signed(packed: Tensor) -> Tensor:
    return packed.contiguous().view(torch.int8)


def _q8_0(block: Tensor) -> Tensor:
    return _half(block, 0) * _signed(block[:, 2:])


def _q4_0(block: Tensor) -> Tensor:
    return _half(block, 0) * (_nibbles(block[:, 2:]).flatten(1).float() - 8)


def _q4_1(block: Tensor) -> Tensor:
    return _half(block, 0) * _nibbles(block[:, 4:]).flatten(1) + _half(block, 2)


def _fives(block: Tensor, at: int) -> Tensor:
    """Return 5-bit numbers: 4 bytes of high bits from byte `at`, then 16 bytes of low halves."""
    return _nibbles(block[:, at + 4 :]).flatten(1) | _bits(block[:, at : at + 4]) << 4


def _q5_0(block: Tensor) -> Tensor:
    return _half(block, 0) * (_fives(block, 2).float() - 16)


def _q5_1(block: Tensor) -> Tensor:
    return _half(block, 0) * _fives(block, 4) + _half(block, 2)


def _iq4_nl(block: Tensor) -> Tensor:
    return _half(block, 0) * _iq4(block[:, 2:]).flatten(1)


def _iq4(packed: Tensor) -> Tensor:
    """Return the values, [n, 2, b], of the 4-bit codes in bytes [n, b]."""
    return torch.tensor(_IQ4, dtype=torch.float32, device=packed.device)[_nibbles(packed).int()]


def _iq4_xs(block: Tensor) -> Tensor:
    high = block[:, 2:4].contiguous().view(torch.int16).int()
    groups = torch.arange(8, device=block.device, dtype=torch.int32)
    low = torch.stack((block[:, 4:8] & 15, block[:, 4:8] >> 4), dim=-1).flatten(1)
    scales = (low | (high >> 2 * groups & 3) << 4).float() - 32
    values = _iq4(block[:, 8:].reshape(-1, 16)).reshape(len(block), 8, 32)
    return (_half(block, 0) * scales)[..., None] * values


def _quarters(packed: Tensor) -> Tensor:
    """Return 2-bit numbers, [n, 16, 16], of 64 bytes: the lowest bits of 32 bytes first."""
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=packed.device)
    return (packed.reshape(-1, 2, 1, 32) >> shifts[:, None] & 3).reshape(-1, 16, 16)


def _q2_k(block: Tensor) -> Tensor:
    codes = block[:, :16]
    scale, least = _half(block, 80) * (codes & 15), _half(block, 82) * (codes >> 4)
    return scale[..., None] * _quarters(block[:, 16:80]) - least[..., None]


def _q3_k(block: Tensor) -> Tensor:
    masks, packed = block[:, :32], block[:, 96:108]
    low = _nibbles(packed[:, :8]).flatten(1)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=block.device)
    high = (packed[:, None, 8:] >> shifts[:, None] & 3).flatten(1)
    scales = (low | high << 4).float() - 32
    shifts = torch.arange(8, dtype=torch.uint8, device=block.device)
    unset = (masks[:, None] >> shifts[:, None] & 1 ^ 1).reshape(-1, 16, 16)
    numbers = _quarters(block[:, 32:96]).float() - 4 * unset
    return (_half(block, 108) * scales)[..., None] * numbers


def _scales_and_least(block: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scales and minima, [n, 8, 1], of Q4_K and Q5_K, multiplied by the block's."""
    first, second, third = block[:, 4:16].reshape(-1, 3, 4).unbind(1)
    scales = torch.cat((first & 63, third & 15 | first >> 6 << 4), dim=1)
    least = torch.cat((second & 63, third >> 4 | second >> 6 << 4), dim=1)
    return (_half(block, 0) * scales)[..., None], (_half(block, 2) * least)[..., None]


def _q4_k(block: Tensor) -> Tensor:
    scales, least = _scales_and_least(block)
    return scales * _nibbles(block[:, 16:].reshape(-1, 32)).reshape(-1, 8, 32) - least


def _q5_k(block: Tensor) -> Tensor:
    scales, least = _scales_and_least(block)
    low = _nibbles(block[:, 48:].reshape(-1, 32)).reshape(-1, 8, 32)
    shifts = torch.arange(8, dtype=torch.uint8, device=block.device)
    high = block[:, None, 16:48] >> shifts[:, None] & 1
    return scales * (low | high << 4) - least


def _q6_k(block: Tensor) -> Tensor:
    low = _nibbles(block[:, :128].reshape(-1, 64)).reshape(-1, 2, 4, 32)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=block.device)
    high = block[:, 128:192].reshape(-1, 2, 1, 32) >> shifts[:, None] & 3
    numbers = (low | high << 4).reshape(-1, 16, 16).float() - 32
    scales = _half(block, 208) * _signed(block[:, 192:208])
    return scales[..., None] * numbers


GGUF_TYPES = {
    "Q4_0": GGUFType(32, 18, _q4_0), "Q4_1": GGUFType(32, 20, _q4_1),
    "Q5_0": GGUFType(32, 22, _q5_0), "Q5_1": GGUFType(32, 24, _q5_1),
    "Q8_0": GGUFType(32, 34, _q8_0),
    "Q2_K": GGUFType(256, 84, _q2_k), "Q3_K": GGUFType(256, 110, _q3_k),
    "Q4_K": GGUFType(256, 144, _q4_k), "Q5_K": GGUFType(256, 176, _q5_k),
    "Q6_K": GGUFType(256, 210, _q6_k),
    "IQ4_NL": GGUFType(32, 18, _iq4_nl), "IQ4_XS": GGUFType(256, 136, _iq4_xs),
}
"""Types by ggml's names."""
