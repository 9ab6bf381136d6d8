"""Whether what a prompt gives another colour has it: its drawing in all of the world's tints.

The judge names sprites, whatever their colours. Here a sprite's drawing in the tint that it was
asked for has to fit what is shown better than in any other and in its own colours; see `shape`.
Nothing is learned.

Axes: T frames, H W pixel rows and columns.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from vidgen.evaluation.rulers.shape import Drawing, drawings_of, shape_fit
from vidgen.toybox.scenes import TINTS, Actor, Scene


def shows_tints(video: Tensor, scene: Scene) -> bool | None:
    """Whether a clip [3, T, H, W] in [-1, 1] shows all tinted sprites of its scene in their tints.

    Returns:
        None where the scene has none, or shows too little of one.
    """
    shown = [_best_tint(video, scene, actor) == actor.tint for actor in scene.actors
             if actor.tint is not None and _drawings(video, scene, actor)]
    return all(shown) if shown else None


def _best_tint(video: Tensor, scene: Scene, actor: Actor) -> str | None:
    """The tint in which an actor's drawing fits best, None for its own colours."""
    fits = {tint: shape_fit(video, _drawings(video, scene, replace(actor, tint=tint)))
            for tint in (None, *TINTS)}
    return max(fits, key=lambda tint: fits[tint] or -1)


def _drawings(video: Tensor, scene: Scene, actor: Actor) -> list[Drawing]:
    alone = replace(scene, actors=(actor,), relation=None, sound=())
    return drawings_of(alone, *video.shape[1:])
