"""`vidgen inspect FILE`: show streams, marks of origin and recipe of a media file."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from vidgen.cli.report import Report

DESCRIPTION = "Show a media file's streams, its marks of origin, and the recipe that made it."
_BLOBS = ("content", "tail", "ending")


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument("file", metavar="FILE", help="video, picture or folder of pictures")


def run(args: Namespace, report: Report) -> int:
    """Print the file's facts as YAML; long embedded inputs are printed only with --json."""
    import yaml

    from vidgen.media.manifest import read_marks
    from vidgen.media.probe import probe, read_recipe
    from vidgen.media.read import pictures_in

    recipe = read_recipe(args.file)
    if Path(args.file).is_dir():
        facts = {"path": args.file, "num_pictures": len(pictures_in(args.file))}
    else:
        facts = probe(args.file)
    data = {**facts, "marks": read_marks(args.file).facts(), "recipe": recipe}
    shown = {"marks": data["marks"] or "no marks of origin", "recipe": recipe or "no recipe"}
    text = yaml.safe_dump(_without_blobs({**data, **shown}), default_flow_style=None, width=100,
                          sort_keys=False, allow_unicode=True)
    report.result(data, text.rstrip())
    return 0


def _without_blobs(data: Any) -> Any:
    """Return a part of a recipe with the size of embedded inputs and latents in their place."""
    if isinstance(data, list | tuple):
        return [_without_blobs(item) for item in data]
    if not isinstance(data, dict):
        return data
    return {
        name: f"({len(json.dumps(value))} bytes)" if name in _BLOBS and value is not None
        else _without_blobs(value)
        for name, value in data.items()}
