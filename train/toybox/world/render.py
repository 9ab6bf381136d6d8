"""Scenes to pictures: places, weather and sprites, batched, at any frames of a clip.

Axes: B scenes, A actors, T frames asked for, N (scene, frame) pairs painted at once, H rows,
W columns. Each pair is painted on its own: a single frame costs one and equals that of the clip.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from train.toybox.world.art import paint_fog, paint_place
from train.toybox.world.canvas import NUM_DRAWS, Canvas, wave
from train.toybox.world.cast import SPRITES
from train.toybox.world.motion import (
    ASSETS,
    Clock,
    actor_tracks,
    camera_track,
    frame_sides,
    sheet_description,
)
from train.toybox.world.noise import uniform_noise
from train.toybox.world.scenes import PLACES, TIMES, TINTS, WEATHERS, Draws, Scene
from vidgen.core.errors import InputError

MAX_ACTORS = 2
_PIXELS_AT_ONCE = {"cpu": 1 << 17, "cuda": 1 << 25}
_MIPS = 5  # texture sides fall by sqrt(2) from level to level
_TINT_COLORS = np.array([
    (0.92, 0.12, 0.12), (1.0, 0.50, 0.05), (1.0, 0.86, 0.10), (0.12, 0.70, 0.20),
    (0.12, 0.36, 0.95), (0.56, 0.16, 0.80), (1.0, 0.45, 0.72), (-1.0, -1.0, -1.0),
])  # fmt: skip  # as TINTS, none last
assert len(_TINT_COLORS) == len(TINTS) + 1
#: Light on sprites by time of day: a hint, they stay recognisable.
_SPRITE_LIGHT = np.array(
    [(1.0, 1.0, 1.0), (0.98, 0.94, 0.96), (1.0, 0.90, 0.82), (0.82, 0.86, 0.97)]
)
#: Layers of what falls: speed down and sideways in world units a second, opacity.
_FALLING = {
    "rain": ((1.9, -0.25, 0.42), (1.5, -0.2, 0.26)),
    "snow": ((0.36, 0.06, 0.90), (0.22, -0.04, 0.70)),
}


class Rendered(NamedTuple):
    """Pictures and the actors' masks.

    video: [B, 3, T, H, W] float32 in [-1, 1].
    masks: [B, 2, T, H, W] float32 in [0, 1], what is seen of each actor; zeros for an absent one.
    """

    video: Tensor
    masks: Tensor


class _Plan(NamedTuple):
    """Scenes as arrays, float64 until the last moment: every device starts from equal numbers."""

    looks: NDArray[np.float32]  # [B, NUM_DRAWS]
    seconds: NDArray[np.float64]  # [B, T]
    times: NDArray[np.int64]  # [B] index into TIMES
    weathers: NDArray[np.int64]  # [B] index into WEATHERS
    camera: NDArray[np.float64]  # [B, T, 3] x, y, zoom
    sprites: NDArray[np.int64]  # [B, A] index, -1 where absent
    tints: NDArray[np.int64]  # [B, A] index into TINTS, -1 for none
    actors: NDArray[np.float64]  # [B, A, T, 6] x, y, width, height, angle, -1 where mirrored


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
    count, moments = wanted.shape
    video = torch.empty(count, 3, moments, height, width, device=device)
    masks = torch.empty(count, MAX_ACTORS, moments, height, width, device=device)
    at_once = max(1, _PIXELS_AT_ONCE.get(device.type, 1 << 17) // (height * width))
    jobs = []
    for place in PLACES:
        here = [index for index, scene in enumerate(scenes) if scene.place == place]
        b, t = np.repeat(here, moments).astype(np.int64), np.tile(np.arange(moments), len(here))
        for start in range(0, len(b), at_once):
            chunk = slice(start, start + at_once)
            jobs.append(partial(_paint, place, plan, b[chunk], t[chunk], video, masks))
    _run(jobs, device)
    return Rendered(video, masks)


def _run(jobs: Sequence[Callable[[], None]], device: torch.device) -> None:
    """Run the jobs; on a CPU one thread a job.

    Painting is thousands of small operations: sharing each among threads brings little on a quiet
    machine and, waiting at every barrier, is twenty times slower beside other work.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        for job in jobs:
            job()
        return
    torch.set_num_threads(1)  # threads that start from here on take it over
    try:
        with ThreadPoolExecutor(min(threads, len(jobs))) as pool:
            for done in [pool.submit(job) for job in jobs]:
                done.result()
    finally:
        torch.set_num_threads(threads)


