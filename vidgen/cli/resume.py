"""Going on with what an earlier run of a command left: the same for every verb that makes clips."""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vidgen.cli.report import Report
from vidgen.core.errors import InputError, OutputError

if TYPE_CHECKING:
    from vidgen.cli.journals import OutputJournal
    from vidgen.pipeline.journal.journal import Journal


def add_resume(parser: ArgumentParser) -> None:
    """Declare the options that say what becomes of an output that is there or half made."""
    parser.add_argument("--overwrite", action="store_true",
        help="replace an existing output; start an unfinished one anew")
    parser.add_argument("--resume", action="store_true",
        help="go on with what an earlier run of the same command left; what is done stays")


def journals_of_outputs(
    paths: Sequence[str], args: Namespace, report: Report, prompt: str | None = None
) -> list[OutputJournal]:
    """A journal for each output; it tells what is done and what goes on.

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
    """Where work stops halfway, say what to do; not of what another process is at."""
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
    """Where the command names no attention back end, take the one that an unfinished clip has."""
    from vidgen.core.runtime import ATTENTION_VARIABLE, attention_by

    recipes = [journal.recipe or {} for journal in journals if journal.unfinished]
    began = next((recipe["attention"] for recipe in recipes if "attention" in recipe), "auto")
    with attention_by("auto" if os.environ.get(ATTENTION_VARIABLE) else str(began)):
        yield


def seed_of(journal: Journal) -> int | None:
    """The seed of a job, or of its finished output; None where neither tells one."""
    plan = (journal.recipe or {}).get("plan")
    seed = plan.get("seed") if isinstance(plan, dict) else None
    return seed if isinstance(seed, int) else None
