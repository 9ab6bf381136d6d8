"""The text encoder UMT5, from a million weights to UMT5-XXL.

UMT5 is T5 v1.1 (Raffel et al. 2020; Shazeer 2020, gated GELU) with a relative position bias in
every layer (Chung et al. 2023). Modules have the names of transformers' `UMT5EncoderModel`, so that
both load each other's folders. transformers itself isn't imported, since that takes two seconds.

Axes: B batch, S text tokens, D width, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vidgen.core.errors import ModelError
from vidgen.models.tokenizer import PromptTokenizer
from vidgen.ops.quantized import weight_dtype

NOTHING: Mapping[Any, Tensor] = MappingProxyType({})
_SIZES = ("vocab_size", "hidden_dim", "head_dim", "ffn_dim", "num_layers", "num_heads")


@dataclass(frozen=True)
class TextConfig:
    """Architecture of a UMT5 encoder."""

    vocab_size: int
    hidden_dim: int
    head_dim: int
    ffn_dim: int
    num_layers: int
    num_heads: int
    num_buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in _SIZES:
            if getattr(self, name) < 1:
                raise ModelError(
                    f"the text encoder's {name} must be 1 or more, not {getattr(self, name)}"
                )
        if self.num_buckets % 4 or self.max_distance <= self.num_buckets // 4:
            raise ModelError(
                f"the text encoder has num_buckets {self.num_buckets} and max_distance "
                f"{self.max_distance}: num_buckets must be a multiple of 4, and max_distance "
                "more than a quarter of it"
            )


class _Norm(nn.Module):
    """RMSNorm computed in float32 (Zhang & Sennrich 2019, eq. 4)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (wide * scale).to(self.weight.dtype)


class _Attention(nn.Module):
    """Self-attention with unscaled scores and a learned bias for each relative position."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        inner = config.num_heads * config.head_dim
        self.num_heads = config.num_heads
        self.q, self.k, self.v = (nn.Linear(config.hidden_dim, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, config.hidden_dim, bias=False)
        self.relative_attention_bias = nn.Embedding(config.num_buckets, config.num_heads)
        width = config.hidden_dim**-0.5
        nn.init.normal_(self.q.weight, std=width * config.head_dim**-0.5)
        for layer, std in ((self.k, width), (self.v, width), (self.o, inner**-0.5)):
            nn.init.normal_(layer.weight, std=std)
        nn.init.normal_(self.relative_attention_bias.weight, std=width)

    def forward(self, x: Tensor, buckets: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        scores = q @ k.transpose(2, 3) + self.relative_attention_bias(buckets).permute(2, 0, 1)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None, :], torch.finfo(scores.dtype).min)
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class _FeedForward(nn.Module):
    """GEGLU (Shazeer 2020, eq. 6)."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.wi_0, self.wi_1 = (
            nn.Linear(config.hidden_dim, config.ffn_dim, bias=False) for _ in range(2)
        )
        self.wo = nn.Linear(config.ffn_dim, config.hidden_dim, bias=False)
        for layer in (self.wi_0, self.wi_1, self.wo):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x)
        return self.wo(hidden.to(weight_dtype(self.wo)))


