"""`vidgen jobs [PATH ...]`: list unfinished clips with their progress, or remove them."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vidgen.cli.report import Report
from vidgen.core.errors import InputError

DESCRIPTION = (
    "List unfinished clips with their progress, age and size. To continue one, run its command "
    "again with -o and --resume."
)


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the verb's options."""
    add = parser.add_argument
    add("paths", metavar="PATH", nargs="*", default=["."],
        help="a folder to look in, or the output of one clip; default the folder you are in")
    add("--prune", action="store_true", help="remove the listed jobs, except running ones")
    add("--yes", action="store_true", help="with --prune: confirm the removal")


def run(args: Namespace, report: Report) -> int:
    """Print one line per job; with --prune --yes remove them."""
    from vidgen.pipeline.journal.job import job_facts

    if args.yes and not args.prune:
        raise InputError("--yes goes with --prune; add --prune, or leave --yes out")
    folders = [folder for path in args.paths for folder in _folders(Path(path))]
    found = {folder: job_facts(folder) for folder in folders}
    # a job may have ended meanwhile
    found = {folder: facts for folder, facts in found.items() if folder.is_dir()}
    if args.prune and args.yes:
        found = {folder: facts | _removed(folder, facts) for folder, facts in found.items()}
    jobs = list(found.values())
    text = "\n".join(map(_line, jobs)) or "no unfinished jobs"
    if args.prune and not args.yes and jobs:
        text += "\nnothing was removed; --prune --yes removes these jobs"
    report.result(jobs, text)
    return 1 if any("kept" in facts for facts in jobs) else 0


def _folders(path: Path) -> list[Path]:
    from vidgen.pipeline.journal.job import SUFFIX, job_folder

    if path.name.endswith(SUFFIX) and path.is_dir():
        return [path]
    if path.name and job_folder(path).is_dir():
        return [job_folder(path)]
    if path.is_dir():
        places = (path, *path.glob("*.cells"), *path.glob("*.shots"))  # of sweeps and films
        found = (inside for place in places for inside in place.glob(f"*{SUFFIX}"))
        return sorted(inside for inside in found if inside.is_dir())
    raise InputError(f"{path} is no folder, and no unfinished job has this output; "
                     "vidgen jobs lists them")


def _removed(folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    from vidgen.pipeline.journal.job import remove_job

    if facts["running"]:
        return {"kept": "it is running"}
    try:
        remove_job(folder)
    except OSError as error:
        return {"kept": error.strerror or str(error)}
    return {"removed": True}


def _line(facts: Mapping[str, Any]) -> str:
    from vidgen.core.runtime import size_text, time_text
    from vidgen.pipeline.journal.job import progress_text

    head = "removed " if "removed" in facts else ""
    parts = [progress_text(facts), f"{time_text(facts['age_s'])} old", size_text(facts["bytes"])]
    parts += ["running"] if facts["running"] else []
    parts += [facts["problem"]] if "problem" in facts else []
    parts += [f"not removed: {facts['kept']}"] if "kept" in facts else []
    return f"{head}{facts['output']}  {', '.join(parts)}"
