"""Data of a `SpacetimeDiT`: its architecture, and the inputs of its blocks.

Axes: B batch, C channels, L tokens, D width, S text tokens, G runs of tokens that share a time,
U unique times, F latent frames, N tokens of one of them, H heads, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from vidgen.ops.latents import check_positive
from vidgen.ops.norm import TokenVectors
from vidgen.ops.parallel import Spread

Pattern = Literal["full", "causal"]


@dataclass(frozen=True)
class AudioConfig:
    """The audio modality of a DiT; `ffn_dim` is the width of each block's audio feed-forward."""

    channels: int
    ffn_dim: int
    tokens_per_s: float


@dataclass(frozen=True)
class DiTConfig:
    """Architecture of a `SpacetimeDiT`.

    Args:
        in_channels: C of the input; more than `out_channels` where a condition is stacked on it.
        out_channels: C of the velocity.
        head_dim: width of a head, even and at least 6.
        text_dim: width of the text encoder's output.
        text_len: text tokens that Wan pads to, with zero rows that attention sees.
        patch_size: rows and columns of latents in a token.
        freq_dim: sinusoids of the time embedding.
        eps: of all norms.
        image_dim: width of CLIP features (Wan 2.1 I2V), or None.
        image_positions: learned positions of CLIP features (FLF2V: 514), or None.
        pattern: of self-attention: among all tokens ("full"), or to no later frame ("causal").
        causal_frames: latent frames that see each other in the causal pattern.
        control_layers: blocks whose output a control block adds to (VACE), rising from 0.
        control_channels: C of the control, or None without `control_layers`.

    Raises:
        ValueError: values that no network can have.
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
    pattern: Pattern = "full"
    causal_frames: int = 1
    audio: AudioConfig | None = None
    control_layers: tuple[int, ...] = ()
    control_channels: int | None = None

    def __post_init__(self) -> None:
        check_positive(self, "in_channels", "out_channels", "num_heads", "num_layers", "ffn_dim",
                       "text_dim", "text_len", "patch_size", "causal_frames")
        if self.head_dim < 6 or self.head_dim % 2:
            raise ValueError(f"head_dim must be even and at least 6, not {self.head_dim}")
        if self.freq_dim < 2 or self.freq_dim % 2:
            raise ValueError(f"freq_dim must be even and at least 2, not {self.freq_dim}")
        if self.pattern not in get_args(Pattern):
            raise ValueError(f"pattern must be one of {get_args(Pattern)}, not {self.pattern!r}")
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
        if layers and (self.pattern != "full" or self.audio is not None):
            raise ValueError("control needs the pattern 'full' and no audio")

    @property
    def hidden_dim(self) -> int:
        """Width D of a token."""
        return self.num_heads * self.head_dim


@dataclass(frozen=True)
class AudioTokens:
    """Sound that is denoised, or known, together with the video.

    Attributes:
        latents: [B, C, N].
        timestep: [B], or [B, N] where some tokens are known and have 0; in 0..1000.
        frames_per_s: latent frames of the video a second (fps / stride_t), which place audio tokens
            on the video's time axis.
        start_s: start of the first audio token, in seconds after the video's first frame.
        sees_video: whether audio tokens attend to those of the video.
        is_seen: whether video tokens attend to those of audio.
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
        head: [B, G, D] float32, for the output norm; [U, D] with `index`.
        block: [B, G, 6, D] float32, for the blocks' norms and gates; [U, 6, D] with `index`.
        index: [B, L] int32, each token's row, where times differ within a latent frame; else None.
    """

    head: Tensor
    block: Tensor
    index: Tensor | None

    def modulate(self, table: Tensor, rows: Tensor) -> list[TokenVectors]:
        """Add a table [1, k, D] to `rows` [..., k, D]; return the k vectors of each token."""
        return [TokenVectors(part, self.index) for part in (table.float() + rows).unbind(-2)]

    def of_rank(self, spread: Spread, run: int) -> TimeVectors:
        """Return the vectors of a run's tokens on this rank, each with its own row."""
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
    """Tokens [B, L, D] of one modality and their time vectors."""

    tokens: Tensor
    time: TimeVectors
    is_sound: bool = False


class Context(NamedTuple):
    """Input of cross-attention: text [B, S, D], its bias [B, 1, 1, S], image tokens [B, _, D]."""

    text: Tensor
    bias: Tensor | None
    image: Tensor | None


class Layout(NamedTuple):
    """Layout of the tokens in self-attention, and the bias to add.

    With `spread` they lie over several ranks, which exchange in self-attention only. The last
    `num_alone` tokens see only each other; the last `num_unseen` are seen by no others.
    """

    bias: Tensor | None
    spread: Spread | None = None
    num_alone: int = 0
    num_unseen: int = 0

    def own(self, x: Tensor) -> Tensor:
        """Return this rank's stretch [B, l, ...] of a run of tokens [B, L, ...]."""
        return x if self.spread is None else self.spread.split(x)

    def whole(self, x: Tensor, run: int) -> Tensor:
        """Join a run's tokens [B, L, ...] of the ranks' stretches [B, l, ...]."""
        return x if self.spread is None else self.spread.gather(x, run)


class KVCache:
    """Keys and values of earlier frames, for rolling out a causal model turn by turn.

    A forward pass sees the cached frames before its own, and adds its own while `recording`:
    denoise frames with `recording = False`, then pass the finished ones once with True. Gradients
    reach recorded frames. A first pass can also be recorded for sound that sees its frames: see
    `SpacetimeDiT.listen`.
    """

    def __init__(self) -> None:
        self.recording = True
        self.num_frames = 0
        self.num_held = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def advance(self, num_frames: int, num_stills: int) -> None:
        """Count the frames and stills of a recording pass."""
        if self.recording:
            self.num_frames += num_frames
            self.num_held += num_frames + num_stills

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Prepend a layer's cached tokens to k, v [B, H, L, d]; keep the result if recording.

        Where fewer clips are cached, each serves an equal number of consecutive ones.
        """
        if layer in self._layers:
            old_k, old_v = self._layers[layer]
            k, v = _prepend(old_k, k), _prepend(old_v, v)
        if self.recording:
            self._layers[layer] = (k, v)
        return k, v

    def forget(self, num_frames: int) -> None:
        """Keep the newest `num_frames` frames; positions of later ones don't change."""
        if self.num_held <= num_frames:
            return
        for layer, (k, v) in self._layers.items():
            count = k.shape[2] // self.num_held * num_frames
            self._layers[layer] = k[:, :, -count:], v[:, :, -count:]
        self.num_held = num_frames


def _prepend(old: Tensor, new: Tensor) -> Tensor:
    """Prepend tokens [b, H, M, d] to [B, H, L, d], of B / b consecutive clips each."""
    turns = new.unflatten(0, (len(old), -1))
    shared = old[:, None].expand(-1, turns.shape[1], -1, -1, -1)
    return torch.cat([shared, turns], dim=3).flatten(0, 1)
