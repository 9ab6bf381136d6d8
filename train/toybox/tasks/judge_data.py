"""What the judge learns from: a sliding window of renders, turned, damaged, made unrecognisable.

Axes: B clips, T frames looked at, H W pixels, A actors, h w cells of `CELL` pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.toybox.judge import CELL, JudgeConfig, sample_frames
from train.toybox.world.cast import RESERVED_SPRITES, SPRITES
from train.toybox.world.render import MAX_ACTORS, render
from train.toybox.world.scenes import (
    MOTIONS,
    Draws,
    Scene,
    SceneMix,
    compose_scene,
    is_valid,
    sample_scenes,
)
from vidgen.core.errors import InputError

IGNORE = -100  # PyTorch's cross-entropy passes over such a label

#: Tinted sprites and pairs are the hardest to name, so they come more often than by default.
MIX = SceneMix(two_actors=0.2, tint=0.5)
#: Motions and cameras as seen in a mirror, and played backwards; the others stay what they are.
MIRRORED = {"moves left": "moves right", "pan left": "pan right"}
REVERSED = {
    **MIRRORED, "rises": "falls", "grows": "shrinks", "pan up": "pan down", "zoom in": "zoom out",
}  # fmt: skip


@dataclass(frozen=True)
class PoolConfig:
    """One geometry of rendered clips.

    Args:
        share: of the batches that come from this pool, relative to the others.
        clips: how many are kept in memory.
        first: how many there are before the first step.
        fresh: how many join at every step, in the mean; old ones leave.
        empty: share of scenes without an actor.
        motions: of the scenes' one actor; () leaves them, and pairs, as they are drawn.

    Raises:
        InputError: an unknown motion.
    """

    num_frames: int = 33
    height: int = 128
    width: int = 128
    share: float = 1.0
    clips: int = 2000
    first: int = 256
    fresh: float = 2.0
    empty: float = 0.08
    motions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the names."""
        for name in self.motions:
            if name not in MOTIONS:
                raise InputError(f"motion {name!r} is none of {', '.join(MOTIONS)}")


@dataclass
class Batch:
    """Clips and what they show.

    Attributes:
        video: [B, 3, T, H, W] in [-1, 1].
        coverage: [B, A, T, h, w], the share of each cell that shows each actor.
        sprites: [B, A] int64, -1 where there is none.
        motions: [B, K + 1], shares that sum to 1, or zeros where it can't be told; the last class
            is "nothing".
        places: [B] int64, or `IGNORE`; one past the last class is "nothing".
        cameras: likewise.
    """

    video: Tensor
    coverage: Tensor
    sprites: Tensor
    motions: Tensor
    places: Tensor
    cameras: Tensor


class Backdrop(Scene):
    """A scene that nobody acts in: place, weather and camera alone."""

    def __post_init__(self) -> None:
        """Nothing to check: the fields come from a scene."""


def judge_scene(seed: int, empty: float, motions: Sequence[str] = ()) -> Scene:
    """Draw a scene for the judge: of a rich mix, some without actors, some of reserved sprites.

    The reserved ones come as often as any, so that what is learned of them later can be scored.

    Args:
        seed: scene seed.
        empty: chance of no actor.
        motions: that its one actor has, where any can be seen of it; () takes all, and pairs.
    """
    scene = sample_scenes(seed, 1, MIX)[0]
    draws = Draws(seed, stream=77)
    if draws.chance(empty):
        kept = ("place", "time_of_day", "weather", "camera")
        return Backdrop(seed, (), **{name: getattr(scene, name) for name in kept})
    if draws.chance(len(RESERVED_SPRITES) / len(SPRITES)):
        motion = scene.actors[0].motion
        scene = scene.recast(draws.choice([s for s in RESERVED_SPRITES if is_valid(s, motion)]))
    sprite = scene.actors[0].sprite
    fitting = [motion for motion in motions if is_valid(sprite, motion)]
    if fitting:
        return compose_scene(seed, sprite, draws.choice(fitting), scene.place, MIX)
    return scene


