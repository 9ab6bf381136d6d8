"""`vidgen inspect FILE`: streams, marks of origin and recipe of a media file."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from vidgen.cli.report import Report

DESCRIPTION = "Show a media file's streams, its marks of origin, and the recipe that made it."
_BLOBS = ("content", "tail", "ending")
_INLINE = 88
"""Characters of a value that still go on one line."""


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument("file", metavar="FILE", help="video, picture or folder of pictures")


def run(args: Namespace, report: Report) -> int:
    """Print the file's facts; embedded inputs, which are long, only as JSON."""
    from vidgen.media.manifest import read_marks
    from vidgen.media.probe import probe, read_recipe
    from vidgen.media.read import pictures_in

    recipe = read_recipe(args.file)
    if Path(args.file).is_dir():
        facts = {"path": args.file, "num_pictures": len(pictures_in(args.file))}
    else:
        facts = probe(args.file)
    data = {**facts, "marks": read_marks(args.file).facts(), "recipe": recipe}
    report.result(data, "\n".join(_lines(data)))
    return 0


def _lines(data: dict[str, Any]) -> list[str]:
    lines = [line for name, value in data.items() if name not in ("streams", "marks", "recipe")
             for line in _tree(name, value)]
    for stream in data.get("streams", ()):
        lines.append("stream: " + ", ".join(f"{k} {v}" for k, v in stream.items() if v is not None))
    lines += _tree("marks", data["marks"]) if data["marks"] else ["no marks of origin"]
    recipe = data["recipe"]
    return lines + (_tree("recipe", _without_blobs(recipe)) if recipe else ["no recipe"])


def _without_blobs(data: Any) -> Any:
    """Return a recipe or a part of it for people: embedded inputs and latents by their size."""
    if isinstance(data, list):
        return [_without_blobs(item) for item in data]
    if not isinstance(data, dict):
        return data
    return {
        name: f"({len(json.dumps(value))} bytes)" if name in _BLOBS and value is not None
        else _without_blobs(value)
        for name, value in data.items()}


def _tree(name: str, value: Any, indent: str = "") -> list[str]:
    """Return a value on one line, or its parts on lines of their own, indented."""
    is_whole = value is None or isinstance(value, str | int | float) or not value
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if is_whole or (indent and len(text) <= _INLINE):
        return [f"{indent}{name}: {text}"]
    items = value.items() if isinstance(value, dict) else enumerate(value, 1)
    return [f"{indent}{name}:", *(line for key, item in items
                                  for line in _tree(str(key), item, indent + "  "))]
