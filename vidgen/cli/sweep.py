"""`vidgen sweep PROMPT --over KEY=A,B,C`: compare a clip with several settings side by side."""

from __future__ import annotations

import math
import re
from argparse import ArgumentTypeError, Namespace
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import count, groupby, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidgen.cli import generate
from vidgen.cli.options import Parser, choose_devices, given_options, share_threads
from vidgen.cli.replay import typed_options
from vidgen.cli.report import Report
from vidgen.core.errors import InputError
from vidgen.core.request import Loading, Saving
from vidgen.core.runtime import slug
from vidgen.core.store import Store

if TYPE_CHECKING:
    from vidgen.core.request import Request
    from vidgen.pipeline.types import Estimate

DESCRIPTION = "Make a clip with several settings and one seed, as a labelled sheet and a video."
MAX_CELLS = 100
SUFFIXES = (".png", ".mp4")
"""Suffixes of the sheet and of the video."""


@dataclass(frozen=True)
class Axis:
    """An option, or a word of the prompt, with the values to compare."""

    key: str
    word: str | None
    values: tuple[str, ...]


@dataclass(frozen=True)
class Cell:
    """A clip of the sheet, with its label, request, loading, marks and file."""

    label: str
    request: Request
    loading: Loading
    marks: Mapping[str, str]
    path: Path


def add_arguments(parser: Parser) -> None:
    """Declare generate's options and the axes."""
    generate.add_arguments(parser)
    parser.add_argument(
        "--over", type=read_axis, action="append", required=True, metavar="KEY=A,B,C",
        help="the option to vary: seed=1..4, guidance=1,3,6, or a word of the prompt, "
        "prompt:red=red,blue; separate values with commas by |; if repeated, the last one makes "
        "the columns")


def run(args: Namespace, report: Report) -> int:
    """Check every setting, make missing clips and lay them out."""
    from vidgen.pipeline.journal.job import job_folder

    if args.count != 1 or args.retry:
        raise InputError("a sweep makes one clip of each setting; leave --count and --retry out, "
                         "or vary the seed with --over seed=1..4")
    if args.preview:
        raise InputError("a sweep shows no previews; leave --preview out")
    _check_axes(args.over)
    args.seed = args.seed or 0
    stem, store = _places(args)
    cells = _cells(args, store)
    values = len(args.over[-1].values)
    columns = values if len(args.over) > 1 or values < 6 else math.ceil(math.sqrt(values))
    todo = sorted((cell for cell in cells
                   if job_folder(cell.path).is_dir() or not cell.path.is_file()),
                  key=lambda cell: str(cell.loading))
    expected = _estimates(todo)
    store.folder.mkdir(exist_ok=True)
    if expected:
        report.expect(expected, num_clips=len(todo))
    _make(todo, report)
    _lay_out(cells, columns, stem, args, report)
    data: dict[str, Any] = {
        "sheet": f"{stem}.png", "video": f"{stem}.mp4", "columns": columns,
        "cells": [{"label": cell.label, "path": str(cell.path), "seed": cell.request.seed,
                   "made": cell in todo, "verdict": _verdict(cell, report)} for cell in cells]}
    report.result(data, f"{stem}.png, {stem}.mp4: {len(cells)} clips, {len(todo)} of them made now")
    return int(args.strict and any(cell["verdict"] == "fault" for cell in data["cells"]))


def read_axis(text: str) -> Axis:
    """Read KEY=A,B,C or prompt:WORD=A,B,C; A..B is every whole number from A to B."""
    key, _, listed = text.partition("=")
    key, _, word = key.partition(":")
    values = tuple(listed.split("|" if "|" in listed else ","))
    span = re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", listed)
    if span and int(span[1]) <= int(span[2]) < int(span[1]) + MAX_CELLS:
        values = tuple(map(str, range(int(span[1]), int(span[2]) + 1)))
    elif span:
        raise ArgumentTypeError(f"{text!r} counts from {span[1]} to {span[2]}; give a rising "
                                f"range of {MAX_CELLS} numbers at most")
    if not key or not listed or (word and key != "prompt"):
        raise ArgumentTypeError(f"{text!r} is no KEY=A,B,C, such as guidance=1,3,6, seed=1..4 or "
                                "prompt:red=red,blue")
    twice = next((value for value in values if values.count(value) > 1), None)
    if twice is not None:
        raise ArgumentTypeError(f"{text!r} names {twice!r} twice; give each value once")
    return Axis(key.replace("-", "_"), word or None, values)


def _check_axes(axes: Sequence[Axis]) -> None:
    """Refuse two axes of one option, of which the later would replace the earlier."""
    keys = [f"{axis.key}:{axis.word}" if axis.word else axis.key for axis in axes]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise InputError(f"--over {twice} is given {keys.count(twice)} times; join the values "
                         "in one")


def _places(args: Namespace) -> tuple[str, Store]:
    """Return the outputs' name without suffix, and the store of the clips."""
    from vidgen.core.runtime import check_output
    from vidgen.pipeline.journal.job import job_folder
    from vidgen.pipeline.journal.job import sweep as sweep_up

    output = args.output or f"{slug(args.prompt)}-{args.seed}-sweep.png"
    stem = output.removesuffix(suffix := Path(output).suffix)
    if suffix.lower() not in SUFFIXES:
        raise InputError(f"output {output} must end in .png or .mp4; a sweep writes both")
    for suffix in SUFFIXES:
        check_output(stem + suffix, overwrite=args.overwrite or args.resume)
        if args.resume:
            sweep_up(job_folder(stem + suffix))
    return stem, Store(Path(f"{stem}.cells"))


