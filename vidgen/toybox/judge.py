"""The judge: small networks that tell what a Toybox clip shows.

`FrameNet` looks at single pictures: which sprites, which place. `MotionNet` watches a clip: which
motions, which camera. Both may answer "nothing". They learn from renders alone (`train/judge.py`),
never from generated clips or a VAE's output, so that they can score both.

Axes: B clips, T frames, N pictures, H W pixels, h w cells of `CELL` pixels, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidgen.core.errors import ModelError
from vidgen.core.runtime import sha256_file
from vidgen.toybox.scenes import CAMERAS, MOTIONS, PLACES, SPRITES, WORLD_VERSION
from vidgen.weights.load import config_of, embedded_folder, load_module

NOTHING = "nothing"
CELL = 16
SIDE = 128  # geometric mean of the sides that FrameNet looks at
MOTION_SIDE = 64
MIN_SAMPLES, MAX_STRIDE = 9, 4
SEEN = 0.5  # probability from which something counts as seen


@dataclass(frozen=True)
class JudgeConfig:
    """Classes in the order of the networks' outputs, and widths.

    Sprites and motions are independent yes-or-no questions, since a scene may have two actors;
    place and camera have one answer, with "nothing" after the last class.
    """

    sprites: tuple[str, ...] = tuple(SPRITES)
    motions: tuple[str, ...] = MOTIONS
    places: tuple[str, ...] = PLACES
    cameras: tuple[str, ...] = CAMERAS
    frame_dims: tuple[int, int, int] = (64, 128, 160)
    motion_dims: tuple[int, int, int] = (48, 96, 128)
    track_dim: int = 24
    temporal_dim: int = 128
    world_version: int = WORLD_VERSION


class FrameLogits(NamedTuple):
    """What single pictures show.

    cells: [N, K, h, w], sprite k in this cell. sprites: [N, K], sprite k anywhere.
    places: [N, K + 1], the last one is "nothing".
    """

    cells: Tensor
    sprites: Tensor
    places: Tensor


class ClipLogits(NamedTuple):
    """How clips move: motions [B, K], cameras [B, K + 1], whose last one is "nothing"."""

    motions: Tensor
    cameras: Tensor


class _Conv(nn.Sequential):
    """3x3 convolution, group norm, ReLU; in 2D or over space and time."""

    def __init__(
        self, kind: type[nn.Conv2d | nn.Conv3d], dim: int, out: int, stride: int = 1
    ) -> None:
        strides = (stride, stride) if kind is nn.Conv2d else (1, stride, stride)
        super().__init__(
            kind(dim, out, 3, strides, padding=1, bias=False), nn.GroupNorm(8, out), nn.ReLU()
        )


class _Residual(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al. 2016, Fig. 2)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.first = _Conv(nn.Conv2d, dim, dim)
        self.second = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(8, dim)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm(self.second(self.first(x))))


class FrameNet(nn.Module):
    """Sprites by multiple-instance pooling of cells, the place by mean pooling."""

    def __init__(self, config: JudgeConfig) -> None:
        super().__init__()
        a, b, c = config.frame_dims
        self.trunk = nn.Sequential(
            nn.PixelUnshuffle(4),
            _Conv(nn.Conv2d, 48, a),
            _Conv(nn.Conv2d, a, b, stride=2),
            _Residual(b),
            _Conv(nn.Conv2d, b, c, stride=2),
            _Residual(c),
        )
        self.sprites = nn.Conv2d(c, len(config.sprites), 1)
        self.places = nn.Linear(c, len(config.places) + 1)
        nn.init.constant_(self.sprites.bias, -6.0)  # most cells hold no given sprite

    def forward(self, pictures: Tensor) -> FrameLogits:
        """Look at pictures [N, 3, H, W] in [-1, 1], sides multiples of `CELL`."""
        features = self.trunk(pictures.contiguous(memory_format=torch.channels_last))
        cells = self.sprites(features).float()
        anywhere = cells.flatten(2).logsumexp(2)
        return FrameLogits(cells, anywhere, self.places(features.mean((2, 3))).float())


class MotionNet(nn.Module):
    """Space-time convolutions that keep where things are, then convolutions over time alone."""

    def __init__(self, config: JudgeConfig) -> None:
        super().__init__()
        a, b, c = config.motion_dims
        side, width = MOTION_SIDE // 8, config.temporal_dim
        self.trunk = nn.Sequential(
            _Conv(nn.Conv3d, 12, a), _Conv(nn.Conv3d, a, b, stride=2),
            _Conv(nn.Conv3d, b, c, stride=2), nn.Conv3d(c, config.track_dim, 1),
        )  # fmt: skip
        self.embed = nn.Linear(config.track_dim * side * side, width)
        self.temporal = nn.ModuleList(nn.Conv1d(width, width, 3, padding=1) for _ in range(3))
        self.motions = nn.Linear(2 * width, len(config.motions))
        self.cameras = nn.Linear(2 * width, len(config.cameras) + 1)

    def forward(self, video: Tensor) -> ClipLogits:
        """Watch video [B, 3, T, `MOTION_SIDE`, `MOTION_SIDE`] in [-1, 1]."""
        patches = F.pixel_unshuffle(video.transpose(1, 2), 2).transpose(1, 2)
        maps = self.trunk(patches.contiguous(memory_format=torch.channels_last_3d))
        x = F.relu(self.embed(maps.transpose(1, 2).flatten(2))).transpose(1, 2)
        for layer in self.temporal:
            x = x + F.relu(layer(x))
        pooled = torch.cat([x.mean(2), x.amax(2)], dim=1)
        return ClipLogits(self.motions(pooled).float(), self.cameras(pooled).float())


@dataclass(frozen=True)
class Verdict:
    """What a clip shows, as probabilities.

    Attributes:
        sprites: how surely each is seen, in the frames in which it is seen best.
        motions: how surely something moves like this.
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
        return _best(self.sprites, 1)[0]

    @property
    def motion(self) -> str:
        """The surest motion, or `NOTHING`."""
        return _best(self.motions, 1)[0]

    @property
    def place(self) -> str:
        """The place, or `NOTHING`."""
        return max(self.places, key=self.places.__getitem__)

    @property
    def camera(self) -> str:
        """The camera, or `NOTHING`."""
        return max(self.cameras, key=self.cameras.__getitem__)

    def shows(self, sprites: Sequence[str]) -> bool:
        """Whether these, one or two, are the sprites seen best."""
        return set(_best(self.sprites, len(set(sprites)))) == set(sprites)

    def moves(self, motions: Sequence[str]) -> bool:
        """Whether these are the surest motions; one that two actors share counts once."""
        return set(_best(self.motions, len(set(motions)))) == set(motions)


