"""Tasks of a model, and settings of its own features, with limits and defaults.

A model's default values are `defaults.settings` in its `model.json`; a request overrides them in
`settings`. Each feature reads its settings by name; a row of the table here defines the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from vidgen.core.errors import InputError, ModelError, OptionError, nearest, quoted
from vidgen.core.request import OWN_AUDIO, Request
from vidgen.core.values import check_number

if TYPE_CHECKING:
    from vidgen.weights.folder import ModelFolder

SOUND = "sound"
"""Task of a model that generates sound for its clips."""
OPTIONS = {"image": "image", "first_frame_model": "image", "last_image": "last-image",
           "frame": "frames", "prefix": "extend", "mask": "mask", "strength": "video",
           "reference": "reference", "control": "control", "follow_audio": SOUND}
"""Task that each option of a request needs."""
Value = int | float | bool
Topic = Literal["sampling", "frames", "drawing", "windows", "sound"]
"""Guidance; given pictures; generation of a clip; long clips; a model's own sound."""


@dataclass(frozen=True)
class Setting:
    """Name, limits, defaults and conditions of one setting."""

    name: str
    topic: Topic
    kind: type[Value]
    help: str  # one line
    low: float = 0
    high: float = 1
    served: float | None = None  # largest value that a service accepts; None: `high`
    # value for models without the feature; None: they have none
    off: Value | None = None
    # name in a recipe's plan or the plan's guidance; empty: only the recipe's request has it
    recorded: str = ""
    needs: tuple[str, ...] = ()  # options of a request, one of which it needs
    follows: str = ""  # option of a request that resets the setting when it changes
    task: str = ""  # task of models that have the setting; empty: models whose defaults name it
    missing: str = ""  # refusal by models whose defaults don't name it; empty: they take it


SETTINGS: Mapping[str, Setting] = {setting.name: setting for setting in (
    Setting("image_guidance", "sampling", float, "guidance toward the given frames",
            high=100, served=20, recorded="known_scale", follows="guidance",
            missing="this model has no separate guidance of images"),
    Setting("image_guidance_reach", "sampling", int,
            "latent frames until image_guidance is full; 0: full everywhere",
            high=1000, off=0, recorded="reach"),
    Setting("reference_guidance", "sampling", float,
            "extra guidance toward reference images, in clips without given frames; 0 skips it",
            high=100, served=20, off=0.0, recorded="reference_scale", follows="reference",
            missing="this model has no separate guidance of references"),
    Setting("refine", "frames", int,
            "gradient steps that fit the first frame's latents to its picture; 0 is off",
            high=1000, served=100, off=0, recorded="refine_steps",
            needs=("image", "first_frame_model"),
            missing="this model doesn't refine first frames"),
    Setting("encode_passes", "frames", int,
            "passes of the VAE over given frames, each closer to them; 1 is the usual encoding",
            low=1, high=100, served=10, off=1, recorded="encode_passes"),
    Setting("temporal_upsampling", "drawing", int,
            "factor of temporal upsampling, once the motion is settled; 1 is off, and "
            "fastest", low=1, high=16, off=1, recorded="temporal_upsampling"),
    Setting("candidates", "drawing", int,
            "most candidates to draw until the verifier sees all that the prompt names",
            low=1, high=64, served=16, off=1, recorded="candidates"),
    Setting("regional_prompts", "drawing", float,
            "strength of regional prompts, one of each thing that the prompt names; 0 is off",
            off=0.0, recorded="regional_prompts"),
    Setting("anchor", "windows", bool,
            "condition later windows of a long clip on its first frame", task="anchor"),
    Setting("overlap", "windows", int, "latent frames that the windows of a long clip share",
            low=1, high=1000, off=3, task="extend"),
    Setting("colour_hold", "windows", float,
            "how far to match the colours of a window to those of the clip", off=0.5,
            task="extend"),
    Setting("audio_steps", "sound", int, "denoising steps of the model's own sound",
            low=1, high=1000, served=200, recorded="sound_steps"),
    Setting("audio_candidates", "sound", int, "number of sounds to generate; the best one is kept",
            low=1, high=16, off=1, recorded="sound_candidates"),
    Setting("audio_delay", "sound", float, "seconds by which the sound is delayed",
            off=0.0, recorded="sound_delay_s"),
)}  # fmt: skip


def settings_of(folder: ModelFolder) -> dict[str, Value]:
    """Return a model's settings with their defaults."""
    of_tasks = {each.name: True if each.off is None else each.off
              for each in SETTINGS.values() if each.task in folder.tasks}
    return dict(sorted({**of_tasks, **folder.defaults.settings}.items()))


