"""Modules of a `SpacetimeDiT`: embeddings, attention, one block, and the head.

Norms, modulation, residual gates and time embedding are computed in float32 for any dtype of the
weights; matrix products run in the autocast dtype or the weights'.

Axes: B batch, L tokens, D width, S text tokens, G runs of tokens that share a time, H heads, d head
width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vidgen.models.dit_types import Context, KVCache, Layout, Stream
from vidgen.ops.attention import attention
from vidgen.ops.linear import LastLinear, feed_forward
from vidgen.ops.norm import (
    add_and_modulated_norm,
    add_gated,
    add_gated_and_norm,
    layer_norm,
    modulated_norm,
)
from vidgen.ops.parallel import ulysses_attention
from vidgen.ops.quantized import weight_dtype
from vidgen.ops.rope import normed_heads


def compute_dtype(layer: nn.Linear) -> torch.dtype:
    """Return the dtype of a layer's products: autocast's if enabled, else its weight's."""
    device = layer.weight.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight_dtype(layer)


class FeedForward(nn.Module):
    """Feed-forward down(gelu(up(x))); GELU in its tanh form as in Wan, unless `exact`."""

    def __init__(
        self, width: int, hidden: int, out: int | None = None, *, exact: bool = False
    ) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, out or width)
        self.approximate = "none" if exact else "tanh"

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., width] to [..., out]."""
        return feed_forward(self.up, self.down, x, self.approximate)


class PatchEmbedding(nn.Module):
    """Linear map of patches; its weight has the shape of Wan's convolution, [D, C, 1, p, p]."""

    def __init__(self, channels: int, width: int, patch_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, channels, 1, patch_size, patch_size))
        self.bias = nn.Parameter(torch.empty(width))

    def forward(self, patches: Tensor) -> Tensor:
        """Map [B, L, C * p * p] to [B, L, D]."""
        return F.linear(patches.to(self.weight.dtype), self.weight.flatten(1), self.bias)


