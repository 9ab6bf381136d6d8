"""Read a clip's recipe: facts that decide its frames, and options that repeat or continue it."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidgen.core.config import flattened
from vidgen.core.errors import InputError, OptionError, VidgenError
from vidgen.core.request import MAX_SECONDS, Request
from vidgen.core.shapes import Tiles
from vidgen.pipeline.settings import SETTINGS, recorded_settings

if TYPE_CHECKING:
    from vidgen.media.ending import Ending
    from vidgen.weights.folder import ModelFolder

FACTS = {"vidgen", "model", "plan", "scheduler", "frame_times_s", "inputs", "loras", "dtype",
         "offload", "quantize", "attention", "kernels", "device", "devices", "machine", "diffusers",
         "transformers", "encoder", "hand_over", "sound", "label"}
"""Entries that frames or sound depend on; others vary between runs or repeat these."""
_DECISIVE = FACTS - {"offload", "encoder", "hand_over"}
"""Entries that must match to resume a job; `offload` may change after running out of memory."""
_OF_THE_PICTURE = ("fit", "size", "fps", "word_normalisation")
"""Settled options that another part of a clip doesn't take over."""


@contextmanager
def reading() -> Iterator[None]:
    """Raise InputError for any error that a damaged or edited recipe causes inside the block."""
    try:
        yield
    except VidgenError:
        raise
    except Exception as error:
        raise InputError(f"the clip's recipe is damaged ({type(error).__name__}: {error}); give a "
                         "copy of the clip that is whole") from error


def differences(
    recipe: Mapping[str, Any], other: Mapping[str, Any], names: Collection[str] = FACTS
) -> dict[str, tuple[Any, Any]]:
    """Return the differing entries that frames may depend on, as both values by dotted name."""
    old, new = (flattened(_facts(each, names)) for each in (recipe, other))
    pairs = {name: (old.get(name), new.get(name)) for name in sorted({**old, **new})}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def decisive_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return the differences that prevent resuming a job: "plan.seed was 7, is 8"."""
    pairs = differences(old, new, _DECISIVE)
    names = sorted(pairs.keys() - {"machine.python"}, key=lambda name: (name != "vidgen", name))
    return [f"{name} was {_short(pairs[name][0])}, is {_short(pairs[name][1])}" for name in names]


def _facts(recipe: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Return entries of a recipe, with hashes instead of names and paths."""
    facts = {name: recipe[name] for name in names if recipe.get(name) is not None}
    facts["model"] = {name: recipe.get("model", {}).get(name) for name in ("sha256", "class")}
    for name, keys in (("inputs", ("option",)), ("loras", ("weight", "expert"))):
        known = (record for record in recipe.get(name, ()) if "sha256" in record)
        facts[name] = [" ".join(str(record[key]) for key in (*keys, "sha256") if record.get(key))
                       for record in known]
    return facts


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def recorded_marks(recipe: Mapping[str, Any] | None) -> dict[str, str]:
    """Return the label and the AIGC producer of a recipe's file, where it has them."""
    known = recipe or {}
    return {name: value for name in ("label", "aigc") if isinstance(value := known.get(name), str)}


def lora_option(path: Any, record: Mapping[str, Any]) -> str:
    """Return the option `lora` of an adapter's file with the weight and expert of its record."""
    return f"{path}:{record['weight']}" + (f"@{record['expert']}" if record["expert"] else "")


def recorded_tiles(plan: Mapping[str, Any]) -> str:
    """Return the option `tiles` of a recipe's plan."""
    tiles = plan.get("tiles")
    return "none" if tiles is None else str(Tiles(tiles["rows"], tiles["columns"]))


def recorded_word_normalisation(plan: Mapping[str, Any]) -> str:
    """Return the option `word_normalisation`, the normalised words of a recipe's plan."""
    pairs = plan.get("word_normalisation", ())
    return ",".join(f"{word}={known}" for word, known in pairs) or "none"


