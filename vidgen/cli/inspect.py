"""`vidgen inspect FILE`: streams, metadata and recipe of a media file."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path

from vidgen.cli.report import Report

DESCRIPTION = "Tell what a media file holds, and the recipe that made it."


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument("file", metavar="FILE", help="video, picture or folder of pictures")


def run(args: Namespace, report: Report) -> int:
    """Print the file's facts."""
    from vidgen.media.read import probe, read_recipe

    recipe = read_recipe(args.file)
    facts = {"path": args.file} if Path(args.file).is_dir() else probe(args.file)
    report.result({**facts, "recipe": recipe}, _text(facts, recipe))
    return 0


def _text(facts: dict[str, object], recipe: dict[str, object] | None) -> str:
    lines = [f"{key}: {value}" for key, value in facts.items() if key != "streams"]
    streams = facts.get("streams", [])
    assert isinstance(streams, list)
    lines += [", ".join(f"{k} {v}" for k, v in s.items() if v is not None) for s in streams]
    if recipe is None:
        return "\n".join([*lines, "no recipe"])
    lines += ["recipe:", *(f"  {k}: {json.dumps(v)}" for k, v in recipe.items())]
    return "\n".join(line if len(line) < 400 else line[:400] + " ..." for line in lines)
