"""What a verifier learns from: latents of training scenes, and what each of them shows.

Axes: N latent frames, C latent channels, h w latent rows and columns, A actors, n moments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from train.toybox.tasks.toybox_data import ToyboxCache, as_reference
from train.toybox.world.captions import nouns
from train.toybox.world.cast import SPRITE_NAMES, SPRITES
from train.toybox.world.scenes import TINTS, Scene
from train.toybox.world.truth import actor_centres

LABELS = tuple(map(nouns, SPRITE_NAMES))
"""The sprites, with all that captions call them."""
COLOURS = tuple((tint,) for tint in TINTS)
"""The tints, which captions call nothing else."""
NONE, UNSURE = len(SPRITE_NAMES), -1
"""Of a latent: it shows no sprite; it shows part of one, or two that are hard to tell apart."""
OWN = len(TINTS)
"""Of a latent's tint: it shows a sprite in colours of its own, none of which is a tint's."""
COVERED, BARE = 0.35, 0.05
"""Shares of a latent's pixels that are sprite: from which it shows one, and none up to which."""
APART = 8.0
"""Pixels by which the middle of one actor has to be nearer to a latent than the other's."""


class NamedFrames(NamedTuple):
    """Latent frames, and what they show.

    latents: [N, C, h, w], float16.
    names: [N, h, w], int8: a sprite's index, `NONE` or `UNSURE`.
    tints: [N, h, w], int8: of what has a name a tint's index or `OWN`; else `UNSURE`.
    """

    latents: Tensor
    names: Tensor
    tints: Tensor


def named_frames(cache: ToyboxCache, every: int = 2) -> NamedFrames:
    """All single frames of a cache, and of its clips every so many latent frames."""
    config, clips, t = cache.config, cache.load(), cache.strides.t
    first, *moments = cache.frames_shown[:-1]
    size = config.num_frames, config.height, config.width, config.fps
    latents, told = [], list[tuple[Tensor, Tensor]]()
    for row in range(len(clips.clips)):
        scene = cache.scene(row)
        frames = clips.clips[row].transpose(0, 1)
        some = slice(0 if len(frames) == 1 else row % every, None, every)
        middles = [first, *(t * index - (t - 1) / 2 for index in range(1, len(frames)))][some]
        stills, covers = clips.stills.latents[row].transpose(0, 1), clips.still_cover[row, 0]
        latents += [frames[some], stills]
        told += [
            told_of(scene, clips.cover[row, 0, some], middles, *size),
            told_of(scene, covers[:-1], moments, *size),
            told_of(as_reference(scene), covers[-1:], [0], 1, *size[1:]),
        ]
    names, tints = zip(*told, strict=True)
    return NamedFrames(torch.cat(latents), torch.cat(names), torch.cat(tints))


def told_of(
    scene: Scene, cover: Tensor, frames: Sequence[float], num_frames: int, height: int, width: int,
    fps: float,
) -> tuple[Tensor, Tensor]:
    """Which sprite latents show, and in which tint, both [n, h, w] int8.

    Of two actors that is the one whose middle is nearest.

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
    colours = [actor.tint or SPRITES[actor.sprite].color for actor in scene.actors]
    tinted = torch.tensor([TINTS.index(each) if each in TINTS else OWN for each in colours])
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
    names, tints = torch.full((2, *cover.shape), UNSURE, dtype=torch.int8)
    names[cover <= BARE] = NONE
    names[shown] = own[nearest][shown].to(torch.int8)
    tints[shown] = tinted[nearest][shown].to(torch.int8)
    return names, tints
