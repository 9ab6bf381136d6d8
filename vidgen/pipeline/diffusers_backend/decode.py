"""Deferred decoding of a diffusers pipeline's latents: later, in temporal tiles, by its own VAE.

Each family normalises, unpacks and even noises its latents in its own way before decoding. So its
pipeline does that, and only the decoding itself is deferred.

Axes: B batch, C latent channels, F latent frames, h w latent rows and columns, N pictures, T
frames, H W pixel rows and columns.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

TILE = 64
"""Frames of a temporal tile if the VAE has none of its own."""
OVERLAP = 24
"""Frames over which two tiles are blended."""
_BASE = 16
"""Of a frame's number: few enough levels that neither bfloat16 nor bytes blur them."""


@dataclass(frozen=True)
class Decode:
    """A deferred decoding: arguments of the VAE."""

    latents: Tensor  # [B, C, F, h, w] or pictures [N, C, h, w], on the CPU
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def is_video(self) -> bool:
        """True if time is an axis of the latents, not of the batch."""
        return self.latents.ndim == 5


@contextmanager
def decoding_put_off(vae: nn.Module, length: Callable[[Tensor], int]) -> Iterator[list[Decode]]:
    """Make `vae.decode` within the block record its arguments and return numbered frames.

    `length` returns the number of frames of latents [B, C, F, h, w].
    """
    noted: list[Decode] = []
    count = 0

    def decode(latents: Tensor, *arguments: Any, return_dict: bool = True, **options: Any) -> Any:
        from diffusers.models.autoencoders.vae import DecoderOutput

        nonlocal count
        given = latents.cpu().clone(memory_format=torch.contiguous_format)  # as from a journal
        noted.append(Decode(given, arguments, options))
        num_frames = length(latents) if latents.ndim == 5 else len(latents)
        frames = _numbered(count, num_frames).to(latents.device)
        count += num_frames
        video = frames.transpose(0, 1)[None] if latents.ndim == 5 else frames
        return DecoderOutput(sample=video) if return_dict else (video,)

    vae.decode = decode  # type: ignore[assignment]
    try:
        yield noted
    finally:
        del vae.decode


def shown_frames(frames: Any) -> range | None:
    """Return the numbers of the frames shown, from [T, 8, 8, 3] in [0, 1]; None if changed."""
    digits = np.floor(np.asarray(frames, dtype=np.float64).mean(axis=(1, 2)) * _BASE)
    numbers = digits @ _BASE ** np.arange(3)
    shown = range(int(numbers[0]), int(numbers[0]) + len(numbers))
    return shown if numbers.tolist() == list(shown) else None