def settled_options(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that a recipe's plan settles, without its length and inputs.

    A diffusers pipeline settles most options itself, a distilled model all of sampling but the
    steps, and a scheduler of diffusers the sampler and the shift.
    """
    plan = recipe["plan"]
    options = {name: plan[name] for name in ("prompt", "negative", "seed", "fit")}
    if "class" in recipe["model"]:
        return options
    options |= {"steps": plan["num_steps"], "size": (plan["width"], plan["height"]),
                "fps": plan["fps"], "word_normalisation": recorded_word_normalisation(plan),
                "settings": recorded_settings(plan)}
    if plan.get("few_step") is not None:
        return options
    if not recipe.get("scheduler"):
        options |= {name: plan[name] for name in ("sampler", "shift")}
    guidance = plan["guidance"]
    return options | {"guidance": guidance["scale"], "guidance_low": guidance["low_scale"],
                      "guidance_interval": tuple(guidance["interval"]),
                      "guidance_rescale": guidance["rescale"]}


def is_of_clips(recipe: Mapping[str, Any]) -> bool:
    """Return whether a recipe is of a film or a sweep, and so holds no plan of one clip."""
    return "plan" not in recipe and ("film" in recipe or "sweep" in recipe)


def own_options(
    recipe: Mapping[str, Any], model: str | None = None, audio: Any = None
) -> dict[str, Any]:
    """Return the options with which a clip continues, from its recipe as `read_recipe` returns it.

    With another `model` than the recipe's they are the prompt alone; for a film or sweep they are
    empty. With `audio` given, the model's own sound isn't continued.

    Raises:
        InputError: the recipe is damaged.
    """
    if is_of_clips(recipe):
        return {}
    with reading():
        if model not in (None, recipe["model"]["name"]):
            return {"prompt": recipe["plan"]["prompt"]}
        requested, own = recipe.get("request", {}), settled_options(recipe)
        topics = ("drawing", "sound") if audio is None else ("drawing",)
        settings = {name: value for name, value in own["settings"].items()
                    if SETTINGS[name].topic == "sampling"
                    and not (SETTINGS[name].follows and value == SETTINGS[name].off)}
        settings |= {name: value for name, value in requested.get("settings", {}).items()
                     if name in SETTINGS and SETTINGS[name].topic in topics}
        own = {name: value for name, value in own.items() if name not in _OF_THE_PICTURE}
        own |= {name: requested.get(name) for name in ("cache", "word_normalisation")}
        own |= {"settings": settings,
                "lora": [lora_option(lora["path"], lora) for lora in recipe.get("loras", ())]}
    return {name: value for name, value in own.items() if value not in (None, [], {})}


def own_loading(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that load a recipe's model; raise InputError if it is damaged."""
    if is_of_clips(recipe):
        return {}
    with reading():
        model = recipe["model"].get("source") or recipe["model"]["name"]
        return {"model": model, "quantize": recipe.get("quantize"), "dtype": recipe.get("dtype")}


def lengthened(
    clip: str | Path, ending: Ending, given: Mapping[str, Any], added_s: float, folder: ModelFolder
) -> Request:
    """Return the request that continues a clip: given options, then those of its recipe.

    The size is the clip's own if the model can make it; a picture's rate is that of its recipe or
    the model's default.

    Raises:
        InputError: a damaged recipe, no prompt, less than a frame to add, or a whole beyond the
            limit of a request.
    """
    fps, recipe = ending.fps, ending.recipe or {}
    own = own_options(recipe, folder.name, given.get("audio")) if recipe else {}
    options = {**own, **given, "settings": own.get("settings", {}) | given.get("settings", {})}
    if "prompt" not in options:
        raise InputError(f"{clip} records no prompt; give --prompt")
    if ending.num_frames == 1:
        shown = recipe.get("plan", {}).get("fps", folder.defaults.fps)
        fps = Fraction(shown).limit_denominator(1001)
    added = round(added_s * fps)
    if added < 1:
        raise OptionError(f"seconds is {added_s}, less than a frame at {fps} fps", "seconds")
    seconds = float((ending.num_frames + added) / fps)
    if seconds > MAX_SECONDS:
        raise OptionError(f"seconds is {added_s}, which makes the clip {seconds:g} s long; give "
                          f"fewer, so that it has at most {MAX_SECONDS} s", "seconds")
    vae, dit = folder.components["vae"].config, folder.components["transformer"].config
    if all(side % (vae.strides.hw * dit.patch_size) == 0 for side in ending.size):
        options["size"] = ending.size
    options |= {"prefix": str(clip), "fps": fps, "seconds": seconds}
    return Request.of(options.pop("prompt"), options)