def _cells(args: Namespace, store: Store) -> list[Cell]:
    from vidgen.core.values import parse_settings
    from vidgen.pipeline.policy import enforce, policy_from_environment

    wanted = math.prod(len(axis.values) for axis in args.over)
    if wanted > MAX_CELLS:
        raise InputError(f"a sheet of {wanted} clips is too large; give {MAX_CELLS} values at most")
    base = given_options(args) | given_options(args, Loading) | given_options(args, Saving)
    base["settings"] = parse_settings(args.settings)
    cells = [
        _cell(base, list(zip(args.over, values, strict=True)), store)
        for values in product(*(axis.values for axis in args.over))]
    policy = policy_from_environment()
    for cell in cells:
        enforce(policy, cell.request)
    return cells


def _cell(base: Mapping[str, Any], chosen: Sequence[tuple[Axis, str]], store: Store) -> Cell:
    from vidgen.core.request import Request

    options, label = dict(base), []
    for axis, value in chosen:
        if axis.word is None:
            typed = typed_options([(axis.key, value)])
            settings = {**options["settings"], **typed.get("settings", {})}
            options |= typed | {"settings": settings}
            label.append(value if axis.key == "prompt" else f"{axis.key} {value}")
        else:
            options["prompt"] = _replaced(options["prompt"], axis.word, value)
            label.append(value)
    loaded = {name: options.pop(name) for name in Loading.model_fields if name in options}
    saved = {name: options.pop(name) for name in Saving.model_fields if name in options}
    loading, request = choose_devices(Loading(**loaded), ()), Request(**options)
    marks = Saving(**saved).marks
    path = store.path(_identity(request, loading, marks))
    return Cell(", ".join(label), request, loading, marks, path)


def _replaced(prompt: str, word: str, value: str) -> str:
    pattern = rf"(?<!\w){re.escape(word)}(?!\w)"
    if not re.search(pattern, prompt):
        raise InputError(f"the prompt has no {word!r} to replace: {prompt!r}")
    return re.sub(pattern, lambda _: value, prompt)


def _identity(request: Request, loading: Loading, marks: Mapping[str, str]) -> str:
    from vidgen.pipeline.recipe import identity

    model = {"model": _content_hash(loading.model)}
    return identity(request, **loading.model_dump() | model | dict(marks))


@lru_cache
def _content_hash(model: str) -> str:
    from vidgen.weights.layouts import open_model

    return open_model(model).content_hash


def _make(cells: Sequence[Cell], report: Report) -> None:
    import torch

    from vidgen.cli.outputs import resumable
    from vidgen.pipeline.engine import load
    from vidgen.pipeline.journal.journal import Journal
    from vidgen.pipeline.workers.clip_work import write_request

    threads, numbers = torch.get_num_threads(), count(1)
    for loading, alike in groupby(cells, key=lambda cell: cell.loading):
        share_threads(loading.devices, threads)
        with closing(load(**loading.model_dump())) as engine:
            for cell in alike:
                with resumable([Journal(cell.path, resume=True)], report):
                    write_request(engine, cell.request, cell.path, report,
                                  {"clip": next(numbers), "num_clips": len(cells)},
                                  marks=cell.marks)


def _estimates(cells: Sequence[Cell]) -> list[Estimate]:
    """Return each clip's estimate; none if a model runs through diffusers."""
    from vidgen.core.runtime import available_memory, choose_device
    from vidgen.pipeline.plan import settle
    from vidgen.pipeline.setups import choose
    from vidgen.weights.folder import ModelFolder
    from vidgen.weights.layouts import open_model

    device, folders = choose_device(), [open_model(cell.loading.model) for cell in cells]
    known = [folder for folder in folders if isinstance(folder, ModelFolder)]
    if len(known) < len(cells):
        return []
    have = available_memory(device)
    made = []
    for folder, cell in zip(known, cells, strict=True):
        plan = settle(folder, cell.request, cell.loading.devices)
        made.append(choose(folder, plan, cell.request, cell.loading, device, have))
    return made


def _verdict(cell: Cell, report: Report) -> str | None:
    from vidgen.media.checks import recorded, verdict
    from vidgen.media.probe import read_recipe

    found = recorded(read_recipe(cell.path))
    for finding in found or ():
        report.note(f"{cell.label}: {finding.text}")
    return None if found is None else verdict(found)


def _lay_out(
    cells: Sequence[Cell], columns: int, stem: str, args: Namespace, report: Report
) -> None:
    from vidgen import __version__
    from vidgen.media.grid import Grid
    from vidgen.media.write import write_clip

    over = {f"{axis.key}:{axis.word}" if axis.word else axis.key: axis.values for axis in args.over}
    recipe = {"vidgen": __version__, "sweep": {
        "prompt": args.prompt, "seed": args.seed, "over": over, "columns": columns,
        "cells": [{"label": cell.label, "path": cell.path.name} for cell in cells]}}
    grid = Grid([cell.path for cell in cells], [cell.label for cell in cells], columns)
    film = replace(grid.info, recipe=recipe)
    still = replace(film, num_frames=1)
    write_clip(f"{stem}.png", [grid.still()[None]], still, overwrite=True)
    report.written(f"{stem}.png")
    write_clip(f"{stem}.mp4", grid.frames(), film, overwrite=True)
    report.written(f"{stem}.mp4")
