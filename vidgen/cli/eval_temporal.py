"""The options of `vidgen eval temporal`, what it does, and how its results are written."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from vidgen.cli.devices import add_workers
from vidgen.cli.report import Report
from vidgen.core.errors import OutputError

OPTIONS = {
    "videos", "network", "first_images", "prompt_suite", "augmentation", "workers", "ray",
    "report",
}  # fmt: skip


def add_arguments(parser: ArgumentParser) -> None:
    """Declare what only this suite heeds."""
    add = parser.add_argument
    add("--videos", action="append", metavar="FOLDER",
        help="temporal: clips to be measured; given again, the folders are compared")
    add("--network", action="append", default=[], metavar="NAME=PATH",
        help="temporal, prompts: a network of VBench's: dino, clip, dreamsim, raft, amt, "
        "cotracker or i3d")
    add("--first-images", metavar="FOLDER",
        help="temporal, prompts: pictures with which the clips begin, named like their prompts")
    add("--prompt-suite", metavar="FILE",
        help="temporal: the prompts, one a line or VBench's JSON; other clips are left out")
    add("--augmentation", default="none", metavar="TEXT",
        help="temporal, prompts: how the prompts were reworded; recorded; default %(default)s")
    add("--report", metavar="HTML", help="temporal, prompts: also write a page with charts")
    add_workers(parser, "temporal, prompts: clips")


def run(args: Namespace, report: Report) -> int:
    """Measure, write the results, show tables; 1 if a clip couldn't be measured."""
    from vidgen.evaluation.temporal.run import TemporalRun, run_temporal

    run_of = TemporalRun(
        tuple(args.videos or ()), tuple(args.network), args.first_images, args.prompt_suite,
        args.augmentation, args.workers, args.ray,
    )  # fmt: skip
    check_outputs(args, len(run_of.videos))
    return write_results(run_temporal(run_of, args.output, report), args, report)


def check_outputs(args: Namespace, num_folders: int) -> None:
    """Find out beforehand whether results can be written.

    Raises:
        OutputError: a file in the way, or of another kind.
    """
    from vidgen.core.runtime import check_output

    for path in (args.output, args.report, *_layout_paths(Path(args.output), num_folders)):
        if path is not None:
            check_output(path, overwrite=args.overwrite)
    if args.report is not None and Path(args.report).suffix != ".html":
        raise OutputError(f"the report is HTML; {args.report} should end in .html")


def write_results(result: dict[str, Any], args: Namespace, report: Report) -> int:
    """Write results, VBench's layout and the page; show tables; 1 if a clip has no scores."""
    from rich.console import Console

    from vidgen.core.runtime import atomic_write
    from vidgen.evaluation.temporal.report import page
    from vidgen.evaluation.temporal.summary import tables

    layouts = _layout_paths(Path(args.output), len(result["folders"]))
    for path, folder in zip(layouts, result["folders"], strict=True):
        atomic_write(path, (json.dumps(folder["dimensions"], indent=4) + "\n").encode())
        report({"event": "written", "path": str(path)})
    if args.report is not None:
        atomic_write(args.report, page(result).encode())
        report({"event": "written", "path": args.report})
    atomic_write(args.output, (json.dumps(result, indent=1) + "\n").encode())
    report({"event": "written", "path": args.output})
    report.result(result, args.output)
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 132)
    for table in tables(result):
        console.print(table)
    failed = [(folder, *why) for folder in result["folders"] for why in folder["failed"].items()]
    for folder, name, why in failed:
        print(f"not measured: {folder['path']}/{name}: {why}", file=sys.stderr)
    return int(bool(failed))


def _layout_paths(output: Path, num_folders: int) -> list[Path]:
    """Where VBench's layout goes, one file a folder."""
    numbers = [""] if num_folders == 1 else [f"_{n}" for n in range(1, num_folders + 1)]
    return [output.with_name(f"{output.stem}{number}_eval_results.json") for number in numbers]
