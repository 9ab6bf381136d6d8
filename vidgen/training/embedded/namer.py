"""A network that names the sprite in each latent, which transformers learn from (`naming`).

It knows latents alone, nothing of the judge that scores clips, and is no part of a released model.

Axes: N latent frames, C latent channels, h w latent rows and columns, K sprites, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vidgen.core.errors import InputError
from vidgen.toybox.judge import Residual, config_of_this_world, conv_block
from vidgen.toybox.scenes import SPRITE_NAMES, WORLD_VERSION, Scene
from vidgen.toybox.truth import actor_centres
from vidgen.training.embedded.toybox_data import ToyboxCache, as_reference
from vidgen.weights.load import load_module

NONE, UNSURE = len(SPRITE_NAMES), -1
"""Of a latent: it shows no sprite; it shows part of one, or two that are hard to tell apart."""
COVERED, BARE = 0.35, 0.05
"""Shares of a latent's pixels that are sprite: from which it shows one, and none up to which."""
APART = 8.0
"""Pixels by which the middle of one actor has to be nearer to a latent than the other's."""


@dataclass(frozen=True)
class NamerConfig:
    """Sizes of a namer.

    Args:
        latent_channels: C.
        dim: D.
        blocks: of two convolutions each; a latent's name depends on 2 * blocks + 1 on every side.
        world_version: of the world that it knows.
    """

    latent_channels: int = 16
    dim: int = 128
    blocks: int = 4
    world_version: int = WORLD_VERSION


class Answers(NamedTuple):
    """What latents show.

    names: logits, [N, K + 1, h, w], the last one of none.
    features: that names are told by, [N, D, h, w].
    """

    names: Tensor
    features: Tensor


class Namer(nn.Module):
    """Convolutions over each latent frame by itself."""

    def __init__(self, config: NamerConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = conv_block(config.latent_channels + 1, config.dim)
        self.body = nn.Sequential(*(Residual(config.dim) for _ in range(config.blocks)))
        self.names = nn.Conv2d(config.dim, NONE + 1, 1)

    def forward(self, latents: Tensor, noise: Tensor) -> Answers:
        """Look at latents [N, C, h, w] which hold noise of levels [N]."""
        told = noise.view(-1, 1, 1, 1).expand(-1, 1, *latents.shape[2:]).to(latents)
        seen = torch.cat([latents, told], dim=1).contiguous(memory_format=torch.channels_last)
        features = self.body(self.stem(seen))
        return Answers(self.names(features).float(), features)


def load_namer(folder: Path, device: torch.device) -> Namer:
    """A trained one, frozen.

    Raises:
        InputError: there is none.
        ModelError: its files are damaged, or of another world.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no namer; train one with train/namer.py")
    config = config_of_this_world(NamerConfig, folder, "namer")
    namer: Namer = load_module(lambda: Namer(config), folder, torch.float32, device)
    return namer.eval().requires_grad_(requires_grad=False)


class NamedFrames(NamedTuple):
    """Latent frames, and what they show.

    latents: [N, C, h, w], float16.
    names: [N, h, w], int8: a sprite's index, `NONE` or `UNSURE`.
    """

    latents: Tensor
    names: Tensor


def named_frames(cache: ToyboxCache, every: int = 2) -> NamedFrames:
    """All single frames of a cache, and of its clips every so many latent frames."""
    config, clips, t = cache.config, cache.load(), cache.strides.t
    first, *moments = cache.frames_shown[:-1]
    size = config.num_frames, config.height, config.width, config.fps
    latents, names = [], []
    for row in range(len(clips.clips)):
        scene = cache.scene(row)
        frames = clips.clips[row].transpose(0, 1)
        some = slice(0 if len(frames) == 1 else row % every, None, every)
        middles = [first, *(t * index - (t - 1) / 2 for index in range(1, len(frames)))][some]
        stills, covers = clips.stills.latents[row].transpose(0, 1), clips.still_cover[row, 0]
        latents += [frames[some], stills]
        names += [
            names_shown(scene, clips.cover[row, 0, some], middles, *size),
            names_shown(scene, covers[:-1], moments, *size),
            names_shown(as_reference(scene), covers[-1:], [0], 1, *size[1:]),
        ]
    return NamedFrames(torch.cat(latents), torch.cat(names))


def names_shown(
    scene: Scene, cover: Tensor, frames: Sequence[float], num_frames: int, height: int, width: int,
    fps: float,
) -> Tensor:
    """Which sprite latents show, [n, h, w] int8; of two actors the one whose middle is nearest.

    Args:
        scene: the scene.
        cover: how much of a latent's pixels is sprite, [n, h, w].
        frames: of the clip, where the latents' middles lie, n of them.
        num_frames: of the clip.
        height: of its frames, in pixels.
        width: likewise.
        fps: its rate.
    """
    own = torch.tensor([SPRITE_NAMES.index(actor.sprite) for actor in scene.actors])
    nearest = torch.zeros(cover.shape, dtype=torch.long)
    shown, rows, columns = cover >= COVERED, *cover.shape[1:]
    if len(own) > 1:
        centres = actor_centres(scene, frames, num_frames, height, width, fps)
        x, y = torch.from_numpy(centres).float()[..., None, None].unbind(2)  # [A, n, 1, 1]
        across = (torch.arange(columns) + 0.5) * (width / columns)
        down = ((torch.arange(rows) + 0.5) * (height / rows))[:, None]
        distances, order = torch.hypot(across - x, down - y).sort(dim=0)
        nearest = order[0]
        shown &= distances[1] - distances[0] > APART
    names = torch.full(cover.shape, UNSURE, dtype=torch.int8)
    names[cover <= BARE] = NONE
    names[shown] = own[nearest][shown].to(torch.int8)
    return names
