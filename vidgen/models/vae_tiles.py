"""Encode and decode videos tile by tile if the activations of whole frames don't fit in memory.

Tiles are exact, not blended. Only the middle block attends over whole frames; it is small, and runs
on whole frames. All other layers are convolutions, so that a tile which also reads their margin has
the same values as the whole frame. Between stages, the part of the margin that no later stage needs
is cut off.

Each tile has its own stream: a few latent frames pass through one tile, then through the next. In
between, a tile's cache of earlier frames is stored in a buffer.

Axes: B batch, C channels, D width, T frames, H W rows and columns of patches, F latent frames, h w
latent rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice, pairwise, product
from typing import NamedTuple

import torch
from torch import Tensor

from vidgen.core.shapes import Tiles
from vidgen.models.vae import CausalVAE, VAEConfig
from vidgen.ops.conv import StreamCache, channels_last
from vidgen.ops.latents import patchify_pixels, unpatchify_pixels

AT_ONCE = 4
"""Latent frames that pass through a tile before the next tile is computed."""
SMALLEST = 8
"""Smallest side of a tile, in latents; a smaller tile would read far more margin than area."""
MOST = 99
"""Largest number of rows or columns in a grid of tiles."""

Span = tuple[int, int]
Room = Callable[[int], Tensor]
"""Function that allocates a number of bytes: a uint8 tensor on the CPU."""


class Tile(NamedTuple):
    """A tile's (first, end) rows and columns at the input of each cut layer, and in the output."""

    rows: list[Span]
    columns: list[Span]


def cut_tiles(
    config: VAEConfig, rows: int, columns: int, tiles: Tiles, *, decode: bool
) -> list[Tile]:
    """Return the tiles for latents of rows x columns.

    To decode, spans are of the inputs of the decoder's stages and last convolution, and of the
    patches; to encode, of the inputs of the encoder's first convolution and stages, and of the
    latents.
    """
    sides = _sides(config, rows, columns, tiles, decode=decode)
    return [Tile(*each) for each in product(*sides)]


def tile_areas(
    config: VAEConfig, rows: int, columns: int, tiles: Tiles, *, decode: bool
) -> tuple[list[int], list[int]]:
    """Return the area at each of a `Tile`'s spans: of the largest tile, and of all tiles."""
    sides = _sides(config, rows, columns, tiles, decode=decode)
    high, wide = (
        [[end - first for first, end in spans] for spans in zip(*side, strict=True)]
        for side in sides
    )
    pairs = [*zip(high, wide, strict=True)]
    return [max(h) * max(w) for h, w in pairs], [sum(h) * sum(w) for h, w in pairs]


