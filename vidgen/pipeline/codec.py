"""Encode and decode a clip with the VAE: whole, in tiles or frame by frame.

Axes: B batch, C latent channels, F latent frames, h w latent rows and columns, T frames, H W pixel
rows and columns.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vidgen.core.runtime import write_error
from vidgen.core.shapes import Tiles
from vidgen.models.vae_tiles import decode_in_tiles, encode_in_tiles

if TYPE_CHECKING:
    from vidgen.media.types import Frames
    from vidgen.models.vae import CausalVAE
    from vidgen.pipeline.loader import ModelLoader

IN_MEMORY = 64_000_000
"""Buffers of more bytes than this are mapped from an unnamed temporary file."""
REFINE_RATE = 0.02
"""Learning rate of `refine_first`'s first step, in standard deviations of the latents."""
REFINE_BETAS = (0.9, 0.95)
BACK_SHARE = 0.5
"""Share of the difference that each pass adds; adding all of it makes fast motion worse."""


@torch.no_grad()
def encode_pixels(
    loader: ModelLoader, video: Tensor, tiles: Tiles | None = None, passes: int = 1, rate: int = 1,
) -> Tensor:
    """Encode video [B, 3, T, H, W] in [-1, 1] to normalised latents [B, C, F, h, w], float32.

    Each of `passes` after the first decodes the latents, encodes the result, and adds half of the
    difference (back-projection: Irani & Peleg 1991, eq. 3). `rate` is the factor of temporal
    upsampling; see `CausalVAE.at_rate`.
    """
    def encoded(video: Iterable[Tensor]) -> Tensor:
        frames = (vae.stream_encode(video) if tiles is None else
                  encode_in_tiles(vae, video, tiles, partial(room_for, num_rooms=tiles.count)))
        return torch.cat(list(frames), dim=2).float()

    with loader.use("vae") as network:
        vae = network.at_rate(rate)
        dtype = next(vae.parameters()).dtype
        latents = wanted = encoded([video.to(loader.device, dtype)])
        for _ in range(1, passes):
            shown = _decoded(vae, latents.to(dtype).split(1, dim=2), tiles)
            latents = latents + BACK_SHARE * (wanted - encoded(part.clamp(-1, 1) for part in shown))
        return latents


def _decoded(vae: CausalVAE, frames: Iterable[Tensor], tiles: Tiles | None) -> Iterator[Tensor]:
    if tiles is None:
        return vae.stream_decode(frames)
    return decode_in_tiles(vae, frames, tiles, partial(room_for, num_rooms=tiles.count))


@torch.no_grad()
def refine_first(loader: ModelLoader, picture: Tensor, latents: Tensor, num_steps: int) -> Tensor:
    """Optimise a first frame's latents through the decoder (Abdal et al. 2019, Alg. 1).

    Run `num_steps` of Adam with a decaying rate on latents [B, C, 1, h, w] of a picture
    [B, 3, 1, H, W] in [-1, 1]; return those of least error. The first latent frame is decoded
    independently of later ones, so the result holds for any clip.
    """
    with loader.use("vae") as vae:
        dtype, target = next(vae.parameters()).dtype, picture.to(latents)
        refined = best = latents
        least = torch.full((len(latents),), torch.inf, device=latents.device)
        mean, square = torch.zeros_like(latents), torch.zeros_like(latents)
        for step in range(num_steps + 1):
            tried = refined.detach().requires_grad_()
            with torch.enable_grad():
                errors = (vae.decode(tried.to(dtype)).float() - target).square().sum((1, 2, 3, 4))
            nearer = errors < least
            least = torch.where(nearer, errors, least)
            best = torch.where(nearer.view(-1, 1, 1, 1, 1), refined, best)
            if step == num_steps:
                break
            (gradient,) = torch.autograd.grad(errors, [tried], torch.ones_like(errors))
            # Kingma & Ba 2015, Alg. 1; torch.optim takes two seconds to be imported
            mean.lerp_(gradient, 1 - REFINE_BETAS[0])
            square.lerp_(gradient.square(), 1 - REFINE_BETAS[1])
            first, second = (kept / (1 - beta ** (step + 1))
                             for kept, beta in zip((mean, square), REFINE_BETAS, strict=True))
            rate = REFINE_RATE * (1 - step / num_steps)
            refined = refined - rate * first / (second.sqrt() + 1e-8)
        return best


