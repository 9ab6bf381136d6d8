"""`vidgen eval SUITE`: measure clips, or a model's clips of a list of prompts, with intervals."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from vidgen.cli.options import Parser, add_request_options, add_workers
from vidgen.cli.report import Report
from vidgen.core.errors import InputError, OutputError, nearest
from vidgen.core.values import parse_settings

DESCRIPTION = "Score a model or clips. The same command continues a run that was stopped."
SUFFIXES = (".txt", ".json")
"""Suffixes of lists of prompts."""
_NAMES = ("temporal", "leaderboard")
_SETTINGS = ("steps", "guidance", "shift", "sampler", "settings", "frames", "size")


def add_arguments(parser: Parser) -> None:
    """Declare the options of the suite that the command line names."""
    add = parser.add_argument
    add("benchmark", metavar="SUITE",
        help="temporal: measure the temporal quality of the clips in --videos; "
             "a file of prompts, .txt or .json: make clips from it, then measure them; "
             "leaderboard: compare --results on one page")
    has_file = any(Path(word).suffix in SUFFIXES for word in parser.words)
    suite = next((name for name in _NAMES if name in parser.words), "prompts" * has_file)
    add("-o", "--output", metavar="FILE", required=True,
        help="the page as HTML" if suite == "leaderboard" else
        "results as JSON; the scores of single clips are appended to FILE.jsonl")
    add("--overwrite", action="store_true", help="replace existing results")
    if suite == "temporal":
        add("--videos", action="append", default=[], metavar="FOLDER",
            help="clips to measure; repeat it to compare folders")
        add("--prompt-suite", metavar="FILE",
            help="the prompts, one a line or VBench's JSON; other clips are left out")
    elif suite == "leaderboard":
        add("--results", action="append", default=[], metavar="FILE",
            help="results of temporal or of prompts; may be repeated")
    elif suite == "prompts":
        add("--model", default="toybox", metavar="NAME|FOLDER",
            help="the model that makes the clips; default %(default)s")
        add("--seed", type=int, default=0, metavar="N",
            help="seed of each prompt's first clip; the others count up; default %(default)s")
        add("--seeds", type=int, default=1, metavar="N",
            help="number of clips per prompt; default %(default)s")
        add_request_options(parser, (*_SETTINGS, "dtype"))
    else:
        parser.epilog = "vidgen eval SUITE --help lists the options of a suite."
    if suite in ("temporal", "prompts"):
        add("--network", action="append", default=[], metavar="NAME=PATH",
            help="a network of VBench: dino, clip, dreamsim, raft, amt or i3d")
        add("--first-images", metavar="FOLDER",
            help="pictures that the clips must start with, named like their prompts")
        add("--report", metavar="HTML", help="also write a page with charts")
        add_workers(parser, "clips", threads=suite == "prompts")


def run(args: Namespace, report: Report) -> int:
    """Check the output, measure, write the results and print a table."""
    is_list = args.benchmark not in _NAMES
    if is_list and Path(args.benchmark).suffix not in SUFFIXES:
        raise InputError(f"unknown suite {args.benchmark!r}; {nearest(args.benchmark, _NAMES)} Or "
                         "give a file of prompts, .txt or .json")
    if args.benchmark == "leaderboard":
        return _run_leaderboard(args, report)
    _check_output(args.output, ".json", "results are JSON", args)
    if args.report is not None:
        _check_output(args.report, ".html", "the report is HTML", args)
    if is_list:
        return _write_results(_run_prompts(args, report), args, report)
    from vidgen.evaluation.temporal.run import TemporalRun, run_temporal

    run_of = TemporalRun(
        tuple(args.videos), tuple(args.network), args.first_images, args.prompt_suite,
        args.workers, args.ray)
    return _write_results(run_temporal(run_of, args.output, report), args, report)


def _check_output(path: str, suffix: str, what: str, args: Namespace) -> None:
    from vidgen.core.runtime import check_output

    if Path(path).suffix != suffix:
        raise OutputError(f"{what}; {path} should end in {suffix}")
    check_output(path, overwrite=args.overwrite)


def _write_results(result: dict[str, Any], args: Namespace, report: Report) -> int:
    from rich.console import Console

    from vidgen.core.runtime import atomic_write
    from vidgen.evaluation.temporal.report import page, tables

    if args.report is not None:
        atomic_write(args.report, page(result).encode())
        report.written(args.report)
    atomic_write(args.output, (json.dumps(result, indent=1) + "\n").encode())
    report.written(args.output)
    console = Console(width=None if sys.stdout.isatty() else 132)
    with console.capture() as shown:
        console.print(*tables(result), sep="\n")
    report.result(result, f"{shown.get()}{args.output}")
    failed = [(folder, *why) for folder in result["folders"] for why in folder["failed"].items()]
    for folder, name, why in failed:
        print(f"not measured: {folder['path']}/{name}: {why}", file=sys.stderr)
    return int(bool(failed))


def _run_prompts(args: Namespace, report: Report) -> dict[str, Any]:
    from vidgen.evaluation.scale import SuiteRun, run_suite
    from vidgen.pipeline.workers.types import WorkerOptions

    settings = {name: value for name in _SETTINGS if (value := getattr(args, name)) is not None}
    settings["settings"] = parse_settings(args.settings)
    run_of = SuiteRun(
        args.benchmark, args.model, args.seeds, args.seed, settings, args.dtype,
        tuple(args.network), args.first_images, WorkerOptions(args.workers, args.ray, args.threads))
    return run_suite(run_of, args.output, report)


def _run_leaderboard(args: Namespace, report: Report) -> int:
    from vidgen.core.runtime import atomic_write
    from vidgen.evaluation.leaderboard import page, read_entries, tables

    _check_output(args.output, ".html", "a leaderboard is HTML", args)
    entries = read_entries(args.results)
    found = tables(entries)
    atomic_write(args.output, page(entries).encode())
    report.written(args.output)
    lines = [f"{number}. {row['name']}: {row['verdict']}" for table in found
             for number, row in enumerate(table["rows"], 1)]
    report.result({"path": args.output, "tables": found}, "\n".join([*lines, args.output]))
    return 0
