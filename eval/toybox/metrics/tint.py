"""Whether what a prompt gives another colour has it: its drawing in all of the world's tints.

The judge names sprites, whatever their colours. Here a sprite's drawing in the tint that it was
asked for has to fit what is shown better than in any other and in its own colours; see `shape`.
Nothing is learned.

Axes: T frames, H W pixel rows and columns.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from eval.toybox.metrics.shape import drawings_of, shape_fit
from train.toybox.world.scenes import TINTS, Actor, Scene


def shows_tints(video: Tensor, scene: Scene) -> bool | None:
    """Whether a clip [3, T, H, W] in [-1, 1] shows all tinted sprites of its scene in their tints.

    Returns:
        None where the scene has none, or shows too little of one.
    """
    fits = [(actor.tint, _fits(video, scene, actor)) for actor in scene.actors if actor.tint]
    shown = [max(found, key=found.__getitem__) == tint for tint, found in fits if found]
    return all(shown) if shown else None


def _fits(video: Tensor, scene: Scene, actor: Actor) -> dict[str | None, float]:
    """How well an actor's drawing fits in each tint, and, by None, in its own colours.

    Empty where the scene never shows enough of it.
    """
    found = {}
    for tint in (None, *TINTS):
        alone = replace(scene, actors=(replace(actor, tint=tint),), relation=None, sound=())
        fit = shape_fit(video, drawings_of(alone, *video.shape[1:]))
        if fit is None:
            return {}
        found[tint] = fit
    return found
