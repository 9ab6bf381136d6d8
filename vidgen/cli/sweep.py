"""`vidgen sweep PROMPT --over KEY=A,B,C`: compare a clip with several settings side by side."""

from __future__ import annotations

import math
import re
from argparse import ArgumentTypeError, Namespace
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cache
from itertools import count, groupby, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidgen.cli import generate
from vidgen.cli.options import Parser, choose_devices, given_options, share_threads
from vidgen.cli.replay import typed_options
from vidgen.cli.report import Report
from vidgen.core.errors import InputError
from vidgen.core.request import Loading, Request, Saving
from vidgen.core.runtime import slug

if TYPE_CHECKING:
    from vidgen.pipeline.types import Estimate

DESCRIPTION = "Make a clip with several settings and one seed, as a labelled sheet and a video."
MAX_CELLS = 100
SUFFIXES = (".png", ".mp4")
"""Suffixes of the sheet and of the video."""


@dataclass(frozen=True)
class Axis:
    """An option, or a word of the prompt, with the values to compare."""

    key: str
    word: str
    values: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.key}:{self.word}" if self.word else self.key


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
    from vidgen.media.checks import recorded, verdict
    from vidgen.media.probe import read_recipe
    from vidgen.pipeline.journal.job import job_folder

    if args.count != 1 or args.retry:
        raise InputError("a sweep makes one clip of each setting; leave --count and --retry out, "
                         "or vary the seed with --over seed=1..4")
    if args.preview:
        raise InputError("a sweep shows no previews; leave --preview out")
    args.seed = args.seed or 0
    stem = _stem(args)
    folder = Path(f"{stem}.cells")
    cells = _cells(args, folder)
    todo = [cell for cell in cells if job_folder(cell.path).is_dir() or not cell.path.is_file()]
    todo.sort(key=lambda cell: str(cell.loading))
    expected = _estimates(todo)
    folder.mkdir(exist_ok=True)
    if expected:
        report.expect(expected, num_clips=len(todo))
    _make(todo, report)
    columns = _lay_out(cells, stem, args, report)
    rows = []
    for cell in cells:
        found = recorded(read_recipe(cell.path))
        for finding in found or ():
            report.note(f"{cell.label}: {finding.text}")
        rows.append({"label": cell.label, "path": str(cell.path), "seed": cell.request.seed,
                     "made": cell in todo, "verdict": None if found is None else verdict(found)})
    report.result(
        {"sheet": f"{stem}.png", "video": f"{stem}.mp4", "columns": columns, "cells": rows},
        f"{stem}.png, {stem}.mp4: {len(cells)} clips, {len(todo)} of them made now")
    return int(args.strict and any(row["verdict"] == "fault" for row in rows))


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
    return Axis(key.replace("-", "_"), word, values)


def _stem(args: Namespace) -> str:
    """Return the outputs' name without suffix; refuse outputs that can't be written."""
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
    return stem


def _cells(args: Namespace, folder: Path) -> list[Cell]:
    from vidgen.core.values import parse_settings
    from vidgen.pipeline.policy import enforce, policy_from_environment

    names = [str(axis) for axis in args.over]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"--over {twice} is given {names.count(twice)} times; join the values "
                         "in one")
    wanted = math.prod(len(axis.values) for axis in args.over)
    if wanted > MAX_CELLS:
        raise InputError(f"a sheet of {wanted} clips is too large; give {MAX_CELLS} values at most")
    base = given_options(args) | given_options(args, Loading) | given_options(args, Saving)
    base["settings"] = parse_settings(args.settings)
    cells = [
        _cell(base, list(zip(args.over, values, strict=True)), folder)
        for values in product(*(axis.values for axis in args.over))]
    policy = policy_from_environment()
    for cell in cells:
        enforce(policy, cell.request)
    return cells


def _cell(base: Mapping[str, Any], chosen: Sequence[tuple[Axis, str]], folder: Path) -> Cell:
    options, label = dict(base), []
    for axis, value in chosen:
        if axis.word:
            pattern, prompt = rf"(?<!\w){re.escape(axis.word)}(?!\w)", options["prompt"]
            options["prompt"], times = re.subn(pattern, value.replace("\\", r"\\"), prompt)
            if not times:
                raise InputError(f"the prompt has no {axis.word!r} to replace: {prompt!r}")
        else:
            typed = typed_options([(axis.key, value)])
            options |= typed | {"settings": options["settings"] | typed.get("settings", {})}
        label.append(value if axis.key == "prompt" else f"{axis.key} {value}")
    loaded = {name: options.pop(name) for name in Loading.model_fields if name in options}
    saved = {name: options.pop(name) for name in Saving.model_fields if name in options}
    loading, request = choose_devices(Loading(**loaded), ()), Request(**options)
    marks = Saving(**saved).marks
    path = folder / f"{_identity(request, loading, marks)}.mp4"
    return Cell(", ".join(label), request, loading, marks, path)


def _identity(request: Request, loading: Loading, marks: Mapping[str, str]) -> str:
    from vidgen.pipeline.recipe import identity

    model = {"model": _content_hash(loading.model)}
    return identity(request, **loading.model_dump() | model | dict(marks))


@cache
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

    device, made = choose_device(), []
    have = available_memory(device)
    for cell in cells:
        folder = open_model(cell.loading.model)
        if not isinstance(folder, ModelFolder):
            return []
        plan = settle(folder, cell.request, cell.loading.devices)
        made.append(choose(folder, plan, cell.request, cell.loading, device, have))
    return made


def _lay_out(cells: Sequence[Cell], stem: str, args: Namespace, report: Report) -> int:
    """Write the sheet and the video; return the number of columns."""
    from vidgen import __version__
    from vidgen.media.grid import Grid
    from vidgen.media.write import write_clip

    values = len(args.over[-1].values)
    columns = values if len(args.over) > 1 or values < 6 else math.ceil(math.sqrt(values))
    recipe = {"vidgen": __version__, "sweep": {
        "prompt": args.prompt, "seed": args.seed, "columns": columns,
        "over": {str(axis): axis.values for axis in args.over},
        "cells": [{"label": cell.label, "path": cell.path.name} for cell in cells]}}
    grid = Grid([cell.path for cell in cells], [cell.label for cell in cells], columns)
    film = replace(grid.info, recipe=recipe)
    for path, frames, info in ((f"{stem}.png", [grid.still()[None]], replace(film, num_frames=1)),
                               (f"{stem}.mp4", grid.frames(), film)):
        write_clip(path, frames, info, overwrite=True)
        report.written(path)
    return columns