class TimeEmbedding(nn.Module):
    """Embedding of timesteps: sinusoids, two linear layers, and a projection for the blocks."""

    def __init__(self, freq_dim: int, width: int) -> None:
        super().__init__()
        self.freq_dim = freq_dim
        self.up = nn.Linear(freq_dim, width)
        self.down = nn.Linear(width, width)
        self.proj = nn.Linear(width, 6 * width)

    def forward(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Return embeddings of timesteps [...] for the head [..., D] and the blocks [..., 6, D].

        Both are float32.
        """
        half = self.freq_dim // 2
        steps = torch.arange(half, device=timestep.device, dtype=torch.float32)
        angles = timestep.float()[..., None] * torch.exp(-math.log(1e4) / half * steps)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        with torch.autocast(timestep.device.type, enabled=False):
            head = self.down(F.silu(self.up(waves.to(weight_dtype(self.up)))))
            block = self.proj(F.silu(head)).unflatten(-1, (6, -1))
        return head.float(), block.float()


class ImageEmbedding(nn.Module):
    """Embedding of CLIP image features, with learned positions in models that take two images."""

    def __init__(self, image_dim: int, width: int, num_positions: int | None) -> None:
        super().__init__()
        self.norm_in = nn.LayerNorm(image_dim)
        self.ffn = FeedForward(image_dim, image_dim, width, exact=True)
        self.norm_out = nn.LayerNorm(width)
        self.positions = (
            nn.Parameter(torch.zeros(1, num_positions, image_dim)) if num_positions else None
        )

    def forward(self, features: Tensor) -> Tensor:
        """Map features [B, S, image_dim] to [B, S, D]."""
        if self.positions is not None:
            features = features + self.positions
        dtype = compute_dtype(self.ffn.up)
        norm, out = self.norm_in, self.norm_out
        x = self.ffn(layer_norm(features, norm.weight, norm.bias, norm.eps).to(dtype))
        return layer_norm(x, out.weight, out.bias, out.eps).to(dtype)


class HeadsNorm(nn.Module):
    """RMSNorm with a gain over the full width, all heads together."""

    def __init__(self, width: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.num_heads, self.eps = num_heads, eps

    def forward(self, x: Tensor, rope: Tensor | None = None) -> Tensor:
        """Normalise [B, L, H * d] to heads [B, H, L, d], rotated by `rope` [B or 1, L, d/2]."""
        return normed_heads(x, self.weight, rope, self.num_heads, self.eps)


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """Map [B, L, H * d] to [B, H, L, d]."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


class SelfAttention(nn.Module):
    """Attention among all tokens, with rotary positions."""

    def __init__(self, width: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm_q, self.norm_k = (HeadsNorm(width, num_heads, eps) for _ in range(2))

    def forward(
        self, x: Tensor, rope: Tensor, layout: Layout, cache: KVCache | None, layer: int
    ) -> Tensor:
        """Attend among tokens x [B, L, D], with rotations `rope` [B or 1, L, d/2]; same shape."""
        q, k = self.norm_q(self.q(x), rope), self.norm_k(self.k(x), rope)
        v = _heads(self.v(x), self.num_heads)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if cache is not None:
                k, v = cache.extend(layer, k, v)
            bias = layout.bias
            num_sound = max(layout.num_alone, layout.num_unseen)
            if not num_sound:
                return attention(q, k, v, bias=bias)
            start = q.shape[2] - num_sound

            def attend_to(queries: slice, keys: slice) -> Tensor:
                part = None if bias is None else bias[..., keys]
                return attention(q[:, :, queries], k[:, :, keys], v[:, :, keys], bias=part)

            # two attentions instead of a mask over the sound, which fast kernels don't support
            video = attend_to(slice(start), slice(start if layout.num_unseen else None))
            keys = slice(start if layout.num_alone else 0, None)
            return torch.cat([video, attend_to(slice(start, None), keys)], dim=2)

        if layout.spread is None:
            mixed = attend(q, k, v)
        else:
            mixed = ulysses_attention(attend, q, k, v, layout.spread)
        return self.out(mixed.transpose(1, 2).flatten(-2))


class CrossAttention(nn.Module):
    """Attention from tokens to text and, in Wan 2.1's I2V, separately to an image's features."""

    def __init__(self, width: int, num_heads: int, eps: float, *, image: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm_q, self.norm_k = (HeadsNorm(width, num_heads, eps) for _ in range(2))
        if image:
            self.k_image, self.v_image = nn.Linear(width, width), nn.Linear(width, width)
            self.norm_k_image = HeadsNorm(width, num_heads, eps)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Attend from tokens x [B, L, D] to the context; return the same shape."""
        q, k = self.norm_q(self.q(x)), self.norm_k(self.k(context.text))
        v = _heads(self.v(context.text), self.num_heads)
        mixed = attention(q, k, v, bias=context.bias)
        if context.image is not None:
            k = self.norm_k_image(self.k_image(context.image))
            v = _heads(self.v_image(context.image), self.num_heads)
            mixed = mixed + attention(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward, the first and last modulated by time.

    Video and audio share all weights except the feed-forward's: `ffn` and `audio_ffn`.
    """

    def __init__(
        self, width: int, num_heads: int, ffn_dim: int, eps: float, *,
        image: bool, audio_ffn_dim: int | None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.modulation = nn.Parameter(torch.zeros(1, 6, width))
        self.self_attn = SelfAttention(width, num_heads, eps)
        self.norm_cross = nn.LayerNorm(width, eps)
        self.cross_attn = CrossAttention(width, num_heads, eps, image=image)
        self.ffn = FeedForward(width, ffn_dim)
        if audio_ffn_dim is not None:
            self.audio_ffn = FeedForward(width, audio_ffn_dim)

    def forward(
        self, streams: Sequence[Stream], rope: Tensor, layout: Layout, context: Context,
        cache: KVCache | None, layer: int,
    ) -> list[Stream]:
        """Return the updated streams: video, then audio, or only one of them."""
        dtype = compute_dtype(self.ffn.up)
        tables = [s.time.modulate(self.modulation, s.time.block) for s in streams]
        normed = [
            modulated_norm(s.tokens, shift, scale, self.eps, dtype)
            for s, (shift, scale, *_) in zip(streams, tables, strict=True)
        ]
        lengths = [s.tokens.shape[1] for s in streams]
        joined = normed[0] if len(normed) == 1 else torch.cat(normed, dim=1)
        mixed = self.self_attn(joined, rope, layout, cache, layer).split(lengths, dim=1)
        out = []
        for stream, part, table in zip(streams, mixed, tables, strict=True):
            ffn = self.audio_ffn if stream.is_sound else self.ffn
            _, _, gate, ffn_shift, ffn_scale, ffn_gate = table
            x, cross = add_gated_and_norm(
                stream.tokens, part, gate, self.norm_cross.weight, self.norm_cross.bias, self.eps,
                dtype,
            )
            x, hidden = add_and_modulated_norm(
                x, self.cross_attn(cross, context), ffn_shift, ffn_scale, self.eps, dtype
            )
            out.append(stream._replace(tokens=add_gated(x, ffn(hidden), ffn_gate)))
        return out


class ControlBlock(Block):
    """A block of VACE's control branch; its output is added to the video's tokens."""

    def __init__(
        self, width: int, num_heads: int, ffn_dim: int, eps: float, *, image: bool, first: bool
    ) -> None:
        super().__init__(
            width, num_heads, ffn_dim, eps, image=image, audio_ffn_dim=None
        )
        self.proj_in = nn.Linear(width, width) if first else None
        self.proj_out = nn.Linear(width, width)

    def forward(  # type: ignore[override]
        self, control: Tensor, video: Stream, rope: Tensor, layout: Layout, context: Context
    ) -> tuple[Tensor, Tensor]:
        """Return what is added to the video's tokens, and the next control tokens: both [B, L, D].

        `control` has the previous control block's tokens; `video` the video's tokens before all
        blocks, which the first control block adds.
        """
        if self.proj_in is not None:
            control = video.tokens + self.proj_in(control).to(video.tokens.dtype)
        [out] = super().forward([Stream(control, video.time)], rope, layout, context, None, 0)
        return self.proj_out(out.tokens.to(compute_dtype(self.proj_out))), out.tokens


class Head(nn.Module):
    """Modulated norm and projection of tokens to velocities."""

    def __init__(self, width: int, patch_dim: int, audio_channels: int | None, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.modulation = nn.Parameter(torch.zeros(1, 2, width))
        self.proj = LastLinear(width, patch_dim)
        if audio_channels is not None:
            self.audio_proj = LastLinear(width, audio_channels)

    def forward(self, stream: Stream, proj: nn.Linear) -> Tensor:
        """Map a stream's tokens [B, L, D] by `proj` to [B, L, channels], in the weights' dtype."""
        shift, scale = stream.time.modulate(self.modulation, stream.time.head.unsqueeze(-2))
        dtype = weight_dtype(proj)
        return proj(modulated_norm(stream.tokens, shift, scale, self.eps, dtype))