def _plan(
    scenes: Sequence[Scene], wanted: NDArray[np.int64], clock: Clock, size: tuple[int, int]
) -> _Plan:
    count, moments = wanted.shape
    plan = _Plan(
        looks=uniform_noise([scene.seed for scene in scenes], 2, NUM_DRAWS),
        seconds=wanted / clock.fps,
        times=np.array([TIMES.index(scene.time_of_day) for scene in scenes]),
        weathers=np.array([WEATHERS.index(scene.weather) for scene in scenes]),
        camera=np.empty((count, moments, 3)),
        sprites=np.full((count, MAX_ACTORS), -1),
        tints=np.full((count, MAX_ACTORS), -1),
        actors=np.ones((count, MAX_ACTORS, moments, 6)),
    )
    sides = frame_sides(*size)
    for b, scene in enumerate(scenes):
        progress = clock.progress(wanted[b].astype(np.float64))
        plan.camera[b] = np.stack(camera_track(scene, sides, progress), -1)
        for a, track in enumerate(actor_tracks(scene, sides, clock, progress)):
            way = (track.x, track.y, track.width, track.height, track.angle)
            plan.actors[b, a, :, :5] = np.stack(way, -1)
            plan.actors[b, a, :, 5] = -1.0 if track.flipped else 1.0
            plan.sprites[b, a] = _SPRITE_INDEX[scene.actors[a].sprite]
            tint = scene.actors[a].tint
            plan.tints[b, a] = TINTS.index(tint) if tint else -1
    return plan


_SPRITE_INDEX = {name: index for index, name in enumerate(SPRITES)}


def _paint(
    place: str,
    plan: _Plan,
    b: NDArray[np.int64],
    t: NDArray[np.int64],
    video: Tensor,
    masks: Tensor,
) -> None:
    """Paint frames t [N] of scenes b [N], all in one place, into video, masks [B, C, T, H, W]."""
    device, (height, width) = video.device, video.shape[-2:]
    camera = plan.camera[b, t]
    pixel = _send(1 / (camera[:, 2] * math.sqrt(height * width)), device)[:, None, None]
    center = _send(camera[:, :2], device)[..., None, None]
    weathers = torch.from_numpy(plan.weathers[b]).to(device)
    canvas = Canvas(
        x=(torch.arange(width, device=device) + (0.5 - width / 2)) * pixel + center[:, 0],
        y=(torch.arange(height, device=device)[:, None] + (0.5 - height / 2)) * pixel
        + center[:, 1],
        seconds=_send(plan.seconds[b, t], device)[:, None, None],
        pixel=pixel,
        looks=_send(plan.looks[b], device),
        times=torch.from_numpy(plan.times[b]).to(device),
        weathers=weathers,
    )
    image = paint_place(place, canvas)
    paint_fog(canvas, image, weathers, strength=0.55)
    alphas = image.new_zeros(len(b), MAX_ACTORS, height, width)
    for actor in reversed(range(MAX_ACTORS)):
        _paint_actor(actor, image, alphas, plan, b, t)
    paint_fog(canvas, image, weathers, strength=0.11)
    _paint_falling(canvas, image, plan.weathers[b])
    where = (torch.from_numpy(b).to(device), slice(None), torch.from_numpy(t).to(device))
    video[where] = image.mul_(2).sub_(1).clamp_(-1, 1)
    masks[where] = alphas


def _send(values: NDArray[np.floating[Any]], device: torch.device) -> Tensor:
    return torch.from_numpy(values.astype(np.float32)).to(device)