def _numbered(first: int, count: int) -> Tensor:
    """Return frames [N, 3, 8, 8] in [-1, 1] whose channels are the digits of their number."""
    numbers = torch.arange(first, first + count)
    digits = torch.stack([numbers // _BASE**place % _BASE for place in range(3)], dim=1)
    return ((2 * digits + 1) / _BASE - 1)[:, :, None, None].expand(-1, -1, 8, 8).contiguous()


def decode_all(
    vae: Any, decodings: Sequence[Decode], device: torch.device, start: int, stop: int
) -> Iterator[Tensor]:
    """Yield frames `start` to `stop` of several decodings, parts [1, 3, t, H, W] in [-1, 1]."""
    first = 0  # number of the decoding's first frame
    for noted in decodings:
        if not noted.is_video and first + len(noted.latents) <= start:
            first += len(noted.latents)
            continue
        behind = max(start, first)
        for video in stream_decode(vae, noted, device, behind - first):
            yield video[:, :, : stop - behind]
            behind += video.shape[2]
            if behind >= stop:
                return
        first = behind


@torch.no_grad()
def stream_decode(
    vae: Any, noted: Decode, device: torch.device, start: int = 0
) -> Iterator[Tensor]:
    """Yield parts of the video, each [1, 3, t, H, W] in [-1, 1]; pictures in one part a decoding.

    Frames from `start` on equal those of the whole: without temporal tiles all of it is decoded.
    """

    def decode(latents: Tensor) -> Tensor:
        given = latents.to(device)
        video: Tensor = vae.decode(given, *noted.arguments, **noted.options, return_dict=False)[0]
        return video if noted.is_video else video.transpose(0, 1)[None]

    tiles = temporal_tiles(vae)
    if tiles is None or not noted.is_video or noted.latents.shape[2] <= tiles[0]:
        yield decode(noted.latents)[:, :, start:]
    else:
        yield from _stream_tiles(vae, decode, noted.latents, *tiles, start)


def temporal_tiles(vae: Any) -> tuple[int, int] | None:
    """Return latent frames of a tile, and from one tile to the next; None without tiles."""
    if not (hasattr(vae, "blend_t") and hasattr(vae, "tile_sample_stride_num_frames")):
        return None
    size, stride = TILE, TILE - OVERLAP
    if vae.use_framewise_decoding:
        size, stride = vae.tile_sample_min_num_frames, vae.tile_sample_stride_num_frames
    ratio = vae.temporal_compression_ratio
    return max(size // ratio, 1), max(stride // ratio, 1)


def prepare_vae(vae: Any) -> None:
    """Let a VAE that caches its convolutions' past decode slice by slice, in less memory."""
    if _carries_past(vae) and hasattr(vae, "use_framewise_decoding"):
        vae.use_framewise_decoding = True


def peak_bytes(vae: Any, num_frames: int, height: int, width: int) -> int | None:
    """Return about the bytes for decoding a clip, or None if the VAE's tiles or slices bound them.

    The widest layer at full resolution counts three times: its input, padded copy and output.
    """
    is_video = any(isinstance(module, nn.Conv3d) for module in vae.modules())
    if temporal_tiles(vae) is not None or _carries_past(vae) or not is_video:
        return None
    config = vae.config
    names = ("decoder_block_out_channels", "block_out_channels", "base_dim")
    told = next((config[name] for name in names if config.get(name)), 128)
    channels: int = told if isinstance(told, int) else min(told)
    size: int = next(vae.parameters()).element_size()
    patch: int = config.get("patch_size") or 1
    return 3 * channels * num_frames * height * width * size // patch**2


def _carries_past(vae: Any) -> bool:
    parameters = inspect.signature(vae.decoder.forward).parameters
    return "conv_cache" in parameters or "feat_cache" in parameters


def _stream_tiles(
    vae: Any, decode: Any, latents: Tensor, size: int, stride: int, start: int = 0
) -> Iterator[Tensor]:
    """Yield tiles blended over their overlap, as the VAE's own tiling does.

    A tile's first frame is decoded without its past, so all but the first tile start one latent
    frame early and drop it. Those that end before frame `start` are left out, except for the ones
    blended into its own.
    """
    ratio = vae.temporal_compression_ratio
    wanted = max(start - 1, 0) // (stride * ratio)
    first = max(wanted - math.ceil((size - stride) / stride), 0)
    tail, end = None, first * stride * ratio + (first > 0)
    for begin in range(first * stride, latents.shape[2] - 1, stride):
        own, vae.use_framewise_decoding = vae.use_framewise_decoding, False
        try:
            tile = decode(latents[:, :, begin : begin + size + 1])
        finally:
            vae.use_framewise_decoding = own
        if begin > 0:
            tile = tile[:, :, 1:]
        if tail is not None:
            shared = min(tail.shape[2], tile.shape[2])
            ramp = torch.arange(shared, device=tile.device)[:, None, None] / max(shared, 1)
            ramp = ramp.to(tile.dtype)
            blended = tail[:, :, :shared] * (1 - ramp) + tile[:, :, :shared] * ramp
            tile = torch.cat([blended, tile[:, :, shared:]], dim=2)
        kept = stride * ratio + (begin == 0)
        part, tail = tile[:, :, :kept], tile[:, :, kept:]
        end += part.shape[2]
        if end > start:
            yield part[:, :, -(end - start) :]
