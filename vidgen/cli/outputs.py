"""Outputs of a command: their names, their seeds, and what an earlier run of it left."""

from __future__ import annotations

import json
import os
import re
import secrets
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidgen.cli.options import Parser
from vidgen.cli.report import Report
from vidgen.core.errors import InputError, OutputError
from vidgen.core.request import OUTPUT, Request
from vidgen.core.runtime import slug

if TYPE_CHECKING:
    from vidgen.cli.journals import OutputJournal
    from vidgen.pipeline.journal.journal import Journal

_APART = ("seed", "count", "retry", "strict", "expand")
"""Options that no single clip's recognition depends on."""


def output_names(output: str | None, request: Request) -> list[str]:
    """Return the output of each clip: the name itself for one, name-1, name-2, ... for several."""
    if output is None:
        output = f"{slug(request.prompt)}-{request.seed}.mp4"
    if request.count == 1:
        return [output]
    tail = "/" if output.endswith("/") else Path(output).suffix
    stem = output.removesuffix(tail)
    return [f"{stem}-{number}{tail}" for number in range(1, request.count + 1)]


def choose_seed(args: Namespace, request: Request, report: Report) -> int:
    """Return the seed that an earlier run of the same command drew, or a new one."""
    if args.resume:
        seeds = _seeds_of(args.output, request) or _seeds_of_finished(args, request)
        if args.output is not None and request.retry:  # further ones are higher
            seeds = {min(seeds)} if seeds else seeds
        if len(seeds) > 1:
            raise InputError(f"clips of this prompt have the seeds {sorted(seeds)}; say with "
                             "--seed which one is meant")
        if seeds:
            return seeds.pop()
    seed = secrets.randbelow(2**31)
    report({"event": "note", "text": f"seed {seed}"})
    return seed


def _seeds_of(output: str | None, request: Request) -> set[int]:
    """Return seeds of the first clip, from this command's journals and a named output."""
    from vidgen.pipeline.journal.job import SUFFIX
    from vidgen.pipeline.journal.journal import Journal

    if output is not None:
        names: list[tuple[str, int, int | None]] = [
            (path, i, None) for i, path in enumerate(output_names(output, request))
        ]
    else:  # the name tells the first clip's seed
        name = re.compile(rf"{re.escape(slug(request.prompt))}-(\d+)(?:-\d+)?\.mp4")
        jobs = (path.name.removesuffix(SUFFIX) for path in Path().glob(f"*{SUFFIX}"))
        names = [(match[0], 0, int(match[1])) for match in map(name.fullmatch, jobs) if match]
    seeds = set()
    for path, index, first in names:
        recipe = Journal(path, resume=True).recipe or {}
        plan = recipe.get("plan")
        if plan and recipe.get("rewritten", plan)["prompt"] == request.prompt:
            seeds.add(plan["seed"] - index if first is None else first)
    return seeds


def _seeds_of_finished(args: Namespace, request: Request) -> set[int]:
    """Return seeds of the first clip, from the names of this command's finished clips."""
    from vidgen.media.probe import read_recipe

    if args.output is not None:
        return set()
    name = re.compile(rf"{re.escape(slug(request.prompt))}-(\d+)(-\d+)?\.mp4")
    found = [match for path in Path().iterdir() if (match := name.fullmatch(path.name))
             and (match[2] is None) == (request.count == 1)]  # fmt: skip
    if not found:
        return set()
    is_of_command = _recognised(request, args)
    return {int(match[1]) for match in found if is_of_command(read_recipe(match[0]) or {})}


def _recognised(request: Request, args: Namespace) -> Callable[[Mapping[str, Any]], bool]:
    """Return a check of whether a recipe is of this very command, but for its seed."""
    from vidgen.pipeline.recipe import request_facts
    from vidgen.pipeline.recorded import recorded_request
    from vidgen.weights.layouts import open_model

    def as_data(facts: dict[str, Any]) -> dict[str, Any]:
        asked = {name: value for name, value in facts["request"].items() if name not in _APART}
        plain: dict[str, Any] = json.loads(json.dumps(facts | {"request": asked}))
        return plain

    given, model = as_data(request_facts(request)), open_model(args.model).content_hash

    def is_of_command(recipe: Mapping[str, Any]) -> bool:
        return (
            bool(recipe.get("plan")) and as_data(recorded_request(recipe)) == given
            and ("rewritten" in recipe) == (request.expand is not None)
            and args.dtype in (None, recipe["dtype"]) and args.quantize == recipe.get("quantize")
            and recipe["model"]["sha256"] == model
        )

    return is_of_command


def clip_seeds(request: Request, journals: Sequence[Journal]) -> tuple[list[int], range]:
    """Return each clip's seed, its own or that of --retry, and those still to be tried."""
    first = request.seed or 0
    spare = range(first + len(journals), first + len(journals) + request.retry)
    found = [seed_of(journal) for journal in journals]
    seeds = [seed if seed is not None and seed in spare else first + index
             for index, seed in enumerate(found)]
    return seeds, spare[max(seeds) - spare.start + 1 :] if max(seeds) in spare else spare


def add_resume(parser: Parser) -> None:
    """Declare the options for outputs that exist or are unfinished."""
    add = parser.group(OUTPUT).add_argument
    add("--overwrite", action="store_true",
        help="replace an existing output; restart an unfinished one")
    add("--resume", action="store_true",
        help="continue an earlier run of the same command; finished clips stay")


def journals_of_outputs(
    paths: Sequence[str], args: Namespace, report: Report, prompt: str | None = None
) -> list[OutputJournal]:
    """Return a journal for each output; it reports what is done and what goes on.

    Under --overwrite nothing is taken over from a clip of another `prompt`.
    """
    from vidgen.cli.journals import OutputJournal

    journals = [OutputJournal(path, report, resume=args.resume, overwrite=args.overwrite)
                for path in paths]
    for journal in journals if args.overwrite and prompt is not None else ():
        recipe = journal.recipe or {}
        plan = recipe.get("plan", {"prompt": prompt})
        if recipe.get("rewritten", plan)["prompt"] != prompt:
            journal.resume = False
    return journals


@contextmanager
def told_how_to_go_on(journals: Sequence[Journal], report: Report) -> Iterator[None]:
    """Where work stops halfway, say what to do; not for jobs of another process."""
    from vidgen.pipeline.journal.job import job_facts

    try:
        yield
    except BaseException as error:
        for journal in journals:
            journal.pause()
            if isinstance(error, OutputError) and job_facts(journal.folder)["running"]:
                continue
            if journal.unfinished and not isinstance(error, InputError):
                text = f"{journal.output} is not finished; the same command with --resume goes on"
                report({"event": "note", "text": text})
        raise


@contextmanager
def as_it_began(journals: Sequence[Journal]) -> Iterator[None]:
    """Where the command names no attention back end, take that of an unfinished clip."""
    from vidgen.core.runtime import ATTENTION_VARIABLE, attention_by

    recipes = [journal.recipe or {} for journal in journals if journal.unfinished]
    began = next((recipe["attention"] for recipe in recipes if "attention" in recipe), "auto")
    with attention_by("auto" if os.environ.get(ATTENTION_VARIABLE) else str(began)):
        yield


def seed_of(journal: Journal) -> int | None:
    """Return the seed of a job or of its finished output; None if neither has one."""
    plan = (journal.recipe or {}).get("plan")
    seed = plan.get("seed") if isinstance(plan, dict) else None
    return seed if isinstance(seed, int) else None
