"""Check the inputs of a `SpacetimeDiT`, and prepare times, layout and text for its blocks.

Axes: B batch, C channels, L tokens, D width, S text tokens, G runs of tokens that share a time,
F latent frames, K stills, h w latent rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from vidgen.core.errors import InputError
from vidgen.core.protocols import KeyTokens, StepCache
from vidgen.models.dit_types import AudioTokens, DiTConfig, KVCache, Layout, Stream, TimeVectors
from vidgen.ops.parallel import Ranks, Spread


def join_tokens(streams: Sequence[Stream]) -> Tensor:
    """Concatenate the tokens of all streams to [B, L, D]."""
    if len(streams) == 1:
        return streams[0].tokens
    return torch.cat([stream.tokens for stream in streams], dim=1)


def with_tokens(streams: Sequence[Stream], tokens: Tensor) -> list[Stream]:
    """Replace the tokens of all streams by `tokens` [B, L, D]; the inverse of `join_tokens`."""
    parts = tokens.split([stream.tokens.shape[1] for stream in streams], dim=1)
    return [stream._replace(tokens=part) for stream, part in zip(streams, parts, strict=True)]


def check_inputs(
    config: DiTConfig, latents: Tensor, timestep: Tensor, image_context: Tensor | None,
    extra: KeyTokens | None, audio: AudioTokens | None, cache: KVCache | None,
    step_cache: StepCache | None,
) -> None:
    """Raise InputError for shapes or options that the model doesn't support."""
    p = config.patch_size
    batch, channels, frames, h, w = latents.shape
    if channels != config.in_channels:
        raise InputError(f"latents have {channels} channels, not {config.in_channels}")
    if h % p or w % p:
        raise InputError(f"latents of {h}x{w} can't be divided into patches of {p}x{p}")
    allowed = [(batch,), (batch, frames), (batch, frames, h // p, w // p)]
    if tuple(timestep.shape) not in allowed:
        raise InputError(f"timestep has shape {tuple(timestep.shape)}, not one of {allowed}")
    if (image_context is None) != (config.image_dim is None):
        raise InputError(
            "this model needs image_context"
            if config.image_dim
            else "image_context was given to a model without image_dim"
        )
    rows = None if image_context is None else image_context.shape[1]
    if config.image_positions not in (None, rows):
        raise InputError(
            f"image_context has {rows} rows; this model takes {config.image_positions}: the first "
            "picture's, then the last picture's"
        )
    if audio is not None and config.audio is None:
        raise InputError("audio was given to a model without the audio modality")
    if cache is None:
        return
    if config.audio is None or not cache.is_empty:
        raise InputError("a KVCache records one pass for sound that attends to the video; pass an "
                         "empty one, to a model with the audio modality")
    if step_cache is not None:
        raise InputError("a step cache skips blocks, whose keys and values a KVCache needs; pass "
                         "only one of them")
    if extra is not None and extra.valid is not None:
        raise InputError("a KVCache can't record stills of which some are not valid; pass "
                         "extra.valid=None")


def runs_of_time(times: Tensor, num_frames: int, num_stills: int) -> Tensor:
    """Reduce timesteps [B], [B, F] or [B, F, h, w] to the fewest runs of equal length and time.

    K stills are appended at time 0. Return [B, G] with G = 1, F + K, or the number of tokens.
    """
    times = times.float()
    if times.ndim == 4:
        times = times.flatten(2)
        whole_frames = bool((times == times[..., :1]).all())
        times = times[..., 0] if whole_frames else times.flatten(1)
    if times.ndim == 1:
        times = times[:, None]
    if not num_stills:
        same = times.shape[1] == 1 or bool((times == times[:, :1]).all())
        return times[:, :1] if same else times
    if times.shape[1] == 1:
        times = times.expand(-1, num_frames)
    return F.pad(times, (0, num_stills * (times.shape[1] // num_frames)))


def embed_times(
    embed: Callable[[Tensor], tuple[Tensor, Tensor]], times: Tensor, max_runs: int
) -> TimeVectors:
    """Embed times [B, G], each distinct value once; above `max_runs` runs, rows have an index."""
    if times.shape[1] == 1:
        return TimeVectors(*embed(times), None)
    values, index = times.unique(return_inverse=True)
    head, block = embed(values)
    if times.shape[1] > max_runs:
        return TimeVectors(head, block, index.int())
    return TimeVectors(head[index], block[index], None)


def lay_out(
    num_frames: int, extra: KeyTokens | None, audio: AudioTokens | None, frame_tokens: int
) -> Layout:
    """Return the layout of tokens, with a bias that masks stills that aren't valid."""
    sound = 0 if audio is None else audio.latents.shape[2]
    alone = 0 if audio is None or audio.sees_video else sound
    unseen = 0 if audio is None or audio.is_seen else sound
    layout = Layout(None, num_alone=alone, num_unseen=unseen)
    if extra is None or extra.valid is None:
        return layout
    visible = F.pad(extra.valid, (num_frames, 0), value=True)
    bias = torch.zeros(visible.shape, device=visible.device).masked_fill_(~visible, -math.inf)
    bias = bias.repeat_interleave(frame_tokens, dim=1)
    return layout._replace(bias=F.pad(bias, (0, sound))[:, None, None])


def spread_tokens(
    streams: Sequence[Stream], rope: Tensor, layout: Layout, ranks: Ranks | None
) -> tuple[list[Stream], Tensor, Layout]:
    """Return this rank's share of all streams and rotations, and the layout for them."""
    if ranks is None:
        return [*streams], rope, layout
    spread = Spread(ranks, [stream.tokens.shape[1] for stream in streams])
    own = [
        stream._replace(
            tokens=spread.split(stream.tokens), time=stream.time.of_rank(spread, run)
        )
        for run, stream in enumerate(streams)
    ]
    return own, spread.split_runs(rope), layout._replace(spread=spread)


def collapse_padding(
    context: Tensor, lengths: Sequence[int] | Tensor, text_len: int
) -> tuple[Tensor, Tensor]:
    """Replace the zero rows with which Wan pads text [B, S, text_dim] to `text_len` by one row.

    n equal keys have the same effect in the softmax as one with log n added to its score.

    Args:
        lengths: valid rows of each text.

    Returns:
        Text [B, longest + 1, text_dim] and the bias of its keys [B, 1, 1, longest + 1].

    Raises:
        InputError: lengths that don't match the context or exceed `text_len`.
    """
    count = torch.as_tensor(lengths, device="cpu")
    batch, rows, text_dim = context.shape
    limit = min(rows, text_len)
    if count.shape != (batch,) or count.min() < 0 or count.max() > limit:
        raise InputError(
            f"context_lengths {count.tolist()} must be {batch} values in 0..{limit} "
            f"for context of {rows} rows and a text_len of {text_len}"
        )
    longest = int(count.max())
    text = torch.cat([context[:, :longest], context.new_zeros(batch, 1, text_dim)], dim=1)
    hidden = torch.arange(longest) >= count[:, None]
    bias = torch.zeros(batch, longest).masked_fill_(hidden, -math.inf)
    bias = torch.cat([bias, (text_len - count)[:, None].float().log()], dim=1)
    return text, bias.to(context.device)[:, None, None]


def check_control(
    config: DiTConfig, latents: Tensor, extra: KeyTokens | None, control: Tensor
) -> None:
    """Raise InputError for a control input that the model doesn't support."""
    if not config.control_layers:
        raise InputError("control was given to a model without control_layers")
    if extra is not None:
        raise InputError(
            "stills can't be combined with control; put them before the frames of latents and "
            "control instead"
        )
    batch, _, *size = latents.shape
    expected = (batch, config.control_channels, *size)
    if tuple(control.shape) != expected:
        raise InputError(f"control has shape {tuple(control.shape)}, not {expected}")
