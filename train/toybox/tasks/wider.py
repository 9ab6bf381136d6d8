"""A wider encoder that begins as the one there is.

Every channel is repeated, and what reads it reads shares of its copies that sum to one (Net2Net,
Chen et al. 2016, sec. 2.2), so the latents are the same. The shares are drawn, so that the copies
part as they learn.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vidgen.core.errors import InputError
from vidgen.models.vae import CausalVAE

_SPREAD = 0.25
"""Deviation of a copy's share: of two copies mostly a quarter to three quarters each."""


@torch.no_grad()
def with_wider_encoder(vae: CausalVAE, encoder_dim: int) -> CausalVAE:
    """The same VAE with an encoder whose every width is a multiple of what it was.

    Raises:
        InputError: `encoder_dim` isn't a multiple of the width there is.
    """
    times, rest = divmod(encoder_dim, vae.config.encoder_dim)
    if rest or not times:
        raise InputError(f"encoder_dim is {encoder_dim}; give a multiple of the released "
                         f"encoder's {vae.config.encoder_dim}")
    wide = CausalVAE(replace(vae.config, encoder_dim=encoder_dim))
    narrow, draw = vae.state_dict(), torch.Generator().manual_seed(0)
    state = {name: _repeated(narrow[name].cpu(), value.shape, times, draw)
             for name, value in wide.state_dict().items()}
    for name in ("weight", "bias"):  # queries: their products with keys have grown with the width
        rows = state[f"encoder.mid.attention.to_qkv.{name}"]
        rows[: len(rows) // 3] *= times**-0.5
    wide.load_state_dict(state)
    return wide.to(next(vae.parameters()).device)


def _repeated(value: Tensor, wanted: torch.Size, times: int, draw: torch.Generator) -> Tensor:
    """A weight with its outputs repeated, and its inputs read in shares, where those have grown."""
    if value.shape[0] != wanted[0]:
        value = value.repeat_interleave(times, dim=0)
    if value.shape == wanted:
        return value
    rows, columns = value.shape[:2]
    shares = _SPREAD * torch.randn(rows, columns, times, generator=draw)
    shares = shares - shares.mean(-1, keepdim=True) + 1 / times
    shares = shares.flatten(1).view(rows, -1, *(1,) * (value.dim() - 2))
    return value.repeat_interleave(times, dim=1) * shares
