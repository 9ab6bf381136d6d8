"""A planned film: shots ready to render, and the requests that make them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidgen.core.errors import InputError, nearest
from vidgen.core.request import NO_AUDIO, OWN_AUDIO, Request
from vidgen.pipeline.settings import SOUND
from vidgen.story.script import Script, Shot
from vidgen.weights.lora import parse_option

if TYPE_CHECKING:
    from vidgen.weights.folder import ModelFolder

DRAFT_STEPS = 8
"""Most steps of a draft; half the film's where that is less."""


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a shot with one prompt: its address, and the number of frames it adds."""

    key: str
    prompt: str
    num_frames: int


@dataclass(frozen=True, slots=True)
class Take:
    """One version of a shot; the file of the last part holds the whole take."""

    seed: int
    parts: tuple[Part, ...]

    @property
    def key(self) -> str:
        """Address of the whole take."""
        return self.parts[-1].key


@dataclass(frozen=True, slots=True)
class ShotPlan:
    """A shot ready to render; `key` is the address of its single take, or of all its takes."""

    shot: Shot
    key: str
    num_frames: int
    takes: tuple[Take, ...]


@dataclass(frozen=True)
class FilmPlan:
    """All planned shots of a film, with their common size, rate and model."""

    script: Script
    folder: ModelFolder
    fps: Fraction
    size: tuple[int, int]  # (width, height) of all shots
    suffix: str = ".mp4"  # of the shots' files, which decides how they are encoded
    # dtype, quantize and tiles, as in `load`
    loading: Mapping[str, Any] = field(default_factory=dict)
    draft: bool = False  # whether shots are small and take few steps
    # by id, each after those that it needs
    shots: dict[str, ShotPlan] = field(default_factory=dict)

    @property
    def in_film(self) -> list[ShotPlan]:
        """The shots that the film shows, in order."""
        return [self.shots[shot.id] for shot in self.script.shots if shot.in_film]

    def needed(self, names: list[str]) -> list[ShotPlan]:
        """Return these shots and all that they need, in the order of rendering; all for no names.

        Raises:
            InputError: an unknown name.
        """
        wanted, ahead = set[str](), list(names)
        while ahead:
            name = ahead.pop()
            if name not in self.shots:
                raise InputError(f"unknown shot {name!r}; {nearest(name, self.shots)}")
            if name not in wanted:
                wanted.add(name)
                ahead += self.shots[name].shot.needs
        return [plan for name, plan in self.shots.items() if not names or name in wanted]

    def makes_sound(self, shot: Shot) -> bool:
        """Return whether the model makes a shot's sound with its picture."""
        return SOUND in self.folder.tasks and (shot.sound is None or shot.sound.file is None)

    def words(self, shot: Shot, index: int) -> str:
        """Return a shot's prompt as the model gets it, with the sound effects that it makes."""
        text = self.script.words(shot, shot.prompt[index].prompt)
        effects = shot.sound.effects if shot.sound is not None and self.makes_sound(shot) else None
        return text if effects is None else f"{text}, with the sound of {effects}"

    def request(self, shot: Shot, seed: int, index: int, num_frames: int) -> Request:
        """Return the request for the part of a shot that adds `num_frames` under prompt `index`.

        `render` adds files of other shots.

        Raises:
            InputError: a setting out of its range.
        """
        script, tasks = self.script, self.folder.tasks
        option = {name: script.option(shot, name)
                  for name in ("negative", "guidance", "sampler", "shift", "steps")}
        if self.draft:
            steps = self.folder.defaults.num_steps if option["steps"] is None else option["steps"]
            few, few_step = min(DRAFT_STEPS, -(-steps // 2)), self.folder.few_step
            if few_step is not None and all(v is None for k, v in option.items() if k != "steps"):
                few = few_step.num_steps
            option["steps"] = min(steps, few)
        for name, key, part in (("image", "first_frame", 0),
                                ("last_image", "last_frame", len(shot.prompt) - 1)):
            if index == part and isinstance(file := getattr(shot, key), Path):
                option[name] = str(script.file(file))
        if "reference" in tasks:
            option["reference"] = tuple(str(script.file(f)) for f in references(script, shot))
        return Request(
            prompt=self.words(shot, index), seed=seed, size=self.size, fps=self.fps,
            seconds=float(num_frames / self.fps),
            audio=OWN_AUDIO if self.makes_sound(shot) else NO_AUDIO,
            lora=tuple(_lora(script, each) for each in loras(script, shot)), **option)


def references(script: Script, shot: Shot) -> list[Path]:
    """Return the pictures of a shot's characters and places, each once."""
    known = script.characters | script.places
    return list(dict.fromkeys(file for name in script.cast(shot) for file in known[name].reference))


def loras(script: Script, shot: Shot) -> list[str]:
    """Return the adapters of a shot's characters, then its own or the film's, each once."""
    known = script.characters
    own = [each for name in script.cast(shot) if name in known for each in known[name].lora]
    return list(dict.fromkeys([*own, *script.option(shot, "lora")]))


def _lora(script: Script, text: str) -> str:
    path = script.file(parse_option(text).path)
    return str(path) + text[len(str(parse_option(text).path)) :] if path.exists() else text
