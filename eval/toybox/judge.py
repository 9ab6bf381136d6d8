"""The judge: small networks that tell what a Toybox clip shows.

`FrameNet` looks at single pictures: which sprites, which place. `MotionNet` watches a clip: which
motions, which camera. Both may answer "nothing". They learn from renders alone
(`train/toybox/judge.py`), never from generated clips or a VAE's output, so that they can score
both.

Axes: B clips, T frames, N pictures, H W pixels, h w cells of `CELL` pixels, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.toybox.world.cast import SPRITES
from train.toybox.world.scenes import CAMERAS, MOTIONS, PLACES, WORLD_VERSION
from vidgen.core.errors import ModelError
from vidgen.core.runtime import sha256_file
from vidgen.ops.conv import Residual, conv_block
from vidgen.weights.configs import config_of
from vidgen.weights.load import load_module

Config = TypeVar("Config")

ASSETS = Path(__file__).parent / "assets"
NOTHING = "nothing"
CELL = 16
SIDE = 128  # geometric mean of the sides that FrameNet looks at
MOTION_SIDE = 64
MIN_SAMPLES, MAX_STRIDE = 9, 4
FLOW_CHANNELS, FLAT = 4, 1e-4  # FLAT: gradient energy below which a cell has no texture
MOST_BLOCKS = 64
SEEN = 0.5  # probability from which something counts as seen


@dataclass(frozen=True)
class JudgeConfig:
    """Classes in the order of the networks' outputs, each followed by "nothing", and sizes.

    `fine_blocks` look at what is smaller than a cell, at a quarter of the picture's sides.

    Raises:
        ValueError: more of them than any judge has, which would take long to be built.
    """

    sprites: tuple[str, ...] = tuple(SPRITES)
    motions: tuple[str, ...] = MOTIONS
    places: tuple[str, ...] = PLACES
    cameras: tuple[str, ...] = CAMERAS
    frame_dims: tuple[int, int, int] = (64, 128, 160)
    fine_blocks: int = 1
    motion_dims: tuple[int, int, int] = (48, 96, 128)
    look_dim: int = 24
    mixed_dim: int = 48
    temporal_dim: int = 128
    world_version: int = WORLD_VERSION

    def __post_init__(self) -> None:
        if not 0 <= self.fine_blocks <= MOST_BLOCKS:
            raise ValueError(f"fine_blocks must be 0 to {MOST_BLOCKS}, not {self.fine_blocks}")


class FrameLogits(NamedTuple):
    """What single pictures show.

    cells: [N, K + 1, h, w], which sprite is in this cell, the last one none.
    sprites: [N, K], log-odds of sprite k anywhere against none.
    places: [N, K + 1], the last one is "nothing".
    """

    cells: Tensor
    sprites: Tensor
    places: Tensor


class ClipLogits(NamedTuple):
    """How clips move.

    motions: [B, K + 1] and cameras: [B, K + 1], the last ones are "nothing".
    actors: [B, T, 8, 8], whether a cell shows an actor.
    """

    motions: Tensor
    cameras: Tensor
    actors: Tensor


class FrameNet(nn.Module):
    """Names the sprite in each cell and the place as a whole."""

    def __init__(self, config: JudgeConfig) -> None:
        super().__init__()
        a, b, c = config.frame_dims
        self.fine = nn.Sequential(*(Residual(a) for _ in range(config.fine_blocks)))
        self.trunk = nn.Sequential(
            nn.PixelUnshuffle(4), conv_block(48, a), conv_block(a, b, stride=2), Residual(b),
            conv_block(b, c, stride=2), Residual(c),
        )  # fmt: skip
        self.cells = nn.Conv2d(c, len(config.sprites) + 1, 1)
        self.places = nn.Linear(c, len(config.places) + 1)

    def forward(self, pictures: Tensor) -> FrameLogits:
        """Look at pictures [N, 3, H, W] in [-1, 1], sides multiples of `CELL`.

        Of a cell's softmax p, log(p_k / p_none) is the evidence for sprite k; the cells' odds add.
        """
        fine = self.fine(self.trunk[:2](pictures.contiguous(memory_format=torch.channels_last)))
        features = self.trunk[2:](fine)
        cells = self.cells(features).float()
        anywhere = (cells[:, :-1] - cells[:, -1:]).flatten(2).logsumexp(2)
        return FrameLogits(cells, anywhere, self.places(features.mean((2, 3))).float())


class MotionNet(nn.Module):
    """Where actors are in each look, and how the picture flows between two, read over time."""

    def __init__(self, config: JudgeConfig) -> None:
        super().__init__()
        a, b, c = config.motion_dims
        width, seen = config.temporal_dim, 1 + FLOW_CHANNELS
        self.trunk = nn.Sequential(
            nn.PixelUnshuffle(2), conv_block(12, a), conv_block(a, b, stride=2),
            conv_block(b, c, stride=2),
        )
        self.actors = nn.Conv2d(c, 1, 1)
        self.look = nn.Conv2d(c, config.look_dim, 1)
        self.mix = nn.Sequential(
            nn.Conv3d(config.look_dim + seen, config.mixed_dim, 3, padding=1, bias=False),
            nn.BatchNorm3d(config.mixed_dim),
            nn.ReLU(),
        )
        cells = (MOTION_SIDE // 8) ** 2
        self.embed = nn.Linear((config.mixed_dim + seen) * cells, width)
        self.norm = nn.BatchNorm1d(width)
        self.temporal = nn.ModuleList(
            nn.Sequential(nn.Conv1d(width, width, 3, padding=1, bias=False), nn.BatchNorm1d(width))
            for _ in range(2)
        )
        self.motions = nn.Linear(2 * width, len(config.motions) + 1)
        self.cameras = nn.Linear(2 * width, len(config.cameras) + 1)

    def forward(self, video: Tensor) -> ClipLogits:
        """Watch video [B, 3, T, `MOTION_SIDE`, `MOTION_SIDE`] in [-1, 1], T >= 2."""
        frames = video.transpose(1, 2).flatten(0, 1)
        features = self.trunk(frames.contiguous(memory_format=torch.channels_last))
        actors, look = (
            layer(features).unflatten(0, (len(video), -1)).transpose(1, 2)
            for layer in (self.actors, self.look)
        )
        seen = torch.cat([actors.float().sigmoid(), coarse_flow(video)], dim=1)
        mixed = self.mix(torch.cat([look, seen], dim=1))
        x = self.embed(torch.cat([mixed, seen], dim=1).transpose(1, 2).flatten(2))
        x = F.relu(self.norm(x.transpose(1, 2)))
        for layer in self.temporal:
            x = x + F.relu(layer(x))
        pooled = torch.cat([x.mean(2), x.amax(2)], dim=1)
        motions, cameras = self.motions(pooled).float(), self.cameras(pooled).float()
        return ClipLogits(motions, cameras, actors[:, 0].float())


def coarse_flow(video: Tensor) -> Tensor:
    """Optical flow from each look to the next by least squares (Lucas & Kanade 1981, eq. 9).

    Solved on cells of an eighth of the side, at half resolution, so that a pan is about a pixel.
    Where the picture is flat the answer is near zero, and little trusted.

    Args:
        video: [B, 3, T, H, W] in [-1, 1], sides multiples of 16.

    Returns:
        [B, 4, T, 8, 8] float32: flow in x and y in pixels of half resolution, trust, change;
        zeros for the last look.
    """
    count, _, num_frames = video.shape[:3]
    grey = F.avg_pool2d(video.float().mean(1).flatten(0, 1)[:, None], 2)
    grey = F.avg_pool2d(F.pad(grey, (1, 1, 1, 1), mode="replicate"), 3, 1)
    grey = grey[:, 0].unflatten(0, (count, num_frames))
    now, following = grey[:, :-1], grey[:, 1:]
    middle = F.pad((now + following) / 2, (1, 1, 1, 1), mode="replicate")
    gx = (middle[..., 1:-1, 2:] - middle[..., 1:-1, :-2]) / 2
    gy = (middle[..., 2:, 1:-1] - middle[..., :-2, 1:-1]) / 2
    gt = following - now
    cell = grey.shape[-1] // 8
    margin = cell // 2

    def over_cells(product: Tensor) -> Tensor:
        padded = F.pad(product, (margin, margin, margin, margin))
        return F.avg_pool2d(padded, cell + 2 * margin, cell)

    xx, yy = over_cells(gx * gx) + FLAT, over_cells(gy * gy) + FLAT
    xy, xt, yt = over_cells(gx * gy), over_cells(gx * gt), over_cells(gy * gt)
    determinant = xx * yy - xy * xy
    flow_x = (xy * yt - yy * xt) / determinant
    flow_y = (xy * xt - xx * yt) / determinant
    trust = torch.minimum(xx, yy).log10() + 4
    change = (over_cells(gt * gt) + 0.1 * FLAT).log10() + 4
    told = torch.stack([flow_x.clamp(-4, 4), flow_y.clamp(-4, 4), trust, change], dim=1)
    return F.pad(told, (0, 0, 0, 0, 0, 1))


@dataclass(frozen=True)
class Verdict:
    """What a clip shows, as probabilities.

    Attributes:
        sprites: how surely each is seen, in the frames in which it is seen best.
        motions: shares of the answer, `NOTHING` included; two actors share it.
        places: one answer, `NOTHING` included.
        cameras: likewise.
    """

    sprites: dict[str, float]
    motions: dict[str, float]
    places: dict[str, float]
    cameras: dict[str, float]

    @property
    def sprite(self) -> str:
        """The sprite seen best, or `NOTHING`."""
        best = ranked(self.sprites)[0]
        return best if self.sprites[best] >= SEEN else NOTHING

    @property
    def motion(self) -> str:
        """The surest motion, or `NOTHING`."""
        return ranked(self.motions)[0]

    @property
    def place(self) -> str:
        """The place, or `NOTHING`."""
        return ranked(self.places)[0]

    @property
    def camera(self) -> str:
        """The camera, or `NOTHING`."""
        return ranked(self.cameras)[0]

    def shows(self, sprites: Sequence[str]) -> bool:
        """Whether these, one or two, are the sprites seen best, and all of them are seen."""
        wanted = set(sprites)
        best = set(ranked(self.sprites)[: len(wanted)])
        return best == wanted and all(self.sprites[name] >= SEEN for name in wanted)

    def moves(self, motions: Sequence[str]) -> bool:
        """Whether these are the surest motions; one that two actors share counts once."""
        wanted = set(motions)
        return set(ranked(self.motions)[: len(wanted)]) == wanted


def ranked(scores: Mapping[str, float]) -> list[str]:
    """Names, the surest first."""
    return sorted(scores, key=scores.__getitem__, reverse=True)


class Judge(nn.Module):
    """Both networks, and the rules that turn their answers into a verdict."""

    def __init__(self, config: JudgeConfig) -> None:
        super().__init__()
        self.config = config
        self.frames = FrameNet(config)
        self.motion = MotionNet(config)

    def verdicts(self, video: Tensor) -> list[Verdict]:
        """Judge clips [B, 3, T, H, W] in [-1, 1] of any length and size; motion needs T >= 9."""
        return self.verdicts_of_samples(video[:, :, sample_frames(video.shape[2])])

    @torch.no_grad()
    def verdicts_of_samples(self, sampled: Tensor) -> list[Verdict]:
        """Judge clips of which only the frames named by `sample_frames` are there.

        A sprite's score is its mean over the better half of the frames looked at: an actor may
        leave the picture or start too small to be known. The place's is its mean over all frames.
        """
        sampled = sampled.float().clamp(-1, 1)
        looked = self.frames(to_frame_size(sampled.transpose(1, 2).flatten(0, 1)))
        seen = looked.sprites.sigmoid().unflatten(0, (len(sampled), -1))
        half = math.ceil(seen.shape[1] / 2)
        sprites = seen.topk(half, dim=1).values.mean(1)
        places = looked.places.unflatten(0, (len(sampled), -1)).log_softmax(2).mean(1).softmax(1)
        moved = self.motion(to_motion_size(sampled))
        c = self.config
        answers = (
            (c.sprites, sprites), ((*c.motions, NOTHING), moved.motions.softmax(1)),
            ((*c.places, NOTHING), places), ((*c.cameras, NOTHING), moved.cameras.softmax(1)),
        )  # fmt: skip
        rows = [[dict(zip(n, row, strict=True)) for row in p.tolist()] for n, p in answers]
        return [Verdict(*answer) for answer in zip(*rows, strict=True)]


def sample_frames(num_frames: int) -> list[int]:
    """Frames to look at: first, last, and evenly between, `MAX_STRIDE` apart at most.

    So the fastest motion stays well below half a period from one look to the next.
    """
    count = max(MIN_SAMPLES, 1 + math.ceil((num_frames - 1) / MAX_STRIDE))
    return [round(i * (num_frames - 1) / (count - 1)) for i in range(count)]


def to_frame_size(pictures: Tensor) -> Tensor:
    """Bring pictures [N, 3, H, W] to the area FrameNet knows, aspect kept within half a cell."""
    height, width = pictures.shape[-2:]
    scale = SIDE / math.sqrt(height * width)
    if 0.95 < scale < 1.05:
        scale = 1.0
    size = tuple(max(CELL, CELL * round(side * scale / CELL)) for side in (height, width))
    if size == (height, width):
        return pictures
    return F.interpolate(pictures, size, mode="bilinear", antialias=True)


def to_motion_size(video: Tensor) -> Tensor:
    """Bring video [B, 3, T, H, W] to MotionNet's square; ways count as shares of the frame."""
    frames = video.transpose(1, 2).flatten(0, 1)
    small = F.interpolate(frames, (MOTION_SIDE, MOTION_SIDE), mode="bilinear", antialias=True)
    clips: Tensor = small.unflatten(0, (len(video), -1))
    return clips.transpose(1, 2)


