"""`vidgen eval PROMPTS` and `vidgen eval leaderboard`: their options, and what they do."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from vidgen.cli import eval_temporal
from vidgen.cli.report import Report
from vidgen.core.errors import OutputError

SUFFIXES = (".txt", ".json")
"""Of lists of prompts."""
_SETTINGS = ("steps", "guidance", "shift", "sampler", "candidates", "binding", "frames", "size")
OWN = {"seeds", "threads", "results"}
"""Options that other suites don't heed."""
OPTIONS = {
    "model", "seed", "seeds", "dtype", "network", "first_images", "augmentation", "report",
    "workers", "ray", "threads", *_SETTINGS,
}  # fmt: skip


def add_arguments(parser: ArgumentParser) -> None:
    """Declare what only these heed."""
    add = parser.add_argument
    add("--seeds", type=int, default=1, metavar="N",
        help="toybox, prompts: clips of each prompt, of seeds --seed and on; default %(default)s")
    add("--results", action="append", default=[], metavar="FILE",
        help="leaderboard: results of temporal or of prompts; may be repeated")


def run(args: Namespace, report: Report) -> int:
    """Make a suite's clips, measure them, write the results; 1 if a clip failed."""
    from vidgen.evaluation.scale import SuiteRun, run_suite
    from vidgen.pipeline.workers.scheduler import Staff

    settings = {name: value for name in _SETTINGS if (value := getattr(args, name)) is not None}
    run_of = SuiteRun(
        args.benchmark, args.model, args.seeds, args.seed, settings, args.dtype,
        tuple(args.network), args.first_images, args.augmentation,
        Staff(args.workers, args.ray, args.threads),
    )  # fmt: skip
    eval_temporal.check_outputs(args, 1)
    return eval_temporal.write_results(run_suite(run_of, args.output, report), args, report)


def run_leaderboard(args: Namespace, report: Report) -> int:
    """Write the page of many results."""
    from vidgen.core.runtime import atomic_write, check_output
    from vidgen.evaluation.leaderboard import page, read_entries, tables

    if Path(args.output).suffix != ".html":
        raise OutputError(f"a leaderboard is HTML; {args.output} should end in .html")
    check_output(args.output, overwrite=args.overwrite)
    entries = read_entries(args.results)
    atomic_write(args.output, page(entries).encode())
    report({"event": "written", "path": args.output})
    found = tables(entries)
    lines = [f"{number}. {row['name']}: {row['verdict']}" for table in found
             for number, row in enumerate(table["rows"], 1)]
    report.result({"path": args.output, "tables": found}, "\n".join([*lines, args.output]))
    return 0