class RenderPool:
    """The clips of scenes `window(step)`, as bytes in memory; moves on with the steps.

    What it holds at a step depends on that step alone, so a resumed run sees the same clips.
    """

    def __init__(self, pool: PoolConfig, judge: JudgeConfig, first_seed: int) -> None:
        self.pool, self.judge, self.first_seed = pool, judge, first_seed
        self.looks = sample_frames(pool.num_frames)
        count, grid = len(self.looks), (pool.height // CELL, pool.width // CELL)
        self.frames = torch.empty(
            (pool.clips, count, 3, pool.height, pool.width), dtype=torch.uint8
        )
        self.coverage = torch.zeros(
            (pool.clips, MAX_ACTORS, count, *grid), dtype=torch.uint8
        )
        self.scenes: dict[int, Scene] = {}

    def window(self, step: int) -> range:
        """Scene numbers in memory at a step: the newest `clips` of those rendered so far."""
        end = self.pool.first + int(self.pool.fresh * step)
        return range(max(0, end - self.pool.clips), end)

    def advance(self, step: int, on_clips: Callable[[int, int], None] | None = None) -> None:
        """Render what `window(step)` lacks; `on_clips` is told (done, total)."""
        window = self.window(step)
        self.scenes = {i: scene for i, scene in self.scenes.items() if i in window}
        missing = [i for i in window if i not in self.scenes]
        for start in range(0, len(missing), 16):
            part = missing[start : start + 16]
            scenes = [
                judge_scene(self.first_seed + i, self.pool.empty, self.pool.motions) for i in part
            ]
            shown = render(
                scenes, self.pool.num_frames, self.pool.height, self.pool.width, frames=self.looks
            )
            slots = torch.tensor([i % self.pool.clips for i in part])
            self.frames[slots] = to_bytes(shown.video).transpose(1, 2)
            pooled = F.avg_pool3d(shown.masks, (1, CELL, CELL))
            self.coverage[slots] = (pooled * 255).round().byte()
            self.scenes.update(zip(part, scenes, strict=True))
            if on_clips:
                on_clips(start + len(part), len(missing))

    def draw(self, step: int, count: int, generator: torch.Generator) -> Batch:
        """Draw clips of the window, with replacement."""
        window = self.window(step)
        drawn = torch.randint(window.start, window.stop, (count,), generator=generator)
        slots = drawn % self.pool.clips
        scenes = [self.scenes[i] for i in drawn.tolist()]
        video = self.frames[slots].transpose(1, 2).float().div_(127.5).sub_(1)
        return labelled(scenes, video, self.coverage[slots].float() / 255, self.judge)


def to_bytes(video: Tensor) -> Tensor:
    """Video in [-1, 1] as uint8 of the same shape."""
    return ((video + 1) * 127.5).round().clamp(0, 255).byte()


def labelled(
    scenes: Sequence[Scene], video: Tensor, coverage: Tensor, judge: JudgeConfig
) -> Batch:
    """Put a batch's labels beside its pictures."""
    sprites = torch.full((len(scenes), MAX_ACTORS), -1)
    motions = torch.zeros(len(scenes), len(judge.motions) + 1)
    for row, scene in enumerate(scenes):
        for column, actor in enumerate(scene.actors):
            sprites[row, column] = judge.sprites.index(actor.sprite)
            motions[row, judge.motions.index(actor.motion)] = 1
        motions[row, -1] = not scene.actors
    places = torch.tensor([judge.places.index(s.place) for s in scenes])
    cameras = torch.tensor([judge.cameras.index(s.camera) for s in scenes])
    motions /= motions.sum(1, keepdim=True)
    return Batch(video, coverage, sprites, motions, places, cameras)


class Transforms:
    """Random changes to a batch, in place; each depends on the generator alone.

    First what keeps a clip a clip (mirror, time reversed, frozen), then what no judge should
    recognise, then damage of the kind that codecs and VAEs do.
    """

    def __init__(self, judge: JudgeConfig, generator: torch.Generator) -> None:
        self.judge, self.generator = judge, generator
        self.mirrored = _swaps(judge, MIRRORED)
        self.reversed = _swaps(judge, REVERSED)

    def apply(self, batch: Batch, *, nothing: float, frozen: float) -> Batch:
        """Change a batch; `nothing` and `frozen` are shares of its clips."""
        count = len(batch.video)
        self._turn(batch, self._chances(count, 0.5), 4, self.mirrored)
        self._turn(batch, self._chances(count, 0.3), 2, self.reversed)
        for row in self._chances(count, frozen):
            self._freeze(batch, row)
        for row in self._chances(count, nothing):
            self._spoil(batch, row)
        for start in range(0, count, 4):
            part = batch.video[start : start + 4]
            batch.video[start : start + 4] = damage(part, self.generator)
        return batch

    def _uniform(self, high: float) -> float:
        return high * float(torch.rand((), generator=self.generator))

    def _chances(self, count: int, probability: float) -> list[int]:
        drawn = torch.rand(count, generator=self.generator) < probability
        return [int(row) for row in drawn.nonzero()[:, 0]]

    def _turn(self, batch: Batch, rows: list[int], axis: int, swaps: tuple[Tensor, Tensor]) -> None:
        batch.video[rows] = batch.video[rows].flip(axis)
        batch.coverage[rows] = batch.coverage[rows].flip(axis)
        batch.motions[rows] = batch.motions[rows][:, swaps[0]]
        batch.cameras[rows] = swaps[1][batch.cameras[rows]]

    def _freeze(self, batch: Batch, row: int) -> None:
        """Show one frame all the time: whatever was to move now stays."""
        frame = int(self._uniform(batch.video.shape[2]))
        batch.video[row] = batch.video[row, :, frame : frame + 1].clone()
        batch.coverage[row] = batch.coverage[row, :, frame : frame + 1].clone()
        there = batch.coverage[row].sum() > 0.5
        batch.motions[row] = 0
        batch.motions[row, self.judge.motions.index("stays") if there else -1] = 1
        batch.cameras[row] = self.judge.cameras.index("still")

    def _spoil(self, batch: Batch, row: int) -> None:
        """Leave nothing that could be recognised, in one of four ways."""
        clip, kind = batch.video[row], self._uniform(1)
        if kind < 0.25:
            clip.copy_(noise_clip(clip.shape, self.generator))
        elif kind < 0.5:
            clip.copy_(blob_clip(clip.shape, self.generator))
        else:
            self._mash(batch, row, everywhere=kind > 0.8)
            return
        batch.motions[row] = 0
        batch.motions[row, -1] = 1
        batch.places[row] = len(self.judge.places)
        batch.cameras[row] = len(self.judge.cameras)
        batch.sprites[row] = -1

    def _mash(self, batch: Batch, row: int, *, everywhere: bool) -> None:
        """Turn the actors, or the whole picture, into mush of the right colours."""
        clip, cover = batch.video[row], batch.coverage[row].sum(0)  # [3, T, H, W], [T, h, w]
        areas = cover.sum((1, 2)).sort(descending=True).values * CELL**2
        side = max(16.0, math.sqrt(float(areas[: len(areas) // 2 + 1].mean())))
        mush = mash(clip, side, self.generator)
        if everywhere:
            clip.copy_(mush)
            batch.places[row] = batch.cameras[row] = IGNORE
        else:
            wide = F.max_pool2d((cover[:, None] > 0.02).float(), 3, 1, 1)
            where = F.interpolate(wide, clip.shape[-2:], mode="bilinear").transpose(0, 1)
            clip.copy_(torch.lerp(clip, mush, where))
        batch.motions[row] = 0
        batch.sprites[row] = -1


def _swaps(judge: JudgeConfig, pairs: dict[str, str]) -> tuple[Tensor, Tensor]:
    """Index tensors that exchange the paired motions, the paired cameras."""
    both = {**pairs, **{b: a for a, b in pairs.items()}}
    motions, cameras = (
        torch.tensor([*(names.index(both.get(name, name)) for name in names), len(names)])
        for names in (judge.motions, judge.cameras)
    )
    return motions, cameras


def noise_clip(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """White noise [3, T, H, W], grey or coloured, standing or flickering, at any contrast."""
    channels, frames, height, width = shape
    luck: list[float] = torch.rand(4, generator=generator).tolist()
    size = (3 if luck[0] < 0.7 else 1, frames if luck[1] < 0.7 else 1, height, width)
    noise = torch.randn(size, generator=generator) * (0.1 + 0.9 * luck[2])
    level = torch.rand(3, 1, 1, 1, generator=generator) * 2 - 1
    return (noise + level * luck[3]).clamp(-1, 1).expand(channels, frames, height, width)


def blob_clip(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Blobs of colour [3, T, H, W] that drift or stand: coarse noise enlarged, or ellipses."""
    channels, frames, height, width = shape
    luck = torch.rand(4, generator=generator).tolist()
    level = torch.rand(3, 1, 1, 1, generator=generator) * 2 - 1
    if luck[3] < 0.5:
        cells, moments = 2 + int(luck[0] * 12), 1 + int(luck[1] * 4)
        coarse = torch.randn((1, 3, moments, cells, cells), generator=generator) * (0.3 + luck[2])
        blobs = F.interpolate(coarse, (frames, height, width), mode="trilinear", align_corners=True)
        return (blobs[0] + 0.5 * level).clamp(-1, 1)
    picture = level.expand(channels, frames, height, width)
    along, y, x = torch.arange(frames), torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
    for _ in range(1 + int(luck[0] * 8)):
        draw = torch.rand(12, generator=generator)
        moved = (along / frames)[:, None, None] * luck[1]
        dy = y[:, None] - (2 * draw[0] - 1) - (draw[1] - 0.5) * moved
        dx = x - (2 * draw[2] - 1) - (draw[3] - 0.5) * moved
        turn = draw[4] * math.pi
        near = ((dx * turn.cos() + dy * turn.sin()) / (0.08 + 0.5 * draw[5])) ** 2
        near = near + ((dy * turn.cos() - dx * turn.sin()) / (0.08 + 0.5 * draw[6])) ** 2
        alpha = ((1 - near) * (0.5 + 20 * draw[7] ** 4) + 0.5).clamp(0, 1)
        picture = torch.lerp(picture, (2 * draw[8:11] - 1)[:, None, None, None], alpha)
    return picture


def mash(clip: Tensor, side: float, generator: torch.Generator) -> Tensor:
    """Spoil things of about `side` pixels in a clip [3, T, H, W]: blurred, bent or shuffled."""
    _, frames, height, width = clip.shape
    pictures, kind = clip.transpose(0, 1), float(torch.rand((), generator=generator))
    if kind < 0.35:
        cell = side * (0.45 + 0.3 * kind / 0.35)
        small = (max(2, round(height / cell)), max(2, round(width / cell)))
        tiny = F.interpolate(pictures, small, mode="bilinear", antialias=True)
        return F.interpolate(tiny, (height, width), mode="bicubic").transpose(0, 1).clamp(-1, 1)
    if kind < 0.7:
        wave = max(5.0, 0.35 * side)
        grid = (max(2, round(height / wave)), max(2, round(width / wave)))
        bend = torch.randn((1, 2, *grid), generator=generator) * 0.3 * side
        bend = F.interpolate(bend, (height, width), mode="bicubic")[0]
        rows, columns = torch.arange(height)[:, None] + bend[0], torch.arange(width) + bend[1]
        where = torch.stack([columns / (width - 1), rows / (height - 1)], -1) * 2 - 1
        bent = F.grid_sample(pictures, where.expand(frames, -1, -1, -1), padding_mode="reflection",
                             align_corners=True)  # fmt: skip
        return bent.transpose(0, 1)
    block = 8 if side > 34 else 4
    tiles = F.pixel_unshuffle(pictures, block)  # [T, 3 * block^2, H / block, W / block]
    reach = max(2, round(side / block))
    order = _local_shuffle(tiles.shape[2], tiles.shape[3], reach, generator)
    shuffled = tiles.flatten(2)[:, :, order].unflatten(2, tiles.shape[2:])
    return F.pixel_shuffle(shuffled, block).transpose(0, 1)


def _local_shuffle(rows: int, columns: int, reach: int, generator: torch.Generator) -> Tensor:
    """An order of the cells of a grid in which each stays within about `reach` of its place."""
    jitter = torch.rand((2, rows, columns), generator=generator) * reach
    down = (torch.arange(rows)[:, None] + jitter[0]).argsort(0)
    order = down * columns + torch.arange(columns)
    across = (torch.arange(columns) + jitter[1]).argsort(1)
    return order.gather(1, across).flatten()


def damage(video: Tensor, generator: torch.Generator) -> Tensor:
    """Damage clips [B, 3, T, H, W] alike, as codecs, scaling and VAEs do: always a new tensor."""
    luck = torch.rand(8, generator=generator).tolist()
    gains = 1 + 0.06 * torch.randn((1, 3, 1, 1, 1), generator=generator)
    video = video * gains * (0.85 + 0.3 * luck[0]) + 0.24 * (luck[1] - 0.5)
    frames = video.transpose(1, 2).flatten(0, 1)
    if luck[2] < 0.3:
        frames = blur(frames, 0.4 + 1.3 * luck[5])
    elif luck[2] < 0.6:
        frames = rescale(frames, 0.38 + 0.5 * luck[5])
    elif luck[2] < 0.8:
        soft = torch.rand((1, 1, 5, 5), generator=generator)
        share = F.interpolate(soft, frames.shape[-2:], mode="bilinear")
        frames = torch.lerp(frames, rescale(frames, 0.3), share)
    if luck[3] < 0.4:
        frames = block_code(frames, 0.05 + 0.25 * luck[6] ** 2)
    if luck[4] < 0.35:
        noise = torch.randn(frames.shape, generator=generator)
        frames = frames + noise * (0.01 + 0.12 * luck[7])
    clips: Tensor = frames.unflatten(0, video.shape[:1] + video.shape[2:3])
    return clips.transpose(1, 2).clamp(-1, 1)


def blur(frames: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of pictures [N, 3, H, W], separably."""
    reach = math.ceil(2.5 * sigma)
    x = torch.arange(-reach, reach + 1)
    kernel = torch.exp(-0.5 * (x / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    padded = F.pad(frames, (reach,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel, groups=3), kernel.transpose(2, 3), groups=3)


def rescale(frames: Tensor, factor: float) -> Tensor:
    """Shrink pictures [N, 3, H, W] by a factor and enlarge them again."""
    size = frames.shape[-2:]
    small = [max(8, round(side * factor)) for side in size]
    tiny = F.interpolate(frames, small, mode="bilinear", antialias=True)
    return F.interpolate(tiny, size, mode="bilinear")


def block_code(frames: Tensor, step: float) -> Tensor:
    """Quantise 8x8 cosine coefficients as JPEG does, coarser for higher ones (ITU-T T.81, A.3.3).

    Args:
        frames: [N, 3, H, W], sides multiples of 8.
        step: of the lowest coefficients' quantisation, in units of the [-1, 1] range.
    """
    k = torch.arange(8.0)
    basis = 0.5 * torch.cos((2 * k + 1) * k[:, None] * math.pi / 16)
    basis[0] *= math.sqrt(0.5)
    blocks: Tensor = frames.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).transpose(3, 4)
    steps = step * (1 + 0.6 * (k + k[:, None]))
    coefficients = basis @ blocks @ basis.T
    decoded = basis.T @ ((coefficients / steps).round() * steps) @ basis
    return decoded.transpose(3, 4).flatten(4, 5).flatten(2, 3)
