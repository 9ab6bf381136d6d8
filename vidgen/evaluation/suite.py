"""Prompt suites, and the prompts of clips by file names like VBench's or recipes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vidgen.core.errors import InputError, quoted
from vidgen.core.runtime import sha256_file
from vidgen.media.probe import read_recipe
from vidgen.media.read import existing_file

CLIP_SUFFIXES = (".mp4", ".mov", ".webm", ".mkv", ".gif", ".webp", ".apng")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_NUMBERED = re.compile(r"^(?P<prompt>.+)-(?P<index>\d+)$")
_LONGEST_NAME = 180
"""Largest number of bytes of a prompt in a file's name; the recipe has all of it."""
_CAMERA = re.compile(r", camera [a-z ]+$")


@dataclass(frozen=True)
class EvaluatedClip:
    """A clip of a folder, with its prompt and origin."""

    path: Path
    name: str  # without its suffix; clips of the same name in several folders are pairs
    prompt: str  # from its recipe, else from its name
    # `model`, `model_sha256`, `seed` and `vidgen` of its recipe; None without a recipe
    origin: dict[str, Any] | None


@dataclass(frozen=True)
class PromptSuite:
    """A list of prompts, with their dimensions and first pictures."""

    name: str  # of its file
    sha256: str  # of its content
    prompts: tuple[str, ...]
    # VBench's dimensions for which each prompt was written; {}: all count for all
    dimensions: Mapping[str, frozenset[str]] = field(default_factory=dict)
    # {prompt: name of its first picture}, as far as the list has one
    pictures: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | Path) -> PromptSuite:
        """Read a text file of one prompt per line, or a JSON list in VBench's format.

        Raises:
            InputError: the file is missing, damaged, or has no prompts.
        """
        file = existing_file(path, "prompt suite")
        try:
            entries = _entries(file)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(
                f"prompt suite {file} can't be read ({type(error).__name__}: {error}); give a "
                "prompt per line, or a JSON list of prompts or of objects with prompt_en"
            ) from None
        if not entries:
            raise InputError(f"prompt suite {file} holds no prompt; give one per line")
        dimensions, pictures = dict[str, frozenset[str]](), dict[str, str]()
        for prompt, own, picture in entries:
            dimensions[prompt] = dimensions.get(prompt, frozenset()) | own
            if picture is not None:
                pictures[prompt] = picture
        named = dimensions if any(dimensions.values()) else {}
        return cls(file.name, sha256_file(file), tuple(dimensions), named, pictures)

    def counts(self, prompt: str, dimension: str) -> bool:
        """Return whether clips of a prompt count for one of VBench's dimensions."""
        return not self.dimensions or dimension in self.dimensions[prompt]

    def split(
        self, items: Sequence[EvaluatedClip]
    ) -> tuple[list[EvaluatedClip], list[EvaluatedClip], list[str]]:
        """Return clips of the suite, clips of other prompts, and prompts without a clip.

        Raises:
            InputError: no clip belongs to the suite.
        """
        known = {file_stem(prompt): prompt for prompt in self.prompts}
        known |= {prompt: prompt for prompt in self.prompts}
        # the recipe may have a reworded prompt, the name has the suite's
        matched = [(item, known.get(item.prompt) or known.get(prompt_of(item.name)))
                   for item in items]
        inside = [replace(item, prompt=prompt) for item, prompt in matched if prompt is not None]
        if not inside:
            raise InputError(
                f"no clip of {items[0].path.parent} belongs to a prompt of {self.name}; name them "
                f"'{self.prompts[0][:60]}-0.mp4', or leave out --prompt-suite")
        outside = [item for item, prompt in matched if prompt is None]
        shown = {item.prompt for item in inside}
        return inside, outside, [prompt for prompt in self.prompts if prompt not in shown]


