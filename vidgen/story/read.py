"""Scripts from files: YAML and JSON as they are, tables a row a shot, plain lists a prompt a line.

Files are only ever read: what a person wrote stays as it is.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

from vidgen.core.config import build
from vidgen.core.config_file import Located, load_text, load_yaml
from vidgen.core.errors import InputError, nearest
from vidgen.core.request import OWN_FILE
from vidgen.core.runtime import slug
from vidgen.story.elements import Narration
from vidgen.story.script import NAME, VERSION, Script, Shot

_LISTS = frozenset({".txt", ".csv"})
_SUFFIXES = (".yaml", ".yml", ".json", *sorted(_LISTS))
_SEVERAL = ("characters", "lora")
MAX_SHOTS = 100_000


def read_script(path: str | Path) -> Script:
    """Read a script and check it.

    Args:
        path: .yaml, .yml, .json, .csv (a header of a shot's keys, then a row for each; several
            characters are parted by semicolons) or .txt (a prompt a line; empty lines and those
            that begin with # are left out).

    Raises:
        InputError: what is wrong, with line, key and remedy.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise InputError(f"script {path} must end in one of {', '.join(_SUFFIXES)}")
    if suffix in _LISTS:
        text = load_text(path, "script")
        rows = list(_table(text, path) if suffix == ".csv" else _prompts(text))
        mapping = Located({"shots": rows}, {})
    else:
        mapping = load_yaml(path, "script")
        _check_version(mapping, path)
    script = build(Script, mapping, str(path))
    return _finished(script, path, mapping)


def check_script(script: Script, written: Located) -> None:
    """Judge what needs the whole script: names, ids, needs, files.

    Args:
        script: to be judged.
        written: what it was made of, which knows the lines.

    Raises:
        InputError: what is wrong, with line, key and remedy.
    """
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
        for key, file in _files(script, shot):
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
            # braces in a plain list are signs like any other: there is nobody to refer to
            words = prompt.replace("{", "{{").replace("}", "}}")
            yield Located({"prompt": words}, {"prompt": number})


def _table(text: str, path: Path) -> Iterator[Located]:
    reader = csv.DictReader(io.StringIO(text), strict=True)
    try:
        names = [name.strip() for name in reader.fieldnames or ()]
        reader.fieldnames = names
        if "prompt" not in names:
            raise InputError(f"script {path}, line 1: no column is called prompt; the first line "
                             "must name the columns by a shot's keys")
        repeated = next((name for name in names if names.count(name) > 1), None)
        if repeated is not None:
            raise InputError(f"script {path}, line 1: {names.count(repeated)} columns are called "
                             f"{repeated!r}; keep one of them")
        for row in reader:
            line = reader.line_num
            extra = row.pop(None, None)
            if extra:
                raise InputError(f"script {path}, line {line}: {len(extra)} cells have no column; "
                                 "put text with commas in quotes")
            values = {k: _cell(k, v.strip()) for k, v in row.items() if v and v.strip()}
            yield Located(values, dict.fromkeys(values, line))
    except csv.Error as error:
        raise InputError(f"script {path}, line {reader.line_num}: {error}; write the table again "
                         "as CSV with commas and double quotes") from None


@cache
def _kinds() -> dict[str, tuple[Any, ...]]:
    """The types that each key of a shot takes."""
    return {name: get_args(hint) or (hint,) for name, hint in get_type_hints(Shot).items()}


def _cell(key: str, text: str) -> Any:
    """A cell as YAML would have it: numbers where the key takes one, else text."""
    if key in _SEVERAL:
        return [part.strip() for part in text.split(";") if part.strip()]
    kinds = _kinds().get(key, ())
    if bool in kinds and text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(text)
            except ValueError:
                continue
    return text


def _finished(script: Script, path: Path, mapping: Located) -> Script:
    """Give every shot an id, remember the lines, and check the whole."""
    lines: dict[str, int] = {}
    taken = {shot.id for shot in script.shots if shot.id}
    shots, seen = [], dict[str, int]()
    for shot, raw in zip(script.shots, mapping["shots"], strict=True):
        line = min(raw.lines.values(), default=0) if isinstance(raw, Located) else 0
        if shot.id in lines:
            raise InputError(f"{path}, line {line}: shot {shot.id!r} is there already, in line "
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
    check_script(script, mapping)
    return script


def _line(written: Any, *keys: str) -> str:
    """Where a key stands, for messages; nothing where that isn't known."""
    for key in keys[:-1]:
        written = written.get(key) if isinstance(written, Mapping) else None
    line = getattr(written, "lines", {}).get(keys[-1])
    return "" if line is None else f", line {line}"


def _check_own_names(script: Script, written: Located) -> None:
    """What characters, places and scenes are called."""
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
    """A shot's scene, place and everybody it speaks of."""
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
    try:
        for each in shot.prompt:
            for name in script.names_in(each.prompt):
                if name == "place" and name not in known:
                    raise InputError(f"the prompt {each.prompt!r} plays in {{place}}, but neither "
                                     "the shot nor its scene has one; give the shot a place")
                if name not in known:
                    raise InputError(f"unknown character or place {name!r} in the prompt "
                                     f"{each.prompt!r}; {nearest(name, known)}")
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _files(script: Script, shot: Shot) -> Iterator[tuple[str, Path]]:
    """Every file that a shot names, by its key; voices and adapters may be names."""
    for key in ("first_frame", "last_frame"):
        if isinstance(file := getattr(shot, key), Path):
            yield key, file
    for kind in (script.characters, script.places):
        for name in script.cast(shot):
            if name in kind:
                yield from (("reference", file) for file in kind[name].reference)
    if shot.sound is not None and shot.sound.file is not None:
        yield "sound", shot.sound.file
    if shot.music is not None and shot.music.file not in (None, Path("none")):
        yield "music", shot.music.file
    yield from (("narration", Path(n.text.removeprefix(OWN_FILE))) for n in shot.narration
                if _is_file(n))


def _is_file(narration: Narration) -> bool:
    return narration.text.startswith(OWN_FILE)