def _paint_actor(
    actor: int,
    image: Tensor,
    alphas: Tensor,
    plan: _Plan,
    b: NDArray[np.int64],
    t: NDArray[np.int64],
) -> None:
    """Lay one actor of each scene over the pictures, where it is in the frame at all."""
    height, width = image.shape[-2:]
    camera, way = plan.camera[b, t], plan.actors[b, actor, t]
    scale = camera[:, 2:] * math.sqrt(height * width)
    middle = np.array([width / 2, height / 2])
    center = (way[:, :2] - camera[:, :2]) * scale + middle
    half = way[:, 2:4] * scale / 2
    reach = np.hypot(half[:, 0], half[:, 1])
    seen = (np.abs(center - middle) < middle + reach[:, None]).all(1)
    seen &= plan.sprites[b, actor] >= 0
    tile, margin = sheet_description()["tile"], sheet_description()["margin"]
    shrink = (tile / 2 - margin) / half.max(1)  # texels a pixel
    levels = np.clip(np.floor(2 * np.log2(shrink) + 0.25), 0, _MIPS - 1)
    for level in np.unique(levels[seen]):
        rows = np.flatnonzero(seen & (levels == level))
        cos, sin = np.cos(way[rows, 4]), np.sin(way[rows, 4])
        fill = (1 - 2 * margin / tile) / half[rows]
        across, down = way[rows, 5] * fill[:, 0], fill[:, 1]
        stamp = _Stamp(
            rows=torch.from_numpy(rows).to(image.device),
            texture=_textures(image.device)[int(level)][
                torch.from_numpy(plan.sprites[b[rows], actor]).to(image.device)
            ],
            center=_send(center[rows].T, image.device)[..., None, None],
            matrix=_send(np.stack([cos * across, sin * across, -sin * down, cos * down]),
                         image.device)[..., None, None],
            light=_send(_SPRITE_LIGHT[plan.times[b[rows]]], image.device)[..., None, None],
            tint=_send(_TINT_COLORS[plan.tints[b[rows], actor]], image.device)[..., None, None],
            side=math.ceil(2 * reach[rows].max()) + 3,
        )  # fmt: skip
        flat, color, alpha = _sample(stamp, height, width)
        _blend(image, stamp.rows, flat, color, alpha)
        covered = alphas.new_zeros(1, 1, 1).expand(len(rows), MAX_ACTORS, alpha.shape[2]).clone()
        covered[:, actor] = alpha[:, 0]
        _blend(alphas, stamp.rows, flat, covered, alpha)


class _Stamp(NamedTuple):
    """Sprites to be laid over n pictures.

    rows: which pictures, [n].
    texture: premultiplied RGBA, [n, 4, s, s].
    center: (x, y) in pixels, [2, n, 1, 1].
    matrix: from pixels off the centre to texture coordinates, by rows, [4, n, 1, 1].
    light: [n, 3, 1, 1].
    tint: [n, 3, 1, 1], negative for none.
    side: of the square window that holds each sprite, in pixels.
    """

    rows: Tensor
    texture: Tensor
    center: Tensor
    matrix: Tensor
    light: Tensor
    tint: Tensor
    side: int


