"""Weights that a `SpacetimeDiT` starts training with."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from vidgen.models.dit_blocks import CrossAttention
from vidgen.models.dit_control import ControlBlock

if TYPE_CHECKING:
    from vidgen.models.dit import SpacetimeDiT

PAD_LOGIT = -6.5
PAD_KEY_BIAS = -0.03


def init_dit(model: SpacetimeDiT, generator: torch.Generator | None = None) -> None:
    """Xavier for matrices, zero for biases, gates and output, so that the first velocity is 0.

    Zero gates make self-attention and feed-forward start as the identity (adaLN-zero, Peebles &
    Xie 2023, sec. 3.2). Cross-attention has no gate: its output starts small.
    """
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(model.patch_embed.weight.flatten(1), generator=generator)
        nn.init.zeros_(model.patch_embed.bias)
        for layer in (model.time_embed.up, model.time_embed.down):
            nn.init.normal_(layer.weight, std=0.02, generator=generator)
        nn.init.zeros_(model.time_embed.proj.weight)
        for module in model.modules():
            if isinstance(module, CrossAttention):
                module.out.weight.mul_(model.config.num_layers**-0.5)
                _hide_pad_key(module)
            elif isinstance(module, ControlBlock):
                nn.init.zeros_(module.proj_out.weight)
        if model.config.control_channels is not None:
            nn.init.xavier_uniform_(model.control_embed.weight.flatten(1), generator=generator)
            nn.init.zeros_(model.control_embed.bias)
        nn.init.zeros_(model.head.proj.weight)
        if model.config.audio is not None:
            nn.init.zeros_(model.head.audio_proj.weight)


def _hide_pad_key(layer: CrossAttention) -> None:
    """Start with the key of Wan's zero text rows unattended.

    It stands for about 500 rows, so its score has log 500 = 6.2 added: with scores near 0 it would
    take 97% of the attention. A zero row's key is the bias alone, which the norm blows up to length
    sqrt(D): a small negative constant becomes -1 everywhere, and a positive mean rho of the
    normalised queries scores it at -sqrt(d) * rho. Text keys hardly feel so small a bias.
    """
    head_dim = layer.q.in_features // layer.num_heads
    mean = min(0.95, -PAD_LOGIT / math.sqrt(head_dim))
    nn.init.constant_(layer.k.bias, PAD_KEY_BIAS)
    nn.init.constant_(layer.q.bias, mean / math.sqrt(1 - mean**2))
