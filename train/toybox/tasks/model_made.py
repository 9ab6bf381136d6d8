"""What of cached clips a model makes: clips drawn anew, or as far as its first expert settles them.

Axes: B clips, C latent channels, F latent frames, h w latent rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from train.toybox.world.captions import caption
from train.toybox.world.scenes import Draws, Scene
from vidgen.core.errors import InputError

if TYPE_CHECKING:
    from train.toybox.redrawing import Redrawer

_AT_ONCE = {"cpu": 16, "cuda": 256}
"""Clips that a model makes at once, those that are drawn anew from one level."""


@dataclass(frozen=True)
class Redrawn:
    """Clips as a model draws them, from where noise leaves what happens in them as it was.

    Args:
        model: folder of the model, at whose frame rate the clips are, or at that at which it draws
            what is near to a picture.
        strengths: shares of its steps that draw clips anew, of which those made at once draw one.
    """

    model: str
    strengths: tuple[float, ...]

    def __post_init__(self) -> None:
        for strength in self.strengths or (0.0,):
            if not 0 < strength <= 1:
                raise InputError(f"strengths are {list(self.strengths)}; give shares above 0, up "
                                 "to 1, of a model's steps")


@dataclass(frozen=True)
class Settled:
    """Clips as a model has settled them at its own frame rate, which its expert at low noise draws.

    Every other one is settled behind its first frame, see `knows_first`.

    Args:
        model: folder of the model, at a multiple of whose frame rate the clips are.
        level: noise level of the last step at its own rate: of the clip noised to it, that step
            says what is settled.
    """

    model: str
    level: float

    def __post_init__(self) -> None:
        if not 0 < self.level < 1:
            raise InputError(f"level is {self.level}; a noise level lies between 0 and 1")


def drawn_anew(
    clips: Tensor, scenes: Sequence[Scene], how: Redrawn, fps: float, redrawer: Redrawer
) -> Tensor:
    """Latents [B, C, F, h, w] of scenes, of `fps` frames a second, drawn anew by `redrawer`."""
    made, batch = [], _at_once(redrawer)
    for start in range(0, len(scenes), batch):
        some = scenes[start : start + batch]
        seeds = [scene.seed for scene in some]
        strength = Draws(seeds[0], stream=43).choice(how.strengths)
        finer = round(fps / redrawer.fps)
        made.append(redrawer.latents(clips[start : start + batch], _told(some), seeds, strength,
                                     finer))
    return torch.cat(made)


def as_settled(
    clips: Tensor, scenes: Sequence[Scene], how: Settled, first: int, redrawer: Redrawer
) -> Tensor:
    """What `redrawer` settles of a cache's clips from number `first` on, at its own frame rate.

    Args:
        clips: their latents at that rate, [B, C, F, h, w].
        scenes: B of them.
        how: at which level.
        first: the number of the first one.
        redrawer: the model.

    Returns:
        Latents like those given.
    """
    made, batch = torch.empty_like(clips), 2 * _at_once(redrawer)
    for start in range(0, len(scenes), batch):
        for begin in (start, start + 1):
            some, rows = scenes[begin : start + batch : 2], slice(begin, start + batch, 2)
            if some:
                made[rows] = redrawer.guess(
                    clips[rows], _told(some), [scene.seed for scene in some], how.level,
                    knows_first=bool(knows_first(first + begin)),
                )
    return made


def knows_first(index: int | Tensor) -> Any:
    """Whether clip `index` of a cache is settled behind its first frame."""
    return index % 2 == 1


def _at_once(redrawer: Redrawer) -> int:
    return _AT_ONCE.get(redrawer.engine.device.type, _AT_ONCE["cpu"])


def _told(scenes: Sequence[Scene]) -> list[str]:
    return [caption(scene, scene.seed, detail="full") for scene in scenes]