def grids(rows: int, columns: int) -> Iterator[Tiles]:
    """Yield grids for latents of rows x columns, with ever smaller, roughly square tiles."""
    longest = max(rows, columns)
    for count in range(2, min(longest // SMALLEST, MOST) + 1):
        side = longest / count
        yield Tiles(max(1, round(rows / side)), max(1, round(columns / side)))


@torch.no_grad()
def decode_in_tiles(
    vae: CausalVAE, latents: Iterable[Tensor], tiles: Tiles, room: Room
) -> Iterator[Tensor]:
    """Yield the video [B, 3, t, H, W] of `vae.stream_decode`, up to rounding errors.

    Args:
        latents: pieces of normalised latents, [B, C, F, h, w], with at least as many rows and
            columns as the grid of tiles.
        room: allocates buffers for the caches of tiles that aren't being computed.
    """
    decoder, config, begun = vae.decoder, vae.config, StreamCache()
    frames = (frame for piece in latents for frame in piece.split(1, dim=2))
    entered = (decoder.enter(channels_last(vae.denormalize(frame)), begun) for frame in frames)

    def decode(x: Tensor, tile: Tile, cache: StreamCache) -> Tensor:
        here = (tile.rows[0], tile.columns[0])
        x = _part(x, (0, 0), *here)
        for i, stage in enumerate(decoder.stages):
            scale = 1 if stage.upsample is None else 2
            corner = (scale * tile.rows[i][0], scale * tile.columns[i][0])
            x = stage(x, cache)
            x = _part(x, corner, tile.rows[i + 1], tile.columns[i + 1])
        x = decoder.conv_out.after_norm(decoder.norm_out, x, cache)
        return _part(x, (tile.rows[-2][0], tile.columns[-2][0]), tile.rows[-1], tile.columns[-1])

    def cut(rows: int, columns: int) -> list[Tile]:
        return cut_tiles(config, rows, columns, tiles, decode=True)

    for patches in _stream(entered, decode, cut, room):
        yield unpatchify_pixels(patches, config.patch_size)


@torch.no_grad()
def encode_in_tiles(
    vae: CausalVAE, frames: Iterable[Tensor], tiles: Tiles, room: Room
) -> Iterator[Tensor]:
    """Yield the latents [B, C, 1, h, w] of `vae.stream_encode`, up to rounding errors.

    See `stream_encode` for `frames` and errors, and `decode_in_tiles` for the other arguments.
    """
    encoder, config, ended = vae.encoder, vae.config, StreamCache()
    scale = 2 ** (config.num_stages - 1)
    patches = (channels_last(patchify_pixels(group, config.patch_size))
               for group in vae.groups(frames))

    def encode(x: Tensor, tile: Tile, cache: StreamCache) -> Tensor:
        x = encoder.conv_in(_part(x, (0, 0), tile.rows[0], tile.columns[0]), cache)
        corner = (tile.rows[0][0], tile.columns[0][0])
        for i, stage in enumerate(encoder.stages, 1):
            x = _part(x, corner, tile.rows[i], tile.columns[i])
            x = stage(x, cache)
            factor = 1 if stage.downsample is None else 2
            corner = (tile.rows[i][0] // factor, tile.columns[i][0] // factor)
        return _part(x, corner, tile.rows[-1], tile.columns[-1])

    def cut(rows: int, columns: int) -> list[Tile]:
        return cut_tiles(config, rows // scale, columns // scale, tiles, decode=False)

    for features in _stream(patches, encode, cut, room):
        yield vae.normalize(encoder.leave(features, ended).chunk(2, dim=1)[0])


def _sides(
    config: VAEConfig, rows: int, columns: int, tiles: Tiles, *, decode: bool
) -> list[list[list[Span]]]:
    """Return the spans of each row of tiles, and of each column of them."""
    of, sides = _decoder_spans if decode else _encoder_spans, []
    for length, count in ((rows, tiles.rows), (columns, tiles.columns)):
        places = [i * length // count for i in range(count + 1)]
        sides.append([of(config, own, length) for own in pairwise(places)])
    return sides


def _decoder_spans(config: VAEConfig, own: Span, length: int) -> list[Span]:
    """Return the spans of an axis that are read to decode `own` of its latents."""
    scale = 2 ** (config.num_stages - 1)
    made, length = (scale * own[0], scale * own[1]), scale * length
    spans = [_widened(made, 1, length), made]
    for resample in (None, *config.resamples[:-1]):
        first, end = spans[0]
        if resample:  # a pixel reads its neighbours in the doubled image
            first, end, length = (first - 1) // 2, (end + 2) // 2, length // 2
        spans.insert(0, _widened((first, end), 2 * (config.num_blocks + 1), length))
    return spans


def _encoder_spans(config: VAEConfig, own: Span, length: int) -> list[Span]:
    """Return the spans of an axis that are read to encode `own` of its latents."""
    spans = [own]
    for resample in config.resamples[::-1]:
        first, end = spans[0]
        if resample:  # a pixel reads three; a stride of two makes it replace the first two
            first, end, length = 2 * first, 2 * end + 1, 2 * length
        first, end = _widened((first, end), 2 * config.num_blocks, length)
        if resample:  # start and end at even pixels, so that strides stay aligned
            first, end = first - first % 2, end + end % 2
        spans.insert(0, (first, end))
    return [_widened(spans[0], 1, length), *spans]


def _widened(span: Span, reach: int, length: int) -> Span:
    return max(0, span[0] - reach), min(length, span[1] + reach)


def _part(x: Tensor, corner: tuple[int, int], rows: Span, columns: Span) -> Tensor:
    """Crop x [B, C, T, H, W], whose first row and column are `corner`, to rows and columns."""
    (top, bottom), (left, right) = rows, columns
    shown = x[..., top - corner[0] : bottom - corner[0], left - corner[1] : right - corner[1]]
    return shown if shown.shape == x.shape else channels_last(shown)


def _stream(
    chunks: Iterator[Tensor], compute: Callable[[Tensor, Tile, StreamCache], Tensor],
    cut: Callable[[int, int], list[Tile]], room: Room,
) -> Iterator[Tensor]:
    """Yield the result for each chunk [B, C, T, H, W] of one latent frame, joined from its tiles.

    `compute` maps a chunk to one tile of the result and updates the tile's cache; `cut` returns the
    tiles for chunks of H x W.
    """
    streams: list[tuple[Tile, _Kept]] = []
    position = 0
    while held := list(islice(chunks, AT_ONCE)):
        if not streams:
            streams = [(tile, _Kept(room)) for tile in cut(*held[0].shape[3:])]
        wholes = _pass(held, compute, streams, position)
        position += len(held)
        held.clear()
        while wholes:
            yield wholes.pop(0)


def _pass(
    chunks: Sequence[Tensor], compute: Callable[[Tensor, Tile, StreamCache], Tensor],
    streams: Sequence[tuple[Tile, _Kept]], position: int,
) -> list[Tensor]:
    """Compute chunks one tile after the other; results are channels-last in memory."""
    wholes: list[Tensor] = []
    (bottom, right) = (spans[-1][1] for spans in streams[-1][0])
    for tile, kept in streams:
        cache = kept.take(chunks[0].device)
        for i, chunk in enumerate(chunks):
            cache.position = position + i
            made = compute(chunk, tile, cache)
            if len(wholes) == i:
                B, C, T = made.shape[:3]
                wholes.append(made.new_empty(B, T, bottom, right, C).permute(0, 4, 1, 2, 3))
            rows, columns = (slice(*spans[-1]) for spans in tile)
            wholes[i][..., rows, columns] = made
        kept.put(cache)
    return wholes


class _Kept:
    """Buffer of bytes for a tile's cache while other tiles are computed."""

    def __init__(self, room: Room) -> None:
        self._room_for = room
        self._room: Tensor | None = None
        self._facts: list[tuple[str, torch.Size, torch.dtype]] = []

    def put(self, cache: StreamCache) -> None:
        last = {name: each.movedim(1, -1) for name, each in cache.tensors.items()}
        self._facts = [(name, each.shape, each.dtype) for name, each in last.items()]
        size = sum(each.nbytes for each in last.values())
        if self._room is None or self._room.numel() < size:
            self._room = self._room_for(size)
        for (_, place), each in zip(self._places(), last.values(), strict=True):
            place.copy_(each.contiguous().view(-1).view(torch.uint8))

    def take(self, device: torch.device) -> StreamCache:
        """Return the cache, copied out of the buffer; at first an empty one."""
        cache = StreamCache()
        for (name, shape, dtype), (_, place) in zip(self._facts, self._places(), strict=True):
            each = torch.empty(shape, dtype=dtype, device=device)
            each.view(-1).view(torch.uint8).copy_(place)
            cache.tensors[name] = each.movedim(-1, 1)
        return cache

    def _places(self) -> Iterator[tuple[str, Tensor]]:
        start = 0
        for name, shape, dtype in self._facts:
            assert self._room is not None
            size = shape.numel() * dtype.itemsize
            yield name, self._room[start : start + size]
            start += size