def _entries(file: Path) -> list[tuple[str, frozenset[str], str | None]]:
    text = file.read_text("utf-8-sig")
    if file.suffix != ".json":
        return [(line.strip(), frozenset(), None) for line in text.splitlines() if line.strip()]
    rows = json.loads(text)
    if not isinstance(rows, list):
        raise TypeError("it is not a list")
    entries = []
    for row in rows:
        entry = {"prompt_en": row} if isinstance(row, str) else row
        prompt, own = entry["prompt_en"], entry.get("dimension", [])
        picture = entry.get("image_name")
        if not (isinstance(prompt, str) and isinstance(own, list)
                and isinstance(picture, str | None)):
            raise TypeError(f"in {quoted(entry)} prompt_en and image_name must be text, and "
                            "dimension a list")
        entries.append((prompt, frozenset(map(str, own)), picture))
    return entries


def prompt_of(name: str) -> str:
    """Return the prompt in a name such as "a cat runs-3"."""
    found = _NUMBERED.match(name)
    return found["prompt"] if found else name


def find_items(folder: str | Path) -> list[EvaluatedClip]:
    """Return the clips of a folder, sorted by name.

    Raises:
        InputError: not a folder, no clip in it, or two clips of one name.
    """
    place = Path(folder)
    if not place.is_dir():
        raise InputError(f"{place} is not a folder; give one that holds the clips")
    paths = sorted(p for p in place.iterdir() if p.suffix.lower() in CLIP_SUFFIXES and p.is_file())
    if not paths:
        raise InputError(f"{place} holds no clip; supported formats: {', '.join(CLIP_SUFFIXES)}")
    names = [path.stem for path in paths]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"{place} has two clips named {twice[0]!r}; keep one")
    return [_item(path) for path in paths]


def _item(path: Path) -> EvaluatedClip:
    try:
        recipe = read_recipe(path) or {}
    except InputError:  # damaged; measuring it reports the error
        recipe = {}
    plan, model = recipe.get("plan"), recipe.get("model")
    if not isinstance(plan, dict) or not isinstance(model, dict):
        return EvaluatedClip(path, path.stem, prompt_of(path.stem), None)
    origin = {
        "model": model.get("name"), "model_sha256": model.get("sha256"), "seed": plan.get("seed"),
        "vidgen": recipe.get("vidgen")}
    return EvaluatedClip(path, path.stem, str(plan.get("prompt") or prompt_of(path.stem)), origin)


def file_stem(prompt: str) -> str:
    """Return a prompt as part of a file's name, before the number."""
    text = prompt.replace("/", "_").replace("\0", "_")
    return text.encode()[:_LONGEST_NAME].decode(errors="ignore").strip()


def pictures_in(folder: str | Path) -> dict[str, Path]:
    """Return the pictures of a folder by their names without suffix.

    Raises:
        InputError: not a folder.
    """
    place = Path(folder)
    if not place.is_dir():
        raise InputError(f"{place} is not a folder; give one of pictures named like the prompts")
    return {p.stem: p for p in sorted(place.iterdir()) if p.suffix.lower() in PICTURE_SUFFIXES}


def picture_of(prompt: str, pictures: Mapping[str, Path], suite: PromptSuite | None) -> Path | None:
    """Return the first picture of a prompt, or None.

    It is the one named in the suite, else the one named like the prompt, else the one named like
    the prompt without ", camera pans left" and the like, since VBench-I2V shares it among these.
    """
    listed = None if suite is None else suite.pictures.get(prompt)
    names = [] if listed is None else [Path(listed).stem]
    names += [prompt, file_stem(prompt), file_stem(_CAMERA.sub("", prompt))]
    return next((pictures[name] for name in names if name in pictures), None)


def find_images(
    folder: str | Path, items: Iterable[EvaluatedClip], suite: PromptSuite | None = None
) -> dict[str, Path]:
    """Return {clip's name: first picture} of clips that have one by name or prompt.

    Raises:
        InputError: not a folder, or no picture for any clip.
    """
    pictures, found = pictures_in(folder), dict[str, Path]()
    for item in items:
        path = pictures.get(item.name) or picture_of(item.prompt, pictures, suite) or (
            pictures.get(prompt_of(item.name)))  # fmt: skip
        if path is not None:
            found[item.name] = path
    if not found:
        raise InputError(f"no picture of {folder} is named like a clip or its prompt; name "
                         "them 'PROMPT.png'")
    return found
