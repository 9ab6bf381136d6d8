"""The script of a film: its shots, in order, and what they share.

YAML and JSON files hold a script as it is, plain lists a prompt for each line. A shot checks
itself, `_check` what needs the whole script.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar

from vidgen.core.config import ONE, build
from vidgen.core.config_file import Located, load_text, load_yaml
from vidgen.core.errors import InputError, located, nearest
from vidgen.core.request import OWN_FILE
from vidgen.core.runtime import slug
from vidgen.story.elements import (
    Camera,
    Caption,
    Character,
    Defaults,
    Music,
    Narration,
    Place,
    Project,
    Scene,
    ShotFrame,
    Sound,
    TimedPrompt,
)

VERSION = 1
NAME = re.compile(r"\w[\w-]{0,63}")
"""Names of shots, characters, places and scenes."""
_LIST = ".txt"
_SUFFIXES = (".yaml", ".yml", ".json", _LIST)
MAX_SHOTS = 100_000
SILENCE = Path("none")
"""Written as the file of music that ends the one before."""
_BRACES = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


@dataclass(frozen=True, slots=True)
class Shot(Defaults):
    """One shot."""

    prompt: Annotated[
        tuple[TimedPrompt, ...],
        "the picture in words, or several prompts, each with its time, from 0 on"
    ] = field(metadata=ONE)
    id: Annotated[str, "name for other shots; default the prompt's first words"] = ""
    scene: Annotated[str | None, "id of its scene"] = None
    place: Annotated[str | None, "id of its place; default the scene's"] = None
    characters: Annotated[
        tuple[str, ...], "ids of characters that appear though no prompt names them"
    ] = field(default=(), metadata=ONE)
    frames: Annotated[int | None, "number of frames instead; 1 is a still"] = None
    seed: Annotated[
        int | None,
        "default that of its first character, else drawn from the film's and the id"] = None
    first_frame: Annotated[
        Path | ShotFrame | None, "a picture, or a frame of another shot"] = None
    last_frame: Annotated[
        Path | ShotFrame | None, "a picture, or a frame of another shot"] = None
    continue_from: Annotated[str | None, "id of the shot that this one continues"] = None
    in_film: Annotated[bool, "false for one that is made for other shots alone"] = True
    sound: Annotated[Sound | None, "noises and voices of the shot"] = None
    narration: Annotated[
        tuple[Narration, ...], "spoken text"] = field(default=(), metadata=ONE)
    music: Annotated[Music | None, "from here on"] = None
    caption: Annotated[tuple[Caption, ...], "text in the picture"] = field(default=(), metadata=ONE)

    def __post_init__(self) -> None:
        if not self.prompt:
            raise InputError("the list of prompts is empty; describe the picture")
        if self.id and not NAME.fullmatch(self.id):
            raise InputError(f"id {self.id!r} is no name; give up to 64 letters, digits, _ and -")
        times = [each.at for each in self.prompt]
        if times[0] != 0 or any(a >= b for a, b in pairwise(times)):
            raise InputError(f"the prompts begin at {', '.join(f'{t:g}' for t in times)} s; the "
                             "first must begin at 0, and each other one after the previous")
        if self.duration is not None and self.frames is not None:
            raise InputError("duration and frames are both given; give one of them")
        if self.continue_from is not None and self.first_frame is not None:
            raise InputError("continue_from and first_frame are both given; the shot begins with "
                             "one of them")
        Defaults.__post_init__(self)  # with slots, super() would need its arguments

    @property
    def needs(self) -> tuple[str, ...]:
        """Ids of the shots that must exist before it."""
        shown = (each.shot for each in (self.first_frame, self.last_frame)
                 if isinstance(each, ShotFrame))
        return (*((self.continue_from,) if self.continue_from is not None else ()), *shown)


@dataclass(frozen=True, slots=True)
class Script:
    """A film as its shots, in order."""

    CALLED: ClassVar[dict[str, str]] = {
        "seconds": "duration", "image": "first_frame", "last_image": "last_frame",
        "audio": "sound", "say": "narration",
    }
    """A script's keys for options of a request."""

    shots: Annotated[tuple[Shot, ...], "one after the other"]
    version: Annotated[int, "of the format"] = VERSION
    project: Annotated[Project, "settings of the whole film"] = field(default_factory=Project)
    characters: Annotated[dict[str, Character], "by name"] = field(default_factory=dict)
    places: Annotated[dict[str, Place], "by name"] = field(default_factory=dict)
    scenes: Annotated[dict[str, Scene], "by id"] = field(default_factory=dict)
    path: Path = field(default=Path("script"), init=False, compare=False)
    lines: Mapping[str, int] = field(default_factory=dict, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not self.shots:
            raise InputError("the script has no shots; add one, such as {prompt: a cat walks}")

    @classmethod
    def read(cls, path: str | Path) -> Script:
        """Read a script and check it; files are never changed.

        Args:
            path: .yaml, .json or .txt (a prompt a line, without empty lines and lines that begin
                with #).

        Raises:
            InputError: the fault, with line, key and remedy.
        """
        path = Path(path)
        suffix = path.suffix.lower()
        if suffix not in _SUFFIXES:
            raise InputError(f"script {path} must end in one of {', '.join(_SUFFIXES)}")
        if suffix == _LIST:
            mapping = Located({"shots": [*_prompts(load_text(path, "script"))]}, {})
        else:
            mapping = load_yaml(path, "script")
            _check_version(mapping, path)
        return _finished(build(cls, mapping, str(path)), path, mapping)

    def file(self, path: Path) -> Path:
        """Return a file that the script names, relative to the script's own folder."""
        return self.path.parent / path

    def where(self, shot: Shot) -> str:
        """Return a shot's place in the file, for messages."""
        line = f", line {self.lines[shot.id]}" if shot.id in self.lines else ""
        return f"{self.path}{line}: shot {shot.id!r}"

    def option(self, shot: Shot, name: str) -> Any:
        """Return a shot's own setting, or the film's default."""
        own = getattr(shot, name)
        return own if own not in (None, ()) else getattr(self.project.defaults, name)

    def names_in(self, text: str) -> Iterator[str]:
        """Yield the names that a prompt refers to, in order.

        Raises:
            InputError: a brace that belongs to no name.
        """
        for found in _BRACES.finditer(text):
            if found[0] in ("{", "}"):
                raise InputError(f"the prompt {text!r} has a single {found[0]}; write "
                                 f"{{name}}, or {found[0] * 2} for the sign itself")
            if found[1] is not None:
                yield found[1]

    def words(self, shot: Shot, text: str) -> str:
        """Return a prompt as the model gets it, with descriptions, camera and styles."""
        place = shot.place or self._scene(shot).place
        known = {name: each.description for name, each in (self.characters | self.places).items()}
        if place is not None:
            known["place"] = self.places[place].description

        def meant(found: re.Match[str]) -> str:
            return found[0][0] if found[1] is None else known[found[1]]

        seen = _BRACES.sub(meant, text)
        camera: Camera | None = self.option(shot, "camera")
        added = [part for part in (camera and camera.words, self._scene(shot).style,
                                    self.project.style) if part]
        return ", ".join([seen.rstrip(".") if added else seen, *added])

    def cast(self, shot: Shot) -> list[str]:
        """Return the names of the characters and places in a shot, each once, in order."""
        names = [*shot.characters, *(n for each in shot.prompt for n in self.names_in(each.prompt))]
        place = shot.place or self._scene(shot).place
        return list(dict.fromkeys(place if name == "place" and place else name for name in names))

    def _scene(self, shot: Shot) -> Scene:
        return self.scenes.get(shot.scene or "", Scene())

    def order(self) -> list[Shot]:
        """Return the shots in their order, but each after those that it needs.

        Raises:
            InputError: shots that need each other, or an unknown one.
        """
        known = {shot.id: shot for shot in self.shots}
        found: dict[str, Shot] = {}
        for shot in self.shots:
            way = {shot.id: shot}  # each needs the next one
            while way:
                now = next(reversed(way.values()))
                wanted = next((name for name in now.needs if name not in found), None)
                if wanted is None:
                    found[now.id] = now
                    del way[now.id]
                elif wanted in way:
                    names = [*way][[*way].index(wanted) :]
                    raise InputError(f"{self.where(now)} is in a circle of shots: "
                                     f"{' needs '.join([*names, wanted])}; leave one of them out")
                elif wanted not in known:
                    raise InputError(f"{self.where(now)} needs the unknown shot {wanted!r}; "
                                     f"{nearest(wanted, known)}")
                else:
                    way[wanted] = known[wanted]
        return [*found.values()]


def _check(script: Script, written: Located) -> None:
    _check_own_names(script, written)
    if len(script.shots) > MAX_SHOTS:
        raise InputError(f"{script.path} has {len(script.shots)} shots; give {MAX_SHOTS} at most")
    for name, scene in script.scenes.items():
        if scene.place is not None and scene.place not in script.places:
            line = _line(written, "scenes", name, "place")
            raise InputError(f"{script.path}{line}: scene {name!r} plays in the unknown place "
                             f"{scene.place!r}; {nearest(scene.place, script.places)}")
    font = script.project.finish.font
    if font is not None and not script.file(font).is_file():
        line = _line(written, "project", "finish", "font")
        raise InputError(f"{script.path}{line}: font {str(font)!r} does not exist in "
                         f"{script.path.parent.resolve()}; correct the name")
    files: set[Path] = set()
    for shot in script.shots:
        _check_names(script, shot)
        for key, file in files_of(script, shot):
            place = script.file(file)
            if place not in files and not place.is_file():
                raise InputError(f"{script.where(shot)}: {key} {str(file)!r} does not exist in "
                                 f"{script.path.parent.resolve()}; correct the name")
            files.add(place)
    script.order()


def _check_version(mapping: Located, path: Path) -> None:
    version = mapping.get("version", VERSION)
    if version != VERSION or isinstance(version, bool):
        is_text = version == str(VERSION)
        remedy = "write it without quotes" if is_text else "install one that reads it"
        raise InputError(f"{path}, line {mapping.lines['version']}: version is {version!r}; this "
                         f"vidgen reads version {VERSION}: {remedy}")


def _prompts(text: str) -> Iterator[Located]:
    for number, line in enumerate(text.splitlines(), 1):
        prompt = line.strip()
        if prompt and not prompt.startswith("#"):
            # a plain list has no names, so braces are text
            words = prompt.replace("{", "{{").replace("}", "}}")
            yield Located({"prompt": words}, {"prompt": number})


def _finished(script: Script, path: Path, mapping: Located) -> Script:
    lines: dict[str, int] = {}
    taken = {shot.id for shot in script.shots if shot.id}
    shots, seen = [], dict[str, int]()
    for shot, raw in zip(script.shots, mapping["shots"], strict=True):
        line = min(raw.lines.values(), default=0) if isinstance(raw, Located) else 0
        if shot.id in lines:
            raise InputError(f"{path}, line {line}: shot {shot.id!r} exists already, in line "
                             f"{lines[shot.id]}; give each its own id")
        if not shot.id:
            stem = slug(shot.prompt[0].prompt)
            name = stem
            while name in taken:
                seen[stem] = seen.get(stem, 1) + 1
                name = f"{stem}-{seen[stem]}"
            taken.add(name)
            shot = replace(shot, id=name)  # noqa: PLW2901
        lines[shot.id] = line
        shots.append(shot)
    script = replace(script, shots=tuple(shots))
    object.__setattr__(script, "path", path)
    object.__setattr__(script, "lines", lines)
    _check(script, mapping)
    return script


def _line(written: Any, *keys: str) -> str:
    for key in keys[:-1]:
        written = written.get(key) if isinstance(written, Mapping) else None
    line = getattr(written, "lines", {}).get(keys[-1])
    return "" if line is None else f", line {line}"


def _check_own_names(script: Script, written: Located) -> None:
    for key in ("characters", "places", "scenes"):
        for name in getattr(script, key):
            where = f"{script.path}{_line(written, key, name)}"
            if not NAME.fullmatch(name) or (key == "places" and name == "place"):
                raise InputError(f"{where}: {name!r} can't be a name; give up to 64 letters, "
                                 "digits, _ and -, and not place")
            if key == "places" and name in script.characters:
                raise InputError(f"{where}: {name!r} is a character and a place; {{{name}}} must "
                                 "mean one of them: rename the other")


def _check_names(script: Script, shot: Shot) -> None:
    where = script.where(shot)
    for key, name, names in (("scene", shot.scene, script.scenes.keys()),
                             ("place", shot.place, script.places.keys())):
        if name is not None and name not in names:
            raise InputError(f"{where}: unknown {key} {name!r}; {nearest(name, names)}")
    speakers = [each.speaker for each in shot.narration if each.speaker is not None]
    for name in (*shot.characters, *speakers):
        if name not in script.characters:
            raise InputError(f"{where}: unknown character {name!r}; "
                             f"{nearest(name, script.characters)}")
    known = script.characters.keys() | script.places.keys()
    scene = script.scenes.get(shot.scene or "")
    if shot.place or (scene and scene.place):
        known |= {"place"}
    with located(where):
        for each in shot.prompt:
            for name in script.names_in(each.prompt):
                if name == "place" and name not in known:
                    raise InputError(f"the prompt {each.prompt!r} plays in {{place}}, but neither "
                                     "the shot nor its scene has one; give the shot a place")
                if name not in known:
                    raise InputError(f"unknown character or place {name!r} in the prompt "
                                     f"{each.prompt!r}; {nearest(name, known)}")


def files_of(script: Script, shot: Shot) -> Iterator[tuple[str, Path]]:
    """Yield the key and path of every file that a shot names; voices and adapters may be names."""
    for key in ("first_frame", "last_frame"):
        if isinstance(file := getattr(shot, key), Path):
            yield key, file
    for kind in (script.characters, script.places):
        for name in script.cast(shot):
            if name in kind:
                yield from (("reference", file) for file in kind[name].reference)
    if shot.sound is not None and shot.sound.file is not None:
        yield "sound", shot.sound.file
    if shot.music is not None and shot.music.file not in (None, SILENCE):
        yield "music", shot.music.file
    yield from (("narration", Path(n.text.removeprefix(OWN_FILE))) for n in shot.narration
                if n.text.startswith(OWN_FILE))