@torch.no_grad()
def decode_latents(
    loader: ModelLoader, latents: Tensor, begin: int = 0, end: int | None = None,
    tiles: Tiles | None = None, rate: int = 1,
) -> Iterator[Tensor]:
    """Decode latents [B, C, F, h, w] from frame `begin` to `end`; yield [B, 3, n, H, W] of each."""
    with loader.use("vae") as network:
        vae = network.at_rate(rate)
        dtype = next(vae.parameters()).dtype
        # start earlier by the decoder's receptive field, so that frames are equal to the bit
        first = max(0, begin - vae.receptive_frames() + 1)
        frames = latents[:, :, first:end].split(1, dim=2)
        pieces = (frame.to(loader.device, dtype) for frame in frames)
        for index, video in enumerate(_decoded(vae, pieces, tiles), first):
            if index >= begin:
                yield video


def from_frame(videos: Iterable[Tensor], start: int, stride_t: int) -> Iterator[Tensor]:
    """Drop frames before `start` from videos [B, 3, n, H, W] of successive latent frames.

    The first video is of the latent frame that holds `start`. Each latent frame has `stride_t`
    frames, the clip's first one has 1.
    """
    for index, video in enumerate(videos, latent_of(start, stride_t)):
        before = 1 + (index - 1) * stride_t if index else 0
        yield video[:, :, max(0, start - before) :]


def latent_of(frame: int, stride_t: int) -> int:
    """Return the index of the latent frame that holds a frame."""
    return -(-frame // stride_t)


def as_video(frames: Frames) -> Tensor:
    """Convert frames uint8 [T, H, W, 3] to video [1, 3, T, H, W] in [-1, 1]."""
    return torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1


def first_frames(videos: Iterable[Tensor], count: int) -> Iterator[Frames]:
    """Yield the first `count` frames of videos [1, 3, n, H, W] as uint8 [t, H, W, 3]."""
    if count <= 0:
        return
    for video in videos:
        frames: Frames = to_frames(video[0])[:count].numpy()
        count -= len(frames)
        if len(frames):
            yield frames
        if count <= 0:
            return


def to_frames(video: Tensor) -> Tensor:
    """Convert [3, T, H, W] in [-1, 1] to uint8 [T, H, W, 3] on the CPU."""
    scaled = (video.float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().to(torch.uint8).permute(1, 2, 3, 0).cpu()


def room_for(num_bytes: int, num_rooms: int = 1) -> Tensor:
    """Return zeros uint8 [num_bytes], mapped from a file if `num_rooms` of them are large."""
    if num_bytes * num_rooms <= IN_MEMORY:
        return torch.zeros(num_bytes, dtype=torch.uint8)
    with room_in_file(num_bytes) as (_, room):
        return room


@contextmanager
def room_in_file(num_bytes: int) -> Iterator[tuple[str, Tensor]]:
    """Yield a temporary file's name and zeros uint8 [num_bytes] mapped from it.

    Raises:
        OutputError: the disk has no space.
    """
    try:
        file = tempfile.NamedTemporaryFile(prefix="vidgen-")  # noqa: SIM115
        os.posix_fallocate(file.fileno(), 0, num_bytes)  # else a full disk kills the process later
    except OSError as error:
        raise write_error(Path(tempfile.gettempdir(), "frames"), error) from error
    with file:
        yield file.name, torch.from_file(file.name, shared=True, size=num_bytes, dtype=torch.uint8)
