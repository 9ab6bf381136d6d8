"""Rotary positions over time, rows and columns (Su et al. 2021, eq. 34), Wan's split and pairing.

Axes: B batch, F latent frames, h w patch rows and columns, L tokens, H heads, d head width.
Pairs are neighbours (2i, 2i + 1); of d/2 angles the last 2 * (d // 6) belong to rows and columns in
equal parts, the rest to time. Positions are real numbers; tables are computed in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rope_table(time: Tensor, rows: int, columns: int, head_dim: int, theta: float = 1e4) -> Tensor:
    """Rotations of the tokens of latent frames at any real time positions.

    Args:
        time: [B or 1, F] time positions in latent frames.
        rows: patches down a frame, at positions 0, 1, ...
        columns: patches across a frame.
        head_dim: d, even.
        theta: wavelength base.

    Returns:
        [B or 1, F * rows * columns, d/2] complex64, tokens in (F, h, w) order.
    """
    spatial = head_dim // 6
    where = time.device

    def rotation(positions: Tensor, num_angles: int) -> Tensor:
        exponents = torch.arange(num_angles, device=where, dtype=torch.float64) / num_angles
        angles = positions.double()[..., None] * theta**-exponents
        return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)

    batch, frames = time.shape
    shape = (batch, frames, rows, columns)
    by_time = rotation(time, head_dim // 2 - 2 * spatial)[:, :, None, None]
    by_row = rotation(torch.arange(rows, device=where), spatial)[:, None]
    by_column = rotation(torch.arange(columns, device=where), spatial)
    parts = [part.expand(*shape, -1) for part in (by_time, by_row, by_column)]
    return torch.cat(parts, dim=-1).flatten(1, 3)


def apply_rope(x: Tensor, table: Tensor) -> Tensor:
    """Rotate neighbouring pairs of x.

    Args:
        x: [B, L, H, d] float32.
        table: [B or 1, L, d/2] complex64, from `rope_table`.

    Returns:
        [B, L, H, d] float32.
    """
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table[:, :, None]).flatten(-2)