def _best(scores: Mapping[str, float], count: int) -> list[str]:
    ranked = sorted(scores, key=scores.__getitem__, reverse=True)[:count]
    return [name if scores[name] >= SEEN else NOTHING for name in ranked]


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
            (c.sprites, sprites), (c.motions, moved.motions.sigmoid()),
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
    return small.unflatten(0, (len(video), -1)).transpose(1, 2)


@dataclass(frozen=True)
class JudgeFolder:
    """A judge on disk: `config.json` and `model.safetensors`."""

    path: Path

    @cached_property
    def sha256(self) -> str:
        """Hash of its weights."""
        return sha256_file(self.path / "model.safetensors")

    def load(self, device: torch.device | str = "cpu") -> Judge:
        """Bring it into memory, in float32.

        Raises:
            ModelError: files missing or damaged, or of another world.
        """
        config = config_of(JudgeConfig, self.path)
        if config.world_version != WORLD_VERSION:
            raise ModelError(
                f"the judge in {self.path} knows Toybox world {config.world_version}, this is "
                f"{WORLD_VERSION}; train it again with train/judge.py"
            )
        return load_module(lambda: Judge(config), self.path, torch.float32, device)


def embedded_judge() -> JudgeFolder:
    """The judge shipped inside the package."""
    return JudgeFolder(embedded_folder("judge"))
