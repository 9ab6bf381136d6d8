"""Data of a `SpacetimeDiT`: its architecture, and the inputs of its blocks.

Axes: B batch, C channels, L tokens, D width, S text tokens, G runs of tokens that share a time,
U unique times, F latent frames, N tokens of one of them, H heads, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vidgen.ops.latents import check_positive
from vidgen.ops.norm import TokenVectors
from vidgen.ops.parallel import Spread


@dataclass(frozen=True)
class AudioConfig:
    """Audio modality of a DiT; `ffn_dim` is the hidden width of the blocks' audio feed-forward."""

    channels: int
    ffn_dim: int
    tokens_per_s: float


@dataclass(frozen=True)
class DiTConfig:
    """Architecture of a `SpacetimeDiT`.

    Args:
        in_channels: C of the input; more than `out_channels` if it includes a condition.
        out_channels: C of the velocity.
        head_dim: width of an attention head, even and at least 6.
        text_dim: width of the text encoder's output.
        text_len: tokens to which Wan pads texts, with zero rows that take part in attention.
        patch_size: rows and columns of latents in a token.
        freq_dim: sinusoids of the time embedding.
        eps: epsilon of all norms.
        image_dim: width of CLIP features (Wan 2.1 I2V), or None.
        image_positions: learned positions of CLIP features (FLF2V: 514), or None.
        control_layers: indices of the blocks to whose output a control block's is added (VACE), in
            rising order from 0.
        control_channels: C of the control, or None without `control_layers`.

    Raises:
        ValueError: invalid or inconsistent values.
    """

    in_channels: int
    out_channels: int
    num_heads: int
    head_dim: int
    num_layers: int
    ffn_dim: int
    text_dim: int
    text_len: int = 512
    patch_size: int = 2
    freq_dim: int = 256
    eps: float = 1e-6
    image_dim: int | None = None
    image_positions: int | None = None
    audio: AudioConfig | None = None
    control_layers: tuple[int, ...] = ()
    control_channels: int | None = None

    def __post_init__(self) -> None:
        check_positive(self, "in_channels", "out_channels", "num_heads", "num_layers", "ffn_dim",
                       "text_dim", "text_len", "patch_size")
        if self.head_dim < 6 or self.head_dim % 2:
            raise ValueError(f"head_dim must be even and at least 6, not {self.head_dim}")
        if self.freq_dim < 2 or self.freq_dim % 2:
            raise ValueError(f"freq_dim must be even and at least 2, not {self.freq_dim}")
        layers = self.control_layers
        if bool(layers) != bool(self.control_channels):
            raise ValueError(
                f"control_layers {layers} and control_channels {self.control_channels} "
                "must be given together"
            )
        if layers and (list(layers) != sorted({0, *layers}) or layers[-1] >= self.num_layers):
            raise ValueError(
                f"control_layers must rise from 0 to at most {self.num_layers - 1}, not {layers}"
            )
        if layers and self.audio is not None:
            raise ValueError("control can't be combined with audio; omit audio or control_layers")

    @property
    def hidden_dim(self) -> int:
        """Width D of a token."""
        return self.num_heads * self.head_dim


@dataclass(frozen=True)
class AudioTokens:
    """Noisy or known sound that joins the video's tokens.

    Attributes:
        latents: [B, C, N].
        timestep: [B], or [B, N] with 0 for known tokens; in 0..1000.
        frames_per_s: latent frames of the video per second (fps / stride_t), to place audio tokens
            on the video's time axis.
        start_s: start of the first audio token, in seconds after the video's first frame.
        sees_video: True if audio tokens attend to video tokens.
        is_seen: True if video tokens attend to audio tokens.
    """

    latents: Tensor
    timestep: Tensor
    frames_per_s: float
    start_s: float = 0.0
    sees_video: bool = True
    is_seen: bool = True


@dataclass(frozen=True)
class TimeVectors:
    """Embedded timesteps of one stream's tokens.

    Attributes:
        head: [B, G, D] float32, for the output norm; with `index` [U, D].
        block: [B, G, 6, D] float32, for the blocks' norms and gates; with `index` [U, 6, D].
        index: [B, L] int32, each token's row, if times differ within a latent frame; else None.
    """

    head: Tensor
    block: Tensor
    index: Tensor | None

    def modulate(self, table: Tensor, rows: Tensor) -> list[TokenVectors]:
        """Add a learned table [1, k, D] to `rows` [..., k, D]; return each token's k vectors."""
        return [TokenVectors(part, self.index) for part in (table.float() + rows).unbind(-2)]

    def of_rank(self, spread: Spread, run: int) -> TimeVectors:
        """Return the vectors of a run's tokens that this rank computes, indexed by token."""
        if self.index is not None:
            return TimeVectors(self.head, self.block, spread.split(self.index))
        batch, groups = self.head.shape[:2]
        if groups == 1:
            return self
        length = spread.lengths[run]
        token = torch.arange(length, device=self.head.device) // (length // groups)
        sample = torch.arange(batch, device=token.device)[:, None] * groups
        return TimeVectors(self.head.flatten(0, 1), self.block.flatten(0, 1),
                           spread.split(sample + token).int())


class Stream(NamedTuple):
    """Tokens [B, L, D] of one modality, and their embedded timesteps."""

    tokens: Tensor
    time: TimeVectors
    is_sound: bool = False


class Context(NamedTuple):
    """Cross-attention's input: text [B, S, D], its bias [B, 1, 1, S], image tokens [B, _, D]."""

    text: Tensor
    bias: Tensor | None
    image: Tensor | None


class Layout(NamedTuple):
    """Layout of the tokens in self-attention, and the bias of their scores.

    With `spread` the tokens are distributed over several ranks, which communicate in self-attention
    only. The last `num_alone` tokens attend only to each other; no other token attends to the last
    `num_unseen`.
    """

    bias: Tensor | None
    spread: Spread | None = None
    num_alone: int = 0
    num_unseen: int = 0

    def own(self, x: Tensor) -> Tensor:
        """Return this rank's share [B, l, ...] of a run of tokens [B, L, ...]."""
        return x if self.spread is None else self.spread.split(x)

    def whole(self, x: Tensor, run: int) -> Tensor:
        """Gather a run's tokens [B, L, ...] from the ranks' shares [B, l, ...]."""
        return x if self.spread is None else self.spread.gather(x, run)


class KVCache:
    """Keys and values of one pass over a video, for sound that attends to it; see `listen`."""

    def __init__(self) -> None:
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def is_empty(self) -> bool:
        """True if no pass was recorded."""
        return not self._layers

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Prepend a layer's recorded tokens to k, v [B, H, L, d]; if it has none, record these.

        If fewer than B clips are recorded, each is used for equally many consecutive clips.
        """
        old_k, old_v = self._layers.setdefault(layer, (k, v))
        return (k, v) if old_k is k else (_prepend(old_k, k), _prepend(old_v, v))


def _prepend(old: Tensor, new: Tensor) -> Tensor:
    """Prepend tokens [b, H, M, d] to [B, H, L, d], each to B / b consecutive clips."""
    groups = new.unflatten(0, (len(old), -1))
    shared = old[:, None].expand(-1, groups.shape[1], -1, -1, -1)
    return torch.cat([shared, groups], dim=3).flatten(0, 1)