def _sample(stamp: _Stamp, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return pixel numbers [n, P], premultiplied colours [n, 3, P] and alpha [n, 1, P]."""
    device = stamp.rows.device
    high, wide = min(stamp.side, height), min(stamp.side, width)
    cx, cy = stamp.center
    top = (torch.floor(cy) - high // 2).clamp(0, height - high)
    left = (torch.floor(cx) - wide // 2).clamp(0, width - wide)
    py = top + torch.arange(high, device=device)[:, None]
    px = left + torch.arange(wide, device=device)
    dx, dy = px + 0.5 - cx, py + 0.5 - cy
    ux, uy, vx, vy = stamp.matrix
    grid = torch.stack([dx * ux + dy * uy, dx * vx + dy * vy], -1)
    sample = F.grid_sample(stamp.texture, grid, mode="bilinear", align_corners=False)
    color, alpha = sample[:, :3], sample[:, 3:]
    tinted = stamp.tint[:, :1] >= 0
    if bool(tinted.any()):
        luma = color[:, :1] * 0.35 + color[:, 1:2] * 0.5 + color[:, 2:] * 0.15
        toned = stamp.tint * (luma * 0.80 + alpha * 0.40)
        toned = toned + (luma - alpha * 0.62).clamp(min=0) * 0.8
        color = torch.where(tinted, torch.minimum(toned * 0.88 + color * 0.12, alpha), color)
    color = color * stamp.light
    return (py.long() * width + px.long()).flatten(1), color.flatten(2), alpha.flatten(2)


def _blend(image: Tensor, rows: Tensor, flat: Tensor, color: Tensor, alpha: Tensor) -> None:
    """Put premultiplied colours [n, C, P] over the pixels ``flat`` [n, P] of image[rows]."""
    channels, area = image.shape[1], image.shape[2] * image.shape[3]
    first = rows[:, None] * channels + torch.arange(channels, device=rows.device)
    index = (first * area)[..., None] + flat[:, None]
    planes = image.view(-1)
    planes[index] = color + planes[index] * (1 - alpha)


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
    return float(alpha.mean()) / float(content) ** 2


def _paint_falling(canvas: Canvas, image: Tensor, weathers: NDArray[np.int64]) -> None:
    """Lay rain or snow over the pictures: two layers of a wrapping tile, falling and drifting."""
    height, width = image.shape[-2:]
    unit = math.sqrt(height * width)
    for kind, layers in _FALLING.items():
        rows = np.flatnonzero(weathers == WEATHERS.index(kind))
        if not len(rows):
            continue
        here = torch.from_numpy(rows).to(image.device)
        seconds, look = canvas.seconds[here], canvas.looks[here]
        tone = canvas.plain((0.80, 0.87, 0.95) if kind == "rain" else (0.99, 0.99, 1.0))
        for layer, (fall, slide, strength) in enumerate(layers):
            tile = _falling(kind, layer, height, width).to(image.device)
            start = look[:, NUM_DRAWS - 4 + 2 * layer :][:, :2, None, None]
            sway = wave(seconds * 0.4 + start[:, 1]) * (0.02 if kind == "snow" else 0.0)
            down = torch.floor((seconds * fall + start[:, 0]) * unit)
            along = torch.floor((seconds * slide + start[:, 1] + sway) * unit)
            y = (torch.arange(height, device=image.device)[:, None] - down).long() % height
            x = (torch.arange(width, device=image.device) - along).long() % width
            mask = tile[y, x] * strength
            image[here] = torch.lerp(image[here], tone, mask[:, None])


@lru_cache(maxsize=16)
def _falling(kind: str, layer: int, height: int, width: int) -> Tensor:
    """Draw a wrapping tile [H, W] of rain streaks or snow flakes with soft edges."""
    draws = Draws(layer, stream=3 if kind == "rain" else 4)
    unit = math.sqrt(height * width)
    y, x = np.mgrid[:height, :width].astype(np.float64)
    tile = np.zeros((height, width))
    for number in range(26 if kind == "rain" else 20):
        # A golden-ratio lattice, shaken: even, yet without rows (Roberts 2018, the R2 sequence).
        at_x = (number * 0.7548776662 + draws.uniform(0, 0.12)) * width
        at_y = (number * 0.5698402910 + draws.uniform(0, 0.12)) * height
        dx = (x - at_x + width / 2) % width - width / 2
        dy = (y - at_y + height / 2) % height - height / 2
        if kind == "rain":
            long, thin = unit * (0.055 - 0.015 * layer), unit * (0.008 - 0.002 * layer)
            across, along = np.abs(dx + dy * 0.13) / thin, np.abs(dy) / long
            blob = np.clip(1.6 - across, 0, 1) * np.clip(3 - 3 * along, 0, 1)
        else:
            radius = unit * (0.017 - 0.005 * layer) * draws.uniform(0.8, 1.2)
            blob = np.clip((radius - np.hypot(dx, dy)) / (0.012 * unit) + 0.5, 0, 1)
        tile = np.maximum(tile, blob)
    return torch.from_numpy(tile.astype(np.float32))