@dataclass(frozen=True)
class JudgeFiles:
    """A judge's files: `config.json` and `model.safetensors`."""

    path: Path

    @cached_property
    def sha256(self) -> str:
        """Hash of its weights."""
        return sha256_file(self.path / "model.safetensors")


@dataclass(frozen=True)
class JudgeFolder(JudgeFiles):
    """A judge on disk."""

    def load(self, device: torch.device | str = "cpu") -> Judge:
        """Bring it into memory, in float32.

        Raises:
            ModelError: files missing or damaged, or of another world.
        """
        config = config_of_this_world(JudgeConfig, self.path, "judge")
        return load_module(lambda: Judge(config), self.path, torch.float32, device)


def config_of_this_world(kind: type[Config], path: Path, program: str) -> Config:
    """The config of a judge in a folder.

    Args:
        kind: its type, with a `world_version`.
        path: the folder.
        program: that trains it, of those in `train/`.

    Raises:
        ModelError: files missing or damaged, or of another world.
    """
    config: Config = config_of(kind, path)
    version = config.world_version  # type: ignore[attr-defined]
    if version != WORLD_VERSION:
        raise ModelError(
            f"the {program.replace('_', ' ')} in {path} knows Toybox world {version}, this is "
            f"{WORLD_VERSION}; train it again with train/{program}.py"
        )
    return config


def embedded_judge() -> JudgeFolder:
    """The judge released with this checkout."""
    return JudgeFolder(ASSETS / "judge")
