"""What a model can do that others can't: its tasks, and its settings, with limits and defaults.

A model's own values are `defaults.settings` of its `model.json`; a request gives others in
`settings`. Each feature's file reads its own settings by name; all that else needs to be known of a
setting is a row of the table here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from vidgen.core.errors import InputError, ModelError, OptionError, nearest
from vidgen.core.request import OWN_AUDIO, Request
from vidgen.core.values import check_flag, check_number

if TYPE_CHECKING:
    from vidgen.weights.folder import ModelFolder

SOUND = "sound"
"""The task of a model that makes sound for its pictures."""
OPTIONS = {"image": "image", "first_frame_model": "image", "last_image": "last-image",
           "frame": "frames", "prefix": "extend", "mask": "mask", "strength": "video",
           "reference": "reference", "control": "control", "follow_audio": SOUND}
"""The task of each option of a request."""
Value = int | float | bool
Topic = Literal["sampling", "frames", "drawing", "windows", "sound"]
"""Guidance; pictures that are given; what is drawn of a clip; long clips; a model's own sound."""


@dataclass(frozen=True)
class Setting:
    """A row of the table."""

    name: str
    topic: Topic
    kind: type[Value]
    help: str  # one line
    low: float = 0
    high: float = 1
    served: float | None = None  # the greatest value that a service takes; None: `high`
    # value of a model that has no such feature; None: such a model has no value for it
    off: Value | None = None
    # its name in a recipe's plan or its guidance; empty: it stands in the recipe's request alone
    recorded: str = ""
    needs: tuple[str, ...] = ()  # options of a request, of which it needs one
    follows: str = ""  # option of a request; one that changes leaves the setting open again
    task: str = ""  # task of the models that have it; empty: the model's defaults name it


SETTINGS: Mapping[str, Setting] = {setting.name: setting for setting in (
    Setting("image_guidance", "sampling", float, "how strongly given frames are followed",
            high=100, served=20, recorded="known_scale", follows="guidance"),
    Setting("image_guidance_reach", "sampling", int,
            "latent frames from a first frame to where that is full; 0: everywhere",
            high=1000, off=0, recorded="reach"),
    Setting("reference_guidance", "sampling", float,
            "extra guidance toward reference images, in clips without given frames; 0 skips it",
            high=100, served=20, off=0.0, recorded="reference_scale", follows="reference"),
    Setting("refine", "frames", int,
            "gradient steps that bring a first frame's latents nearer to it; 0 is off",
            high=1000, served=100, off=0, recorded="refine_steps",
            needs=("image", "first_frame_model")),
    Setting("encode_passes", "frames", int,
            "how often the VAE encodes what is given, nearer to it each time; 1 is as usual",
            low=1, high=100, served=10, off=1, recorded="encode_passes"),
    Setting("oversampling", "drawing", int,
            "latent frames drawn for each one of the clip's, once its motion is settled; 1 is "
            "fastest", low=1, high=16, off=1, recorded="oversampling"),
    Setting("candidates", "drawing", int,
            "most that are drawn of a clip until the verifier sees what the prompt names",
            low=1, high=64, served=16, off=1, recorded="candidates"),
    Setting("binding", "drawing", float,
            "how strongly each thing that the prompt names is drawn by its own words; 0 is off",
            off=0.0, recorded="binding"),
    Setting("anchor", "windows", bool,
            "whether later windows of a long clip are shown its first frame", task="anchor"),
    Setting("overlap", "windows", int, "latent frames that the windows of a long clip share",
            low=1, high=1000, off=3, task="extend"),
    Setting("colour_hold", "windows", float,
            "how far the colours of a window are matched to those of the clip", off=0.5,
            task="extend"),
    Setting("audio_steps", "sound", int, "denoising steps of the model's own sound",
            low=1, high=1000, served=200, recorded="sound_steps"),
    Setting("audio_candidates", "sound", int, "how many such sounds are made, of which one is kept",
            low=1, high=16, off=1, recorded="sound_candidates"),
    Setting("audio_delay", "sound", float, "seconds by which that sound follows its picture",
            off=0.0, recorded="sound_delay_s"),
)}  # fmt: skip


def settings_of(folder: ModelFolder) -> dict[str, Value]:
    """Return a model's settings with their defaults."""
    taught = {each.name: True if each.off is None else each.off
              for each in SETTINGS.values() if each.task in folder.tasks}
    return dict(sorted({**taught, **folder.defaults.settings}.items()))


