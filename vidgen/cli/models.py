"""`vidgen models [FOLDER ...]`: list the models that are ready to use."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vidgen.cli.report import Report
from vidgen.core.errors import InputError, VidgenError

DESCRIPTION = (
    "List the models that are ready to use: the embedded ones, those in the Hugging Face cache, "
    "and those in the folders given."
)


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument("folders", metavar="FOLDER", nargs="*", default=[],
                        help="a model folder, or a folder of them")
    parser.add_argument("--measure", metavar="MODEL", help=(
        "measure how much this model's steps differ, which --cache magnitude needs"))


def run(args: Namespace, report: Report) -> int:
    """Print one line per model; one that can't be used is listed with the reason."""
    if args.measure:
        return _measure(args.measure, report)
    models = [_describe(model, path) for model, path in _available(args.folders)]
    width = max((len(model["name"]) for model in models), default=0)
    lines = [_line(model, width) for model in models]
    report.result(models, "\n".join(lines) or "no models found")
    return 1 if any("problem" in model for model in models) else 0


def _measure(model: str, report: Report) -> int:
    from vidgen.pipeline.engine import load_own, measure_magnitudes
    from vidgen.pipeline.plan import write_magnitudes

    engine = load_own(model, "--cache works with the embedded model and the Wan family")
    path = write_magnitudes(measure_magnitudes(engine), engine.folder)
    report.result({"model": engine.folder.name, "path": str(path)},
                  f"magnitudes of {engine.folder.name} written to {path}")
    return 0


def _available(folders: list[str]) -> Iterator[tuple[str, Path]]:
    from vidgen.weights.folder import embedded_folder, list_embedded
    from vidgen.weights.layouts import layout_of
    from vidgen.weights.published import list_cached

    for name in list_embedded():
        yield name, embedded_folder(name)
    for hub_id, path in list_cached():
        if layout_of(path):
            yield hub_id, path
    for given in folders:
        folder = Path(given)
        if not folder.is_dir():
            raise InputError(f"{folder} is not a folder; give one with models in it")
        inside = [folder] if layout_of(folder) else sorted(folder.iterdir())
        yield from ((str(path), path) for path in inside if path.is_dir() and layout_of(path))


def _describe(model: str, path: Path) -> dict[str, Any]:
    from vidgen.core.config import dump
    from vidgen.pipeline.settings import settings_of
    from vidgen.weights.folder import DiffusersFolder
    from vidgen.weights.layouts import card_license, open_folder

    try:
        folder = open_folder(path, model)
    except VidgenError as error:
        return {"name": model, "path": str(path), "problem": str(error)}
    facts: dict[str, Any] = {"name": model, "path": str(path), "bytes": folder.num_bytes}
    if isinstance(folder, DiffusersFolder):
        return {
            **facts, "layout": "diffusers", "pipeline": folder.class_name,
            "license": card_license(path)}
    defaults = dump(folder.defaults)
    del defaults["settings"]
    return {
        **facts, "family": folder.family, "variant": folder.variant, "layout": folder.layout,
        "license": folder.license, "tasks": list(folder.tasks), "defaults": defaults,
        "settings": settings_of(folder), "components": list(folder.components)}


def _line(facts: dict[str, Any], width: int) -> str:
    from vidgen.core.runtime import size_text

    if "problem" in facts:
        return f"{facts['name']:<{width}}  can't be used: {facts['problem']}"
    head = f"{facts['name']:<{width}} {size_text(facts['bytes']):>9}"
    if "pipeline" in facts:
        license_name = facts["license"] or "no licence in its card"
        return f"{head}  {facts['pipeline']}, run by diffusers, {license_name}"
    d, kind = facts["defaults"], facts["variant"] or facts["family"]
    if "transformer_2" in facts["components"]:
        kind += " with two experts"
    clip = f"{d['width']}x{d['height']}, {d['num_frames']} frames at {d['fps']:g} fps"
    line = f"{head}  {kind}, {clip}, {facts['license']}; {', '.join(facts['tasks'])}"
    own = ", ".join(f"{name}={json.dumps(value)}" for name, value in facts["settings"].items())
    return f"{line}\n{'':{width}}  --set {own}" if own else line
