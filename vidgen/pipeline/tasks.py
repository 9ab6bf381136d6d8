"""Tasks of a request, checked against those that a model learned."""

from __future__ import annotations

from vidgen.core.errors import InputError
from vidgen.core.request import OWN_AUDIO, Request

SOUND = "sound"
"""The task of a model that makes sound for its pictures."""
OPTIONS = {"image": "image", "first_frame_model": "image", "last_image": "last-image",
           "frame": "frames", "prefix": "extend", "mask": "mask", "strength": "video",
           "reference": "reference", "control": "control", "follow_audio": SOUND}
"""The task of each option of a request."""


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