def check_settings(request: Request, folder: ModelFolder) -> None:
    """Refuse settings that don't exist, values out of their limits, and what lacks its option.

    Raises:
        InputError: the setting, its limits, and what to do.
        ModelError: the model's own defaults are wrong.
    """
    for name, value in folder.defaults.settings.items():
        if name not in SETTINGS:
            raise ModelError(f"{folder.name}: model.json gives a setting {name!r}; "
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
            raise OptionError(f"{name} needs {' or '.join(needs)}; add it or leave this out", name)


def _check(setting: Setting, value: Value) -> None:
    if setting.kind is bool:
        check_flag(setting.name, value)
    else:
        low, high = setting.kind(setting.low), setting.kind(setting.high)
        check_number(setting.name, value, low, high, whole=setting.kind is int)


def own_value(name: str, folder: ModelFolder) -> float:
    """Return a model's own value of a setting, or the one that stands for none."""
    value = folder.defaults.settings.get(name, SETTINGS[name].off)
    return SETTINGS[name].kind(value or 0)


def settled_value(
    name: str, request: Request, folder: ModelFolder, why: str | None = None
) -> float:
    """Return a setting as it is asked for, or the model's own.

    `why` is the reason that it can't be had, if any; then a request for it raises InputError.
    """
    asked, off = request.settings.get(name), SETTINGS[name].off
    if why is None:
        return own_value(name, folder) if asked is None else SETTINGS[name].kind(asked)
    if asked not in (None, off):
        raise OptionError(f"{name} is {asked}, but {why}; leave it out", name)
    return SETTINGS[name].kind(off or 0)


def replayed_settings(
    plan: Mapping[str, Any], asked: Mapping[str, Value], options: frozenset[str]
) -> dict[str, Value]:
    """Return the settings that make a recipe's clip again: what its plan settled, else as asked.

    Settings that need other `options` than those of the clip's inputs are left out.
    """
    kept = {name: value for name, value in asked.items()
            if name not in SETTINGS or not SETTINGS[name].recorded}
    return kept | {name: value for name, value in _recorded(plan).items()
                   if not SETTINGS[name].needs or not options.isdisjoint(SETTINGS[name].needs)}


def _recorded(plan: Mapping[str, Any]) -> dict[str, Value]:
    """Return the settings that a plan holds, without sampling that a student settled."""
    facts, by_student = {**plan, **plan["guidance"]}, plan.get("student") is not None
    found = {each.name: facts.get(each.recorded, each.off) for each in SETTINGS.values()
             if each.recorded and not (by_student and each.topic == "sampling")}
    return {name: value for name, value in found.items()  # 0 steps of sound: as the picture's
            if value is not None and value >= SETTINGS[name].low}


def settings_to_go_on(
    plan: Mapping[str, Any], asked: Mapping[str, Value], *, sound: bool
) -> dict[str, Value]:
    """Return the settings of a clip that goes on: guidance as it was settled, others as asked for.

    Those of sound are among them if the model goes on making it.
    """
    own = {name: value for name, value in _recorded(plan).items()
           if SETTINGS[name].topic == "sampling"
           and not (SETTINGS[name].follows and value == SETTINGS[name].off)}
    topics = ("drawing", "sound") if sound else ("drawing",)
    return own | {name: value for name, value in asked.items()
                  if name in SETTINGS and SETTINGS[name].topic in topics}


def check_tasks(request: Request, name: str, tasks: tuple[str, ...], *, both: bool = False) -> None:
    """Refuse what a model never learned, and a request without an input that it needs.

    A model without the task "text" needs a picture or clip, one of `both` a first and a last frame.

    Raises:
        InputError: names the model's tasks, or the missing input.
    """
    asked = {task: option for option, task in OPTIONS.items() if request.has(option)}
    for task, option in asked.items():
        if task not in tasks:
            from vidgen.weights.family import models_with

            raise InputError(f"model {name!r} can't take {option}: it learned {', '.join(tasks)}; "
                             f"models that can: {', '.join(models_with(task))}")
    if both and not {"image", "last-image"} <= asked.keys():
        raise InputError(f"model {name!r} goes from one picture to another; give --image and "
                         "--last-image")
    if "text" not in tasks and not asked:
        raise InputError(f"model {name!r} starts from what it is shown; give one of "
                         f"{', '.join(f'--{task}' for task in tasks)}")


def makes_sound(request: Request, tasks: tuple[str, ...]) -> bool:
    """Return whether a model of such tasks makes the clip's sound itself."""
    asked = request.audio in (None, OWN_AUDIO) and request.audio_model is None
    return SOUND in tasks and asked


def words_alone(request: Request) -> bool:
    """Return whether the prompt alone defines a clip: no picture, and no other clip."""
    return not any(request.has(option) for option, task in OPTIONS.items() if task != SOUND)
