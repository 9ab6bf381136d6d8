"""Which clips belong to which prompt: names as VBench writes them, recipes, lists of prompts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidgen.core.errors import InputError
from vidgen.core.runtime import sha256_file
from vidgen.media.read import existing_file, read_recipe

CLIP_SUFFIXES = (".mp4", ".mov", ".webm", ".mkv", ".gif", ".webp", ".apng")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_NUMBERED = re.compile(r"^(?P<prompt>.+)-(?P<index>\d+)$")


@dataclass(frozen=True)
class Item:
    """One clip of a folder.

    Attributes:
        path: of the file.
        name: without its suffix; clips of the same name in several folders are pairs.
        prompt: by its recipe, else by its name.
        origin: `model`, `seed` and `world_version` by its recipe, or None without one.
    """

    path: Path
    name: str
    prompt: str
    origin: dict[str, Any] | None


@dataclass(frozen=True)
class PromptSuite:
    """A list of prompts.

    Attributes:
        name: of its file.
        sha256: of its content.
        prompts: in its order.
    """

    name: str
    sha256: str
    prompts: tuple[str, ...]

    @classmethod
    def read(cls, path: str | Path) -> PromptSuite:
        """Read a text file of a prompt a line, or VBench's JSON list of `prompt_en`.

        Raises:
            InputError: missing, damaged, or without prompts.
        """
        file = existing_file(path, "prompt suite")
        try:
            text = file.read_text("utf-8")
            if file.suffix == ".json":
                entries = json.loads(text)
                if not isinstance(entries, list):
                    raise TypeError("it is no list")
                prompts = [e if isinstance(e, str) else e["prompt_en"] for e in entries]
            else:
                prompts = [line.strip() for line in text.splitlines() if line.strip()]
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise InputError(
                f"prompt suite {file} can't be read ({error}); give a prompt a line, or a JSON "
                "list of prompts or of objects with prompt_en"
            ) from None
        if not prompts:
            raise InputError(f"prompt suite {file} holds no prompt")
        return cls(file.name, sha256_file(file), tuple(dict.fromkeys(prompts)))

    def split(self, items: Sequence[Item]) -> tuple[list[Item], list[Item], list[str]]:
        """Clips of the suite, clips of no prompt of it, and prompts without a clip.

        Raises:
            InputError: no clip belongs to it.
        """
        known = set(self.prompts)
        inside = [item for item in items if item.prompt in known]
        if not inside:
            raise InputError(
                f"no clip of {items[0].path.parent} belongs to a prompt of {self.name}; name them "
                f"'{self.prompts[0][:60]}-0.mp4', or leave out --prompt-suite"
            )
        outside = [item for item in items if item.prompt not in known]
        shown = {item.prompt for item in inside}
        return inside, outside, [prompt for prompt in self.prompts if prompt not in shown]


def prompt_of(name: str) -> str:
    """The prompt in a name such as "a cat runs-3"."""
    found = _NUMBERED.match(name)
    return found["prompt"] if found else name


def find_items(folder: str | Path) -> list[Item]:
    """The clips of a folder, by name.

    Raises:
        InputError: no folder, or no clip in it, or two of one name.
    """
    place = Path(folder)
    if not place.is_dir():
        raise InputError(f"{place} is no folder; give one that holds the clips")
    paths = sorted(p for p in place.iterdir() if p.suffix.lower() in CLIP_SUFFIXES and p.is_file())
    if not paths:
        raise InputError(f"{place} holds no clip; known: {', '.join(CLIP_SUFFIXES)}")
    names = [path.stem for path in paths]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"{place} has two clips named {twice[0]!r}; keep one")
    return [_item(path) for path in paths]


def _item(path: Path) -> Item:
    try:
        recipe = read_recipe(path) or {}
    except InputError:  # a damaged file; told when it is measured
        recipe = {}
    plan, model = recipe.get("plan"), recipe.get("model")
    if not isinstance(plan, dict) or not isinstance(model, dict):
        return Item(path, path.stem, prompt_of(path.stem), None)
    origin = {
        "model": model.get("name"), "model_sha256": model.get("sha256"), "seed": plan.get("seed"),
        "world_version": model.get("world_version"), "vidgen": recipe.get("vidgen"),
    }  # fmt: skip
    return Item(path, path.stem, str(plan.get("prompt") or prompt_of(path.stem)), origin)


def find_images(folder: str | Path, items: Iterable[Item]) -> dict[str, Path]:
    """{clip's name: first picture}, where the folder has one named like the clip or its prompt.

    Raises:
        InputError: no folder, or no picture for any clip.
    """
    place = Path(folder)
    if not place.is_dir():
        raise InputError(f"{place} is no folder; give one of first pictures named like the prompts")
    pictures = {p.stem: p for p in sorted(place.iterdir()) if p.suffix.lower() in PICTURE_SUFFIXES}
    found = {}
    for item in items:
        path = pictures.get(item.name) or pictures.get(item.prompt) or (
            pictures.get(prompt_of(item.name)))  # fmt: skip
        if path is not None:
            found[item.name] = path
    if not found:
        raise InputError(f"no picture of {place} is named like a clip or its prompt")
    return found
