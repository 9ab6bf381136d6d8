"""What an onset detector learns from: latents of training clips, and when something is hit there.

What a generator draws is smeared, soft and of other colours, so clips are made so, too: by that
alone what is learned on clean latents holds for drawn ones.

Axes: B clips, C latent channels, F latent frames, h w latent rows and columns, P parts of a frame,
t frames of a latent one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from train.toybox.tasks.toybox_data import ToyboxCache
from train.toybox.world.cues import sound_cues
from train.toybox.world.truth import actor_centres
from vidgen.models.onset_detector import smeared

MOVED = 2
"""Latents by which clips are moved at most, to either side."""
SMEARED, SOFTENED, TINTED = 0.5, 0.6, 0.15
"""How far at most towards the frames beside each, and the latents; and deviation of channels."""
SOME, CUT = 0.5, 0.3
"""Shares of clips that are smeared, or softened; and of batches that lose their beginning."""


class Followed(NamedTuple):
    """Clips, and what happens in them.

    latents: [B, C, F, h, w].
    impacts: whether something meets the ground, 0 or 1, [B, F, P].
    places: where the sprite of a clip is that has one alone, as shares of width and height,
        [B, F, t, 2]; NaN in other clips.
    """

    latents: Tensor
    impacts: Tensor
    places: Tensor


def followed(cache: ToyboxCache, num_parts: int) -> Followed:
    """All clips of a cache."""
    impacts = torch.stack([impacts_in(cache, index, num_parts) for index in range(cache.num_clips)])
    places = torch.stack([places_in(cache, index) for index in range(cache.num_clips)])
    return Followed(cache.load().clips, impacts, places)


def impacts_in(cache: ToyboxCache, index: int, num_parts: int) -> Tensor:
    """When something meets the ground in a clip of a cache, float 0 or 1, [F, P].

    Its first latent frame is a single picture, in which nothing happens.
    """
    config, t = cache.config, cache.strides.t
    size = config.num_frames, config.height, config.width, config.fps
    found = torch.zeros(1 + (config.num_frames - 1) // t, num_parts)
    for cue in sound_cues(cache.scene(index), *size):
        frame, part = divmod((cue.seconds * config.fps - 1) / t, 1)  # of the first one's end
        if cue.kind == "impact" and 0 <= frame < len(found) - 1:
            found[int(frame) + 1, int(part * num_parts)] = 1
    return found


def places_in(cache: ToyboxCache, index: int) -> Tensor:
    """Where the one sprite of a clip of a cache is, [F, t, 2] as shares of its sides, or NaN."""
    config, t, scene = cache.config, cache.strides.t, cache.scene(index)
    size = config.num_frames, config.height, config.width, config.fps
    count = 1 + (config.num_frames - 1) // t
    if len(scene.actors) > 1:
        return torch.full((count, t, 2), torch.nan)
    moments = [0.0] * t + [float(frame) for frame in range(1, (count - 1) * t + 1)]
    (centres,) = actor_centres(scene, moments, *size)
    shares = torch.from_numpy(centres).float() / torch.tensor([config.width, config.height])
    return shares.view(count, t, 2)


def varied(clips: Followed, noise: float, draw: torch.Generator) -> Followed:
    """Clips as no camera took them, float32.

    They are smeared over time, softened, tinted, moved, mirrored, cut at their beginning and
    noised, more in some frames than in others.

    Args:
        clips: as they are.
        noise: its highest level; three in ten clips have none.
        draw: a CPU generator.
    """
    latents, impacts, places = clips.latents.float(), clips.impacts, clips.places
    B, C, frames, high, wide = latents.shape

    def luck(*shape: int) -> Tensor:
        return torch.rand(shape, generator=draw)

    def some() -> Tensor:
        return luck(B, 1, 1, 1, 1) < SOME

    x = smeared(latents, SMEARED * luck(B, 1, frames, 1, 1) * some())
    around = F.avg_pool3d(F.pad(x, (1, 1, 1, 1, 0, 0), mode="replicate"), (1, 3, 3), stride=1)
    x = x.lerp(around, SOFTENED * luck(B, 1, 1, 1, 1) * some())
    gain, shift = TINTED * torch.randn(2, B, C, 1, 1, 1, generator=draw)
    x = x * (1 + gain) + shift
    down, across = torch.randint(2 * MOVED + 1, (2,), generator=draw).tolist()
    x = F.pad(x, (MOVED, MOVED, MOVED, MOVED, 0, 0), mode="replicate")
    x = x[..., down : down + high, across : across + wide]
    places = places - torch.tensor([(across - MOVED) / wide, (down - MOVED) / high])
    if luck() < 0.5:
        x, places = x.flip(4), torch.stack([1 - places[..., 0], places[..., 1]], dim=-1)
    begins = int(luck() * frames / 2) if luck() < CUT else 0
    x, impacts, places = x[:, :, begins:], impacts[:, begins:], places[:, begins:]
    levels = noise * luck(B, 1, 1, 1, 1) * (luck(B, 1, 1, 1, 1) < 0.7)
    levels = levels * (1 - 0.6 * luck(B, 1, x.shape[2], 1, 1))
    return Followed(x.lerp(torch.randn(x.shape, generator=draw), levels), impacts, places)
