"""The script of a film: its shots, in order, and what they share.

Docstrings tell each key's meaning; the published JSON Schema is made of them. What can be judged
within one shot is judged when it is made, what needs the whole script in `read.check_script`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from vidgen.core.config import ONE, called
from vidgen.core.errors import InputError, nearest
from vidgen.story.elements import (
    Camera,
    Caption,
    Character,
    Music,
    Narration,
    Place,
    Project,
    Scene,
    ShotFrame,
    Sound,
    TimedPrompt,
    Transition,
    check_above_zero,
    check_takes,
)

VERSION = 1
NAME = re.compile(r"\w[\w-]{0,63}")
"""Of shots, characters, places and scenes."""
_BRACES = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


@dataclass(frozen=True, slots=True)
class Shot:
    """One shot.

    Attributes:
        prompt: what is to be seen; or several, each with its time, the first at 0.
        id: by which others name it; default the prompt's first words.
        scene: id of its scene.
        place: id of its place; default the scene's.
        characters: ids of characters that appear though no prompt names them.
        duration: seconds.
        frames: number of frames instead; 1 is a still.
        negative: what is not to be seen.
        seed: default that of its first character, else drawn from the film's and the id.
        takes: how many to make, of seeds N, N+1, ...; the best is kept.
        steps: denoising steps.
        guidance: how strongly the prompt is followed.
        sampler: name of a sampler.
        shift: of the noise schedule.
        lora: adapters, each PATH[:WEIGHT].
        camera: what it does.
        first_frame: a picture, or a frame of another shot.
        last_frame: a picture, or a frame of another shot.
        continue_from: id of a shot whose last latents it goes on from.
        in_film: false for one that is made for other shots alone.
        sound: what is to be heard.
        narration: what is spoken.
        music: from here on.
        caption: text in the picture.
        transition: how it follows the shot before.
    """

    prompt: tuple[TimedPrompt, ...] = field(metadata=ONE)
    id: str = ""
    scene: str | None = None
    place: str | None = None
    characters: tuple[str, ...] = field(default=(), metadata=ONE)
    duration: float | None = field(default=None, metadata=called("seconds"))
    frames: int | None = None
    negative: str | None = None
    seed: int | None = None
    takes: int | None = None
    steps: int | None = None
    guidance: float | None = None
    sampler: str | None = None
    shift: float | None = None
    lora: tuple[str, ...] = field(default=(), metadata=ONE)
    camera: Camera | None = None
    first_frame: Path | ShotFrame | None = field(default=None, metadata=called("image"))
    last_frame: Path | ShotFrame | None = field(default=None, metadata=called("last_image"))
    continue_from: str | None = None
    in_film: bool = True
    sound: Sound | None = field(default=None, metadata=called("audio"))
    narration: tuple[Narration, ...] = field(default=(), metadata=ONE | called("say"))
    music: Music | None = None
    caption: tuple[Caption, ...] = field(default=(), metadata=ONE)
    transition: Transition | None = None

    def __post_init__(self) -> None:
        if not self.prompt:
            raise InputError("the list of prompts is empty; say what is to be seen")
        if self.id and not NAME.fullmatch(self.id):
            raise InputError(f"id {self.id!r} is no name; give up to 64 letters, digits, _ and -")
        times = [each.at for each in self.prompt]
        if times[0] != 0 or any(a >= b for a, b in pairwise(times)):
            raise InputError(f"the prompts begin at {', '.join(f'{t:g}' for t in times)} s; the "
                             "first must begin at 0 and each later than the one before")
        if self.duration is not None and self.frames is not None:
            raise InputError("duration and frames are both given; give one of them")
        if self.continue_from is not None and self.first_frame is not None:
            raise InputError("continue_from and first_frame are both given; the shot begins with "
                             "one of them")
        check_takes(self.takes)
        check_above_zero("duration", self.duration, 3600)

    @property
    def needs(self) -> tuple[str, ...]:
        """Ids of the shots that must be there before it."""
        shown = (each.shot for each in (self.first_frame, self.last_frame)
                 if isinstance(each, ShotFrame))
        return (*((self.continue_from,) if self.continue_from is not None else ()), *shown)


@dataclass(frozen=True, slots=True)
class Script:
    """A film as its shots, in order.

    Attributes:
        shots: one after the other.
        version: of the format.
        project: what holds for the whole film.
        characters: by name.
        places: by name.
        scenes: by id.
    """

    shots: tuple[Shot, ...]
    version: int = VERSION
    project: Project = field(default_factory=Project)
    characters: dict[str, Character] = field(default_factory=dict)
    places: dict[str, Place] = field(default_factory=dict)
    scenes: dict[str, Scene] = field(default_factory=dict)
    path: Path = field(default=Path("script"), init=False, compare=False)
    lines: Mapping[str, int] = field(default_factory=dict, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not self.shots:
            raise InputError("there are no shots; add one, such as {prompt: a cat walks}")

    @classmethod
    def read(cls, path: str | Path) -> Script:
        """Read a script and check it: YAML, JSON, CSV, or a text file of one prompt a line.

        Raises:
            InputError: what is wrong, with line, key and remedy.
        """
        from vidgen.story.read import read_script

        return read_script(path)

    def file(self, path: Path) -> Path:
        """A file that the script names, from the script's own folder."""
        return self.path.parent / path

    def where(self, shot: Shot) -> str:
        """A shot's place, for messages."""
        line = f", line {self.lines[shot.id]}" if shot.id in self.lines else ""
        return f"{self.path}{line}: shot {shot.id!r}"

    def option(self, shot: Shot, name: str) -> Any:
        """A shot's own setting, or the film's default."""
        own = getattr(shot, name)
        return own if own not in (None, ()) else getattr(self.project.defaults, name)

    def names_in(self, text: str) -> Iterator[str]:
        """Names that a prompt refers to, in order.

        Raises:
            InputError: a brace that belongs to none.
        """
        for found in _BRACES.finditer(text):
            if found[0] in ("{", "}"):
                raise InputError(f"a single {found[0]} stands in the prompt {text!r}; write "
                                 f"{{name}}, or {found[0] * 2} for the sign itself")
            if found[1] is not None:
                yield found[1]

    def described(self, shot: Shot, text: str) -> str:
        """A prompt with descriptions in place of names."""
        place = shot.place or self._scene(shot).place
        known = {name: each.description for name, each in (self.characters | self.places).items()}
        if place is not None:
            known["place"] = self.places[place].description

        def meant(found: re.Match[str]) -> str:
            return found[0][0] if found[1] is None else known[found[1]]

        return _BRACES.sub(meant, text)

    def words(self, shot: Shot, text: str, rewritten: Mapping[str, str] | None = None) -> str:
        """What a model is told of a prompt: what it describes, then camera and styles.

        Args:
            shot: that the prompt belongs to.
            text: of the prompt.
            rewritten: texts that take the place of what prompts describe.
        """
        seen = self.described(shot, text)
        seen = (rewritten or {}).get(seen, seen)
        camera: Camera | None = self.option(shot, "camera")
        behind = [part for part in (camera and camera.words, self._scene(shot).style,
                                    self.project.style) if part]
        return ", ".join([seen.rstrip(".") if behind else seen, *behind])

    def cast(self, shot: Shot) -> list[str]:
        """Names of the characters and places in a shot, each once, in order."""
        names = [*shot.characters, *(n for each in shot.prompt for n in self.names_in(each.prompt))]
        place = shot.place or self._scene(shot).place
        return list(dict.fromkeys(place if name == "place" and place else name for name in names))

    def _scene(self, shot: Shot) -> Scene:
        return self.scenes.get(shot.scene or "", Scene())

    def order(self) -> list[Shot]:
        """The shots as they stand, but each behind those that it needs.

        Raises:
            InputError: shots that need each other, or one that isn't there.
        """
        known = {shot.id: shot for shot in self.shots}
        found: dict[str, Shot] = {}
        for shot in self.shots:
            ahead, way = [(shot, iter(shot.needs))], {shot.id: shot}
            if shot.id in found:
                continue
            while ahead:
                now, needs = ahead[-1]
                wanted = next((name for name in needs if name not in found), None)
                if wanted is None:
                    found[now.id] = now
                    ahead.pop()
                    del way[now.id]
                elif wanted in way:
                    names = [*way][[*way].index(wanted) :]
                    raise InputError(f"{self.where(now)} goes round in a circle: "
                                     f"{' needs '.join([*names, wanted])}; leave one of them out")
                elif wanted not in known:
                    raise InputError(f"{self.where(now)} needs the unknown shot {wanted!r}; "
                                     f"{nearest(wanted, known)}")
                else:
                    ahead.append((known[wanted], iter(known[wanted].needs)))
                    way[wanted] = known[wanted]
        return [*found.values()]
