"""Scenes to pictures: places, weather and sprites, batched, at any frames of a clip.

Axes: B scenes, A actors, T frames asked for, N (scene, frame) pairs painted at once, H rows,
W columns. Each pair is painted on its own: a single frame costs one and equals that of the clip.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vidgen.core.errors import InputError
from vidgen.toybox.art import NUM_DRAWS, Canvas, paint_fog, paint_place, wave
from vidgen.toybox.motion import (
    ASSETS,
    Clock,
    actor_tracks,
    camera_track,
    frame_sides,
    sheet_description,
)
from vidgen.toybox.scenes import PLACES, SPRITES, TIMES, WEATHERS, Draws, Scene

MAX_ACTORS = 2
_PIXELS_AT_ONCE = {"cpu": 1 << 17, "cuda": 1 << 23}
_MIPS = 5  # texture sides fall by sqrt(2) from level to level
_TINT_COLORS = {
    "red": (0.92, 0.12, 0.12), "orange": (1.0, 0.50, 0.05), "yellow": (1.0, 0.86, 0.10),
    "green": (0.12, 0.70, 0.20), "blue": (0.12, 0.36, 0.95), "purple": (0.56, 0.16, 0.80),
    "pink": (1.0, 0.45, 0.72),
}  # fmt: skip
#: Light on sprites by time of day: a hint, they stay recognisable.
_SPRITE_LIGHT = ((1.0, 1.0, 1.0), (0.98, 0.94, 0.96), (1.0, 0.90, 0.82), (0.82, 0.86, 0.97))


class Rendered(NamedTuple):
    """Pictures and the actors' masks.

    video: [B, 3, T, H, W] float32 in [-1, 1].
    masks: [B, 2, T, H, W] float32 in [0, 1], what is seen of each actor; zeros for an absent one.
    """

    video: Tensor
    masks: Tensor


class _Plan(NamedTuple):
    """Scenes as arrays, float64 until the last moment: every device starts from equal numbers."""

    camera: NDArray[np.float64]  # [B, T, 3] x, y, zoom
    actors: NDArray[np.float64]  # [B, A, T, 5] x, y, width, height, angle
    flips: NDArray[np.float64]  # [B, A] -1 where mirrored
    sprites: NDArray[np.int64]  # [B, A] index, -1 where absent
    seconds: NDArray[np.float64]  # [B, T]


def render(
    scenes: Sequence[Scene],
    num_frames: int = 33,
    height: int = 128,
    width: int = 128,
    fps: float = 12.0,
    device: str | torch.device = "cpu",
    frames: Sequence[int] | Sequence[Sequence[int]] | NDArray[np.int64] | None = None,
) -> Rendered:
    """Render clips, or some frames of them.

    Args:
        scenes: B scenes.
        num_frames: length of the whole clip; motions run over all of it.
        height: rows.
        width: columns.
        fps: frames a second: how fast water, clouds, rain and snow go.
        device: where to paint.
        frames: frame indices to render, [T] for all scenes or [B, T] for each; None for all.

    Returns:
        The pictures and masks, on the device.

    Raises:
        InputError: no scenes, a size or length below 1, a frame outside the clip.
    """
    if not scenes or min(num_frames, height, width) < 1 or fps <= 0:
        raise InputError("render needs a scene, and positive num_frames, height, width and fps")
    wanted = np.asarray(range(num_frames) if frames is None else frames, dtype=np.int64)
    wanted = np.broadcast_to(wanted, (len(scenes), wanted.shape[-1]))
    if wanted.min() < 0 or wanted.max() >= num_frames:
        raise InputError(f"frames {wanted.min()}..{wanted.max()} of a clip of {num_frames}")
    device = torch.device(device)
    plan = _plan(scenes, wanted, Clock(num_frames, fps), (height, width))
    shape = (*wanted.shape, height, width)
    video = torch.empty((*shape[:2], 3, height, width), device=device)
    masks = torch.zeros((*shape[:2], MAX_ACTORS, height, width), device=device)
    looks = torch.from_numpy(_looks([s.seed for s in scenes])).to(device)
    at_once = max(1, _PIXELS_AT_ONCE.get(device.type, 1 << 17) // (height * width))
    for place in PLACES:
        here = [b for b, scene in enumerate(scenes) if scene.place == place]
        pairs = [(b, t) for b in here for t in range(wanted.shape[1])]
        for start in range(0, len(pairs), at_once):
            _paint(pairs[start : start + at_once], scenes, plan, looks, video, masks)
    return Rendered(
        video.mul_(2).sub_(1).clamp_(-1, 1).transpose(1, 2).contiguous(),
        masks.transpose(1, 2).contiguous(),
    )


def _plan(
    scenes: Sequence[Scene], wanted: NDArray[np.int64], clock: Clock, size: tuple[int, int]
) -> _Plan:
    count, moments = wanted.shape
    plan = _Plan(
        camera=np.zeros((count, moments, 3)),
        actors=np.ones((count, MAX_ACTORS, moments, 5)),
        flips=np.ones((count, MAX_ACTORS)),
        sprites=np.full((count, MAX_ACTORS), -1),
        seconds=wanted / clock.fps,
    )
    sides = frame_sides(*size)
    for b, scene in enumerate(scenes):
        progress = clock.progress(wanted[b].astype(np.float64))
        plan.camera[b] = np.stack(camera_track(scene, sides, progress), -1)
        for a, track in enumerate(actor_tracks(scene, sides, clock, progress)):
            plan.actors[b, a] = np.stack(
                [track.x, track.y, track.width, track.height, track.angle], -1
            )
            plan.flips[b, a] = -1.0 if track.flipped else 1.0
            plan.sprites[b, a] = _SPRITE_INDEX[scene.actors[a].sprite]
    return plan


_SPRITE_INDEX = {name: index for index, name in enumerate(SPRITES)}


def _looks(seeds: Sequence[int]) -> NDArray[np.float32]:
    """Draw each scene's numbers in [0, 1) for the painters, [B, NUM_DRAWS]: splitmix64 counters."""
    start = np.array([int(Draws(s, stream=2).uniform() * 2**53) << 11 for s in seeds], np.uint64)
    steps = np.arange(1, NUM_DRAWS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    value = start[:, None] + steps
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    value = value ^ (value >> np.uint64(31))
    return ((value >> np.uint64(40)).astype(np.float64) * 2.0**-24).astype(np.float32)


def _paint(
    pairs: Sequence[tuple[int, int]],
    scenes: Sequence[Scene],
    plan: _Plan,
    looks: Tensor,
    video: Tensor,
    masks: Tensor,
) -> None:
    """Paint pairs (scene, frame), all in one place, into video and masks [B, T, C, H, W]."""
    device, (height, width) = video.device, video.shape[-2:]
    b, t = (np.array(side) for side in zip(*pairs, strict=True))
    cast = [scenes[i] for i in b]
    camera = plan.camera[b, t]
    unit = math.sqrt(height * width)
    pixel = _column(1 / (camera[:, 2] * unit), device)
    x = torch.arange(width, device=device) + (0.5 - width / 2)
    y = torch.arange(height, device=device) + (0.5 - height / 2)
    times = torch.tensor([TIMES.index(s.time_of_day) for s in cast], device=device)
    weathers = torch.tensor([WEATHERS.index(s.weather) for s in cast], device=device)
    b_device = torch.from_numpy(b).to(device)
    canvas = Canvas(
        x=x * pixel + _column(camera[:, 0], device),
        y=y[:, None] * pixel + _column(camera[:, 1], device),
        seconds=_column(plan.seconds[b, t], device),
        pixel=pixel,
        looks=looks[b_device],
        times=times,
        weathers=weathers,
    )
    image = paint_place(cast[0].place, canvas)
    paint_fog(canvas, image, weathers, strength=0.55)
    alphas = image.new_zeros(len(pairs), MAX_ACTORS, height, width)
    for actor in reversed(range(MAX_ACTORS)):
        _paint_actor(actor, image, alphas, cast, plan, b, t)
    paint_fog(canvas, image, weathers, strength=0.11)
    _paint_falling(canvas, image, cast, looks[b_device])
    where = (b_device, torch.from_numpy(t).to(device))
    video[where] = image
    masks[where] = alphas


def _column(values: NDArray[np.float64], device: torch.device) -> Tensor:
    return torch.from_numpy(values.astype(np.float32)).to(device)[:, None, None]


def _paint_actor(
    actor: int,
    image: Tensor,
    alphas: Tensor,
    cast: Sequence[Scene],
    plan: _Plan,
    b: NDArray[np.int64],
    t: NDArray[np.int64],
) -> None:
    """Lay one actor of each scene over the pictures, where it is in the frame at all."""
    height, width = image.shape[-2:]
    unit = math.sqrt(height * width)
    camera, way = plan.camera[b, t], plan.actors[b, actor, t]
    scale = camera[:, 2] * unit
    x = (way[:, 0] - camera[:, 0]) * scale + width / 2
    y = (way[:, 1] - camera[:, 1]) * scale + height / 2
    half_w, half_h = way[:, 2] * scale / 2, way[:, 3] * scale / 2
    reach = np.hypot(half_w, half_h)
    seen = (plan.sprites[b, actor] >= 0) & (np.abs(x - width / 2) < width / 2 + reach)
    seen &= np.abs(y - height / 2) < height / 2 + reach
    tile, margin = sheet_description()["tile"], sheet_description()["margin"]
    content = (tile - 2 * margin) / tile
    shrink = (tile - 2 * margin) / (2 * np.maximum(half_w, half_h))
    levels = np.clip(np.floor(2 * np.log2(np.maximum(shrink, 1e-6)) + 0.25), 0, _MIPS - 1)
    for level in np.unique(levels[seen]):
        rows = np.flatnonzero(seen & (levels == level))
        cos, sin = np.cos(way[rows, 4]), np.sin(way[rows, 4])
        flip = plan.flips[b[rows], actor]
        local = np.stack(
            [x[rows], y[rows], flip * cos * content / half_w[rows],
             flip * sin * content / half_w[rows], -sin * content / half_h[rows],
             cos * content / half_h[rows]], 0)  # fmt: skip
        texture = _textures(image.device)[int(level)]
        picked = texture[torch.from_numpy(plan.sprites[b[rows], actor]).to(image.device)]
        side = math.ceil(2 * reach[rows].max()) + 3
        _stamp(
            image, alphas, actor, torch.from_numpy(rows).to(image.device), picked,
            torch.from_numpy(local.astype(np.float32)).to(image.device)[..., None, None],
            (min(side, height), min(side, width)), _shades([cast[int(i)] for i in rows], actor),
        )  # fmt: skip


class _Shades(NamedTuple):
    light: Tensor  # [n, 3, 1, 1]
    tint: Tensor  # [n, 3, 1, 1]
    tinted: Tensor  # [n, 1, 1, 1], 1 where tinted


def _shades(cast: Sequence[Scene], actor: int) -> _Shades:
    lights = torch.tensor([_SPRITE_LIGHT[TIMES.index(s.time_of_day)] for s in cast])
    tints = [s.actors[actor].tint for s in cast]
    colors = torch.tensor([_TINT_COLORS.get(t or "", (0.0, 0.0, 0.0)) for t in tints])
    tinted = torch.tensor([float(t is not None) for t in tints])
    return _Shades(lights[..., None, None], colors[..., None, None], tinted[:, None, None, None])


def _stamp(
    image: Tensor,
    alphas: Tensor,
    actor: int,
    rows: Tensor,
    texture: Tensor,
    local: Tensor,
    window: tuple[int, int],
    shades: _Shades,
) -> None:
    """Sample textures [n, 4, s, s] through windows around the actors and blend them in.

    ``local`` [6, n, 1, 1] holds the centre (x, y) in pixels and the matrix to texture coordinates.
    """
    height, width = image.shape[-2:]
    cx, cy, ux, uy, vx, vy = local
    high, wide = window
    top = (torch.floor(cy) - high // 2).clamp(0, height - high)
    left = (torch.floor(cx) - wide // 2).clamp(0, width - wide)
    py = top + torch.arange(high, device=image.device)[:, None]
    px = left + torch.arange(wide, device=image.device)
    dx, dy = px + 0.5 - cx, py + 0.5 - cy
    grid = torch.stack([dx * ux + dy * uy, dx * vx + dy * vy], -1)
    sample = F.grid_sample(texture, grid, mode="bilinear", align_corners=False)
    color, alpha = sample[:, :3], sample[:, 3:]
    device = image.device
    if bool(shades.tinted.any()):
        luma = color[:, :1] * 0.35 + color[:, 1:2] * 0.5 + color[:, 2:] * 0.15
        toned = shades.tint.to(device) * (luma * 0.85 + alpha * 0.25)
        toned = toned + (luma - alpha * 0.62).clamp(min=0) * 0.8
        toned = torch.minimum(toned * 0.88 + color * 0.12, alpha)
        color = torch.where(shades.tinted.to(device) > 0, toned, color)
    color = color * shades.light.to(device)
    flat = (py.long() * width + px.long()).flatten(1)
    _blend(image, rows, flat, color, alpha)
    behind = alphas.new_zeros(len(rows), 1, 1, 1).expand_as(alpha)
    for other in range(actor + 1, MAX_ACTORS):
        plane = alphas[:, other : other + 1]
        _blend(plane, rows, flat, behind, alpha)
    _blend(alphas[:, actor : actor + 1], rows, flat, alpha, alpha)


def _blend(image: Tensor, rows: Tensor, flat: Tensor, color: Tensor, alpha: Tensor) -> None:
    """Put premultiplied colours [n, C, h, w] over pixels ``flat`` [n, h * w] of image[rows]."""
    channels, (height, width) = image.shape[1], image.shape[-2:]
    planes = image[rows].reshape(len(rows), channels, height * width)
    index = flat[:, None].expand(-1, channels, -1)
    under = planes.gather(2, index)
    over = color.flatten(2) + under * (1 - alpha.flatten(2))
    image[rows] = planes.scatter_(2, index, over).view(-1, channels, height, width)


@lru_cache(maxsize=4)
def _textures(device: torch.device) -> list[Tensor]:
    """Load the sheet as premultiplied RGBA: per mip level [sprites, 4, side, side] in [0, 1]."""
    described = sheet_description()
    tile, columns = described["tile"], described["columns"]
    sheet = Image.open(ASSETS / "sprites.webp").convert("RGBA").convert("RGBa")
    tiles = []
    for index in range(len(SPRITES)):
        left, top = index % columns * tile, index // columns * tile
        tiles.append(sheet.crop((left, top, left + tile, top + tile)))
    levels = []
    for level in range(_MIPS):
        side = 2 * round(tile / 2 ** (level / 2) / 2)
        small = [np.asarray(t.resize((side, side), Image.Resampling.BOX if level else 0))
                 for t in tiles]  # fmt: skip
        pyramid = torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).float().div(255)
        levels.append(pyramid.contiguous().to(device))
    return levels


def sprite_area(sprite: str) -> float:
    """Return the area a sprite covers when its extent (see `Track`) is a unit square."""
    described = sheet_description()
    content = (described["tile"] - 2 * described["margin"]) / described["tile"]
    alpha = _textures(torch.device("cpu"))[0][_SPRITE_INDEX[sprite], 3]
    return float(alpha.mean()) / content**2


def _paint_falling(canvas: Canvas, image: Tensor, cast: Sequence[Scene], looks: Tensor) -> None:
    """Lay rain or snow over the pictures: two layers of a wrapping tile, falling and drifting."""
    height, width = image.shape[-2:]
    unit = math.sqrt(height * width)
    for kind, layers in (("rain", ((1.9, -0.25, 0.42), (1.5, -0.2, 0.26))),
                         ("snow", ((0.36, 0.06, 0.90), (0.22, -0.04, 0.70)))):  # fmt: skip
        chosen = [i for i, scene in enumerate(cast) if scene.weather == kind]
        if not chosen:
            continue
        rows = torch.tensor(chosen, device=image.device)
        seconds, look = canvas.seconds[rows], looks[rows]
        color = (0.80, 0.87, 0.95) if kind == "rain" else (0.99, 0.99, 1.0)
        for layer, (fall, slide, strength) in enumerate(layers):
            tile = _falling(kind, layer, height, width).to(image.device)
            start = look[:, NUM_DRAWS - 4 + 2 * layer :][:, :2, None, None]
            down = torch.floor((seconds * fall + start[:, 0]) * unit)
            sway = wave(seconds * 0.4 + start[:, 1]) * 0.02 if kind == "snow" else 0.0
            along = torch.floor((seconds * slide + start[:, 1] + sway) * unit)
            y = (torch.arange(height, device=image.device)[:, None] - down).long() % height
            x = (torch.arange(width, device=image.device) - along).long() % width
            mask = tile[y, x] * strength
            tone = image.new_tensor(color).reshape(1, 3, 1, 1)
            image[rows] = torch.lerp(image[rows], tone, mask[:, None])


@lru_cache(maxsize=16)
def _falling(kind: str, layer: int, height: int, width: int) -> Tensor:
    """Draw a wrapping tile [H, W] of rain streaks or snow flakes with soft edges."""
    draws = Draws(layer, stream=3 if kind == "rain" else 4)
    unit = math.sqrt(height * width)
    y, x = np.mgrid[:height, :width].astype(np.float64)
    tile = np.zeros((height, width))
    for _ in range(26 if kind == "rain" else 20):
        dx = (x - draws.uniform(0, width) + width / 2) % width - width / 2
        dy = (y - draws.uniform(0, height) + height / 2) % height - height / 2
        if kind == "rain":
            long, thin = unit * (0.055 - 0.015 * layer), unit * (0.008 - 0.002 * layer)
            across, along = np.abs(dx + dy * 0.13) / thin, np.abs(dy) / long
            blob = np.clip(1.6 - across, 0, 1) * np.clip(3 - 3 * along, 0, 1)
        else:
            radius = unit * (0.017 - 0.005 * layer) * draws.uniform(0.8, 1.2)
            blob = np.clip((radius - np.hypot(dx, dy)) / (0.012 * unit) + 0.5, 0, 1)
        tile = np.maximum(tile, blob)
    return torch.from_numpy(tile.astype(np.float32))