class _Block(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        inner = {"SelfAttention": _Attention(config), "DenseReluDense": _FeedForward(config)}
        self.layer: Any = nn.ModuleList(
            nn.ModuleDict({name: each, "layer_norm": _Norm(config.hidden_dim, config.eps)})
            for name, each in inner.items()
        )

    def forward(self, x: Tensor, buckets: Tensor, mask: Tensor | None) -> Tensor:
        attention, feed_forward = self.layer
        x = x + attention["SelfAttention"](attention["layer_norm"](x), buckets, mask)
        return x + feed_forward["DenseReluDense"](feed_forward["layer_norm"](x))


class _Stack(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.block = nn.ModuleList(_Block(config) for _ in range(config.num_layers))
        self.final_layer_norm = _Norm(config.hidden_dim, config.eps)

    def forward(self, x: Tensor, buckets: Tensor, mask: Tensor | None) -> Tensor:
        for block in self.block:
            x = block(x, buckets, mask)
        return self.final_layer_norm(x)


class UMT5Encoder(nn.Module):
    """UMT5's encoder; a new one is initialised like T5 (Mesh TensorFlow's rule)."""

    fp32_in_fp16 = (".wo.",)  # XXL's sums exceed float16's range; transformers does the same

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.hidden_dim)
        self.encoder = _Stack(config)

    def forward(
        self, ids: Tensor, mask: Tensor | None = None, learned: Mapping[int, Tensor] = NOTHING
    ) -> Tensor:
        """Encode token ids [B, S] to features [B, S, D]; rows of padding are undefined.

        Args:
            mask: [B, S], False for padding, to which no token attends.
            learned: embeddings [D], by token id, that replace the encoder's; they get gradients.
        """
        buckets = position_buckets(ids.shape[1], self.config, ids.device)
        embedded = self.shared(ids)
        for token, row in learned.items():
            embedded = torch.where((ids == token)[..., None], row.to(embedded), embedded)
        return self.encoder(embedded, buckets, mask)


def position_buckets(length: int, config: TextConfig, device: torch.device | str) -> Tensor:
    """Return the bias bucket of each (query, key) pair, [S, S] int64 (Raffel et al. 2020, 2.1).

    Half of the buckets are for keys after the query. In each half, the first half are single
    distances; the others grow logarithmically up to `max_distance`, and larger distances share the
    last one.
    """
    position = torch.arange(length, device=device)
    offset = position[None, :] - position[:, None]
    distance = offset.abs()
    half = config.num_buckets // 2
    exact = half // 2
    growth = torch.log(distance.float() / exact) / math.log(config.max_distance / exact)
    far = (exact + (growth * (half - exact)).clamp(min=0).long()).clamp(max=half - 1)
    return torch.where(distance < exact, distance, far) + half * (offset > 0)


class TextEncoder:
    """A tokenizer and a UMT5 encoder, which together map prompts to context."""

    def __init__(self, encoder: UMT5Encoder, tokenizer: PromptTokenizer) -> None:
        if tokenizer.vocab_size > encoder.config.vocab_size:
            raise ModelError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, but the text encoder only "
                f"{encoder.config.vocab_size}; the two must come from the same model"
            )
        self.encoder = encoder
        self.tokenizer = tokenizer

    @torch.no_grad()
    def encode(
        self, prompts: Sequence[str], learned: Mapping[str, Tensor] = NOTHING
    ) -> tuple[Tensor, Tensor]:
        """Return (context [B, S, D], lengths [B] int64) of prompts.

        Rows after a prompt's length are zero, as Wan's transformer expects them. `learned` has
        embeddings [D] that replace the encoder's, by the token as written in prompts.

        Raises:
            ModelError: this model has no such token, or its embeddings have another width.
        """
        ids, mask = self.tokenizer.encode(prompts)
        device = self.encoder.shared.weight.device
        width = self.encoder.config.hidden_dim
        for token, row in learned.items():
            if row.shape != (width,):
                raise ModelError(
                    f"the embedding of {token} has shape {list(row.shape)}, but this text encoder "
                    f"needs [{width}]; it was trained for another model"
                )
        rows = {self.tokenizer.token_id(token): row for token, row in learned.items()}
        return encode_tokens(self.encoder, ids.to(device), mask.to(device), rows), mask.sum(1)


def encode_tokens(
    encoder: UMT5Encoder, ids: Tensor, mask: Tensor, learned: Mapping[int, Tensor] = NOTHING
) -> Tensor:
    """Return the context [B, S, D] of token ids and mask, both [B, S]; padding has zero rows."""
    return encoder(ids, mask, learned) * mask[..., None]
