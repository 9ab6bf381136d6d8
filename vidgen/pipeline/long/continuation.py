"""Options of a clip that continues another one: from its recipe, its length and its size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidgen.core.errors import InputError
from vidgen.core.request import MAX_SECONDS, Request
from vidgen.pipeline.recorded import recorded_sampling
from vidgen.pipeline.settings import settings_to_go_on

if TYPE_CHECKING:
    from vidgen.weights.folder import ModelFolder


@dataclass(frozen=True)
class MadeOfClips:
    """A kind of files that consist of several clips, so that no plan of one clip is in them."""

    name: str  # in a sentence
    again: str  # the command that makes one again
    folder: str  # suffix of the folder next to it that holds its clips


_MADE_OF_CLIPS = {
    "film": MadeOfClips("a film", "vidgen script makes it again from its script", ".shots"),
    "sweep": MadeOfClips("a sweep's", "the same vidgen sweep makes it again", ".cells"),
}


def made_of_clips(recipe: Mapping[str, Any]) -> MadeOfClips | None:
    """Return the kind of a recipe that consists of several clips; None for one clip."""
    kinds = [kind for key, kind in _MADE_OF_CLIPS.items() if key in recipe]
    return kinds[0] if kinds and "plan" not in recipe else None


def own_options(
    recipe: Mapping[str, Any], model: str | None = None, audio: Any = None
) -> dict[str, Any]:
    """Return the options with which a clip continues, from its recipe as `read_recipe` returns it.

    With another `model` than the recipe's they are its prompt and marks alone; a film or sweep has
    none. With sound given as `audio` the model's own sound isn't continued.

    Raises:
        InputError: the recipe is damaged.
    """
    if made_of_clips(recipe) is not None:
        return {}
    try:
        return _own_options(recipe, model, audio)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"its recipe is damaged ({error}); extend a copy that is whole") from error


def _own_options(recipe: Mapping[str, Any], model: str | None, audio: Any) -> dict[str, Any]:
    plan, asked = recipe["plan"], recipe.get("request", {})
    marks = {"label": asked.get("label", "none")}
    marks |= {"aigc": asked["aigc"]} if "aigc" in asked else {}
    if model not in (None, recipe["model"]["name"], recipe["model"].get("source")):
        return {"prompt": plan["prompt"], **marks}
    own = {
        "prompt": plan["prompt"], "negative": plan["negative"], "seed": plan["seed"], **marks,
        **recorded_sampling(plan), "cache": asked.get("cache"), "readings": asked.get("readings"),
        "settings": settings_to_go_on(plan, asked.get("settings", {}), sound=audio is None),
        "lora": [
            f"{lora['path']}:{lora['weight']}" + (f"@{lora['expert']}" if lora["expert"] else "")
            for lora in recipe.get("loras", ())
        ],
    }
    if "sampler" not in own:  # a scheduler of diffusers, which a command line can't give
        own["shift"] = None
    if (plan.get("student") or {}).get("roll"):  # its steps are of no other
        own["steps"] = None
    return {name: value for name, value in own.items() if value not in (None, [], {})}


def with_own_options(given: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the given options over those of the recipe, setting by setting."""
    settings = {**own.get("settings", {}), **given.get("settings", {})}
    return {**own, **given, "settings": settings}


def rate_of_still(recipe: Mapping[str, Any] | None, folder: ModelFolder) -> Fraction:
    """Return the frames per second at which a picture continues: its recipe's or the model's."""
    if recipe is not None and "fps" in recipe.get("plan", ()):
        return Fraction(recipe["plan"]["fps"])
    return Fraction(folder.defaults.fps).limit_denominator(1001)


def lengthened(clip: str | Path, num_frames: int, fps: Fraction, added_s: float) -> dict[str, Any]:
    """Return the options that lengthen a clip: prefix, fps and seconds of the whole.

    Raises:
        InputError: less than a frame is added, or the whole exceeds the limit of a request.
    """
    added = round(added_s * fps)
    if added < 1:
        raise InputError(f"seconds is {added_s}, less than a frame at {fps} fps")
    seconds = float((num_frames + added) / fps)
    if seconds > MAX_SECONDS:
        raise InputError(f"seconds is {added_s}, which makes the clip {seconds:g} s long; give so "
                         f"many that it has {MAX_SECONDS} at most")
    return {"prefix": str(clip), "fps": fps, "seconds": seconds}


def at_own_size(request: Request, size: tuple[int, int], folder: ModelFolder) -> Request:
    """Request the (width, height) of the continued clip if the model can make it."""
    vae, dit = folder.components["vae"].config, folder.components["transformer"].config
    side = vae.strides.hw * dit.patch_size
    fits = all(length % side == 0 for length in size)
    return request.replace(size=size) if fits else request
