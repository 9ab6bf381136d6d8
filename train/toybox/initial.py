"""Initial weights of a `SpacetimeDiT` that is trained from scratch."""

from __future__ import annotations

import math

import torch
from torch import nn

from vidgen.models.dit import SpacetimeDiT
from vidgen.models.dit_blocks import ControlBlock, CrossAttention, PatchEmbedding

_PAD_LOGIT, _PAD_KEY_BIAS = -6.5, -0.03  # see `_hide_pad_key`


@torch.no_grad()
def init_dit(dit: SpacetimeDiT, generator: torch.Generator | None = None) -> None:
    """Draw the weights for training from scratch; the first velocity is 0.

    Xavier for matrices, zero for biases, gates and output. With zero gates self-attention and
    feed-forward start as the identity (adaLN-zero, Peebles & Xie 2023, sec. 3.2). Cross-attention
    has no gate: its output starts small.
    """
    for module in dit.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight, generator=generator)
            nn.init.zeros_(module.bias)
    _init_patches(dit.patch_embed, generator)
    for layer in (dit.time_embed.up, dit.time_embed.down):
        nn.init.normal_(layer.weight, std=0.02, generator=generator)
    nn.init.zeros_(dit.time_embed.proj.weight)
    for module in dit.modules():
        if isinstance(module, CrossAttention):
            module.out.weight.mul_(dit.config.num_layers**-0.5)
            _hide_pad_key(module)
        elif isinstance(module, ControlBlock):
            nn.init.zeros_(module.proj_out.weight)
    if dit.config.control_channels is not None:
        _init_patches(dit.control_embed, generator)
    nn.init.zeros_(dit.head.proj.weight)
    if dit.config.audio is not None:
        nn.init.zeros_(dit.head.audio_proj.weight)


def _init_patches(embedding: PatchEmbedding, generator: torch.Generator | None) -> None:
    nn.init.xavier_uniform_(embedding.weight.flatten(1), generator=generator)
    nn.init.zeros_(embedding.bias)


def _hide_pad_key(attention: CrossAttention) -> None:
    """Draw weights with which the key of Wan's zero text rows starts unattended.

    It stands for about 500 rows, so its score has log 500 = 6.2 added: with scores near 0 it would
    take 97% of the attention. A zero row's key is the bias alone, which the norm scales to length
    sqrt(D): a small negative constant becomes -1 everywhere, and with a positive mean rho of the
    normalised queries its score is -sqrt(d) * rho. For text keys the bias is negligible.
    """
    head_dim = attention.q.in_features // attention.num_heads
    mean = min(0.95, -_PAD_LOGIT / math.sqrt(head_dim))
    nn.init.constant_(attention.k.bias, _PAD_KEY_BIAS)
    nn.init.constant_(attention.q.bias, mean / math.sqrt(1 - mean**2))