def check_settings(request: Request, folder: ModelFolder) -> None:
    """Check the settings of a request and of the model's defaults.

    Raises:
        InputError: a setting doesn't exist, is outside its limits, or lacks a needed option.
        ModelError: the model's own defaults are invalid.
    """
    for name, value in folder.defaults.settings.items():
        if name not in SETTINGS:
            raise ModelError(f"{folder.name}: model.json has an unknown setting {name!r}; "
                             f"{nearest(name, SETTINGS)}")
        try:
            _check(SETTINGS[name], value)
        except InputError as error:
            raise ModelError(f"{folder.name}: model.json: {error}") from None
    for name, value in request.settings.items():
        if name not in SETTINGS:
            raise OptionError(f"{folder.name} has no setting {name!r}; "
                              f"{nearest(name, settings_of(folder))}", name, "unknown")
        _check(SETTINGS[name], value)
        needs = SETTINGS[name].needs
        if needs and not any(request.has(option) for option in needs):
            raise OptionError(f"{name} needs {' or '.join(needs)}; add it or leave {name} "
                              "out", name)


def _check(setting: Setting, value: Value) -> None:
    if setting.kind is bool:
        if not isinstance(value, bool | None):
            raise OptionError(f"{setting.name} is {quoted(value)}; give True or False",
                              setting.name)
    else:
        low, high = setting.kind(setting.low), setting.kind(setting.high)
        check_number(setting.name, value, low, high, whole=setting.kind is int)


def own_value(name: str, folder: ModelFolder) -> float:
    """Return a model's default value of a setting, or that of models without the feature."""
    value = folder.defaults.settings.get(name, SETTINGS[name].off)
    return SETTINGS[name].kind(value or 0)


def settled_value(
    name: str, request: Request, folder: ModelFolder, why: str | None = None
) -> float:
    """Return a setting's requested value, or else the model's default.

    A requested one raises OptionError if `why` gives a reason that it isn't available.
    """
    requested, off = request.settings.get(name), SETTINGS[name].off
    if name not in folder.defaults.settings:
        why = SETTINGS[name].missing or why
    if why is None:
        return own_value(name, folder) if requested is None else SETTINGS[name].kind(requested)
    if requested not in (None, off):
        raise OptionError(f"{name} is {requested}, but {why}; leave it out", name)
    return SETTINGS[name].kind(off or 0)


def recorded_settings(plan: Mapping[str, Any]) -> dict[str, Value]:
    """Return the settings in a recipe's plan, without those that a distilled model fixes."""
    facts, by_few_step = {**plan, **plan["guidance"]}, plan.get("few_step") is not None
    found = {each.name: facts.get(each.recorded, each.off) for each in SETTINGS.values()
             if each.recorded and not (by_few_step and each.topic == "sampling")}
    return {name: value for name, value in found.items()  # 0 sound steps: as many as the clip's
            if value is not None and value >= SETTINGS[name].low}


def check_tasks(request: Request, name: str, tasks: tuple[str, ...], *, both: bool = False) -> None:
    """Check that a model supports the options of a request, and has the inputs that it needs.

    A model without the task "text" needs a picture or clip; with `both` it needs a first and a last
    frame.

    Raises:
        InputError: names the model's tasks, or the missing input.
    """
    requested = {task: option for option, task in OPTIONS.items() if request.has(option)}
    for task, option in requested.items():
        if task not in tasks:
            from vidgen.weights.family import models_with

            raise InputError(f"model {name!r} doesn't support {option}, but {', '.join(tasks)}; "
                             f"models that do: {', '.join(models_with(task))}")
    if both and not {"image", "last-image"} <= requested.keys():
        raise InputError(f"model {name!r} needs a first and a last frame; give --image and "
                         "--last-image")
    if "text" not in tasks and not requested:
        raise InputError(f"model {name!r} needs a picture or clip; give one of "
                         f"{', '.join(f'--{task}' for task in tasks)}")


def makes_sound(request: Request, tasks: tuple[str, ...]) -> bool:
    """Return whether a model with these tasks generates the clip's sound itself."""
    is_requested = request.audio in (None, OWN_AUDIO) and request.audio_model is None
    return SOUND in tasks and is_requested


def words_alone(request: Request) -> bool:
    """Return whether the prompt alone defines a clip: no picture, and no other clip."""
    return not any(request.has(option) for option, task in OPTIONS.items() if task != SOUND)
