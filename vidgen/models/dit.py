"""A spacetime diffusion transformer: one class for Wan 2.1 and 2.2 (1.3B to 14B) and for toybox.

Each patch of latents is a token with rotary positions in time, rows and columns. Blocks of
self-attention, cross-attention to text and feed-forward, modulated by each token's timestep, map
noisy tokens to velocities. Stills and sound are additional tokens of the same sequence.

Axes: B batch, C channels, F latent frames, K stills, h w latent rows and columns, S text tokens,
N audio tokens, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vidgen.core.errors import InputError
from vidgen.core.protocols import KeyTokens, StepCache
from vidgen.models.dit_blocks import (
    Block,
    ControlBlock,
    FeedForward,
    Head,
    ImageEmbedding,
    PatchEmbedding,
    TimeEmbedding,
    compute_dtype,
)
from vidgen.models.dit_inputs import (
    check_control,
    check_inputs,
    collapse_padding,
    embed_times,
    join_tokens,
    lay_out,
    runs_of_time,
    spread_tokens,
    with_tokens,
)
from vidgen.models.dit_types import (
    AudioConfig,
    AudioTokens,
    Context,
    DiTConfig,
    KVCache,
    Layout,
    Stream,
)
from vidgen.ops.latents import patchify_latents, unpatchify_latents
from vidgen.ops.parallel import Ranks
from vidgen.ops.rope import rope_table, sound_rope_table


class AudioVideo(NamedTuple):
    """Velocities of video [B, C, F, h, w] and audio [B, C, N]."""

    video: Tensor
    audio: Tensor


class SpacetimeDiT(nn.Module):
    """Transformer that predicts `velocity = noise - clean`; a new one has uninitialised weights."""

    fp32_weights = ("modulation", "time_embed", "norm")
    """Name parts of the parameters that stay float32 when the others are cast."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        width, audio = config.hidden_dim, config.audio
        self.patch_embed = PatchEmbedding(config.in_channels, width, config.patch_size)
        self.time_embed = TimeEmbedding(config.freq_dim, width)
        self.text_embed = FeedForward(config.text_dim, width, width)
        if config.image_dim is not None:
            self.image_embed = ImageEmbedding(config.image_dim, width, config.image_positions)
        if audio is not None:
            self.audio_embed = nn.Linear(audio.channels, width)
        self.blocks = nn.ModuleList(
            Block(
                width, config.num_heads, config.ffn_dim, config.eps,
                image=config.image_dim is not None,
                audio_ffn_dim=None if audio is None else audio.ffn_dim,
            )
            for _ in range(config.num_layers)
        )
        self.control_blocks = nn.ModuleList(
            ControlBlock(
                width, config.num_heads, config.ffn_dim, config.eps,
                image=config.image_dim is not None, first=i == 0,
            )
            for i in range(len(config.control_layers))
        )
        if config.control_channels is not None:
            self.control_embed = PatchEmbedding(config.control_channels, width, config.patch_size)
        self.head = Head(
            width, config.out_channels * config.patch_size**2,
            None if audio is None else audio.channels, config.eps,
        )
        self.gradient_checkpointing = False

    def forward(  # noqa: PLR0913
        self,
        latents: Tensor,
        timestep: Tensor,
        context: Tensor,
        *,
        context_lengths: Sequence[int] | Tensor | None = None,
        image_context: Tensor | None = None,
        extra: KeyTokens | None = None,
        positions: Tensor | None = None,
        audio: AudioTokens | None = None,
        cache: KVCache | None = None,
        control: Tensor | None = None,
        control_scale: float = 1.0,
        step_cache: StepCache | None = None,
        ranks: Ranks | None = None,
    ) -> Tensor | AudioVideo:
        """Predict the velocity of noisy latents.

        Args:
            latents: [B, C, F, h, w] with h and w multiples of the patch size.
            timestep: 1000 * sigma, as [B], [B, F], or [B, F, h/p, w/p] where times differ within
                a frame; 0 for known tokens.
            context: text features [B, S, text_dim].
            context_lengths: valid rows of each text; the other rows up to `text_len` count as the
                zero rows with which Wan pads. None: all S rows are valid.
            image_context: CLIP features [B, _, image_dim], for models with `image_dim`.
            extra: known stills that all frames attend to; the output doesn't contain them.
            positions: [F] or [B, F] time positions of the frames; None: 0, 1, ...
            audio: sound to denoise together with the video, for models with the audio modality.
            cache: an empty cache that records this pass for `listen`.
            control: [B, control_channels, F, h, w], for models with `control_layers`; None: the
                control blocks don't run.
            control_scale: factor of the control blocks' output.
            step_cache: may skip blocks at this step; can't be combined with `cache`.
            ranks: processes that make this call together with equal arguments, each for its share
                of the tokens. A step cache must make the same decision on all of them.

        Returns:
            Velocity [B, out_channels, F, h, w] in the latents' dtype; with `audio`, an
            `AudioVideo`.

        Raises:
            InputError: shapes or options that this model doesn't support.
        """
        check_inputs(
            self.config, latents, timestep, image_context, extra, audio, cache, step_cache
        )
        if control is not None:
            check_control(self.config, latents, extra, control)
        F_, (h, w) = latents.shape[2], (s // self.config.patch_size for s in latents.shape[3:])
        streams, rope = self._embed(latents, timestep, extra, positions, audio, h, w)
        layout = lay_out(F_, extra, audio, h * w)
        streams, rope, layout = spread_tokens(streams, rope, layout, ranks)
        text = self._context(context, context_lengths, image_context)
        hints = self._hints(control, streams[0], rope, layout, text)
        entered = [] if step_cache is None else streams
        known: Tensor | None = None
        for i, block in enumerate(self.blocks):
            if step_cache is not None and i == step_cache.lead:
                known = step_cache.recall(join_tokens(entered), join_tokens(streams))
                if known is not None:
                    streams = with_tokens(streams, known)
                    break
            streams = self._run(block, streams, rope, layout, text, cache, i)
            if control is not None and i in self.config.control_layers:
                [video] = streams
                hint = next(hints).to(video.tokens.dtype)
                streams = [video._replace(tokens=video.tokens.add(hint, alpha=control_scale))]
        if step_cache is not None and known is None:
            step_cache.keep(join_tokens(streams))
        with torch.autocast(latents.device.type, enabled=False):
            patches = layout.whole(self.head(streams[0], self.head.proj), 0)[:, : F_ * h * w]
            video = unpatchify_latents(patches, self.config.patch_size, h, w).to(latents.dtype)
            if audio is None:
                return video
            sound = layout.whole(self.head(streams[1], self.head.audio_proj), 1).transpose(1, 2)
        return AudioVideo(video, sound.to(audio.latents.dtype))

    def listen(
        self, audio: AudioTokens, context: Tensor, *,
        context_lengths: Sequence[int] | Tensor | None = None, cache: KVCache | None = None,
    ) -> Tensor:
        """Predict the velocity [B, C, N] of sound, alone or for video that doesn't attend to it.

        The result equals `forward`'s for the same video with `audio.is_seen` False. The video's
        tokens don't depend on the sound then, so one pass of `forward` records them in `cache` for
        any number of sounds; None: the sound attends only to itself. Sounds of the same video are
        consecutive in the batch. The context is as in `forward`.

        Raises:
            InputError: a model without the audio modality.
        """
        if self.config.audio is None:
            raise InputError("audio was given to a model without the audio modality")
        stream, rope = self._embed_sound(audio, self.config.audio)
        streams, layout = [stream], Layout(None)
        text = self._context(context, context_lengths, None)
        for i, block in enumerate(self.blocks):
            streams = self._run(block, streams, rope, layout, text, cache, i)
        with torch.autocast(context.device.type, enabled=False):
            sound: Tensor = self.head(streams[0], self.head.audio_proj).transpose(1, 2)
        return sound.to(audio.latents.dtype)

    def _hints(
        self, control: Tensor | None, video: Stream, rope: Tensor, layout: Layout, text: Context
    ) -> Iterator[Tensor]:
        """Yield each control block's output [B, L, D], which is added to the video's tokens."""
        if control is None:
            return
        with torch.autocast(control.device.type, enabled=False):
            patches = patchify_latents(control, self.config.patch_size)
            tokens = layout.own(self.control_embed(patches))
        for block in self.control_blocks:
            hint, tokens = self._run(block, tokens, video, rope, layout, text)
            yield hint

    def _run(self, block: nn.Module, *args: Any) -> Any:
        """Call a block; with `gradient_checkpointing`, recompute it in the backward pass."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    def _embed(
        self, latents: Tensor, timestep: Tensor, extra: KeyTokens | None, positions: Tensor | None,
        audio: AudioTokens | None, h: int, w: int,
    ) -> tuple[list[Stream], Tensor]:
        """Return each modality's stream, and the rotations [B or 1, L, d/2] of all tokens."""
        batch, _, frames = latents.shape[:3]
        if positions is None:
            positions = torch.arange(frames, device=latents.device)
        positions = positions.double().reshape(-1, frames)
        stills = 0 if extra is None else extra.num_keys
        if extra is not None:
            latents = torch.cat([latents, extra.latents.to(latents.dtype)], dim=2)
            known = extra.positions.double().reshape(-1, stills)
            positions = torch.cat([positions.expand(batch, -1), known.expand(batch, -1)], dim=1)
        rope = rope_table(positions, h, w, self.config.head_dim)
        times = runs_of_time(timestep, frames, stills)
        with torch.autocast(latents.device.type, enabled=False):
            tokens = self.patch_embed(patchify_latents(latents, self.config.patch_size))
            streams = [Stream(tokens, embed_times(self.time_embed, times, frames + stills))]
        if audio is None or self.config.audio is None:
            return streams, rope
        sound, clock = self._embed_sound(audio, self.config.audio)
        rope = torch.cat([rope, clock.expand(rope.shape[0], -1, -1)], dim=1)
        return [*streams, sound], rope

    def _embed_sound(self, audio: AudioTokens, config: AudioConfig) -> tuple[Stream, Tensor]:
        """Return the sound's stream, and the rotations [1, N, d/2] of its tokens."""
        latents = audio.latents.transpose(1, 2)
        with torch.autocast(latents.device.type, enabled=False):
            tokens = self.audio_embed(latents.to(self.audio_embed.weight.dtype))
        times = audio.timestep.float().reshape(len(latents), -1)
        stream = Stream(tokens, embed_times(self.time_embed, times, tokens.shape[1]), is_sound=True)
        centres = torch.arange(tokens.shape[1], device=latents.device).double() + 0.5
        frames_at = (audio.start_s + centres / config.tokens_per_s) * audio.frames_per_s
        return stream, sound_rope_table(frames_at, centres, self.config.head_dim)

    def _context(
        self, context: Tensor, lengths: Sequence[int] | Tensor | None, image: Tensor | None
    ) -> Context:
        bias = None
        if lengths is not None:
            context, bias = collapse_padding(context, lengths, self.config.text_len)
        text = self.text_embed(context.to(compute_dtype(self.text_embed.up)))
        return Context(text, bias, None if image is None else self.image_embed(image))
