"""`vidgen eval SUITE`: measure clips, or a model's clips of a list of prompts, with intervals."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vidgen.cli import eval_temporal
from vidgen.cli.parser import Parser
from vidgen.cli.report import Report
from vidgen.core.errors import InputError, OutputError, nearest

DESCRIPTION = "Score a model or clips. A killed run goes on where it stopped when called again."
SUFFIXES = (".txt", ".json")
"""Of lists of prompts."""
_SETTINGS = ("steps", "guidance", "shift", "sampler", "candidates", "binding", "frames", "size")
_SHARED = {"benchmark", "output", "overwrite", "json", "events"}
_OF_PROMPTS = {
    "model", "seed", "seeds", "dtype", "network", "first_images", "augmentation", "report",
    "workers", "ray", "threads", *_SETTINGS,
}  # fmt: skip


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the verb's options."""
    add = parser.add_argument
    add("benchmark", metavar="SUITE",
        help="temporal: clips of --videos, how steady they are in time; "
             "a file of prompts, .txt or .json: clips of them are made, then measured as temporal; "
             "leaderboard: --results on one page")
    add("-o", "--output", metavar="FILE", required=True,
        help="results as JSON; the scores of single clips go to FILE.jsonl as they come")
    add("--overwrite", action="store_true", help="replace existing results")
    add("--model", default="toybox", metavar="NAME|FOLDER",
        help="prompts: makes the clips; default %(default)s")
    add("--seed", type=int, default=0, metavar="N",
        help="prompts: of the first clip, the others follow; default %(default)s")
    add("--seeds", type=int, default=1, metavar="N",
        help="prompts: clips of each prompt, of seeds --seed and on; default %(default)s")
    add("--steps", type=int, metavar="N",
        help="prompts: denoising steps; default the model's, as all below")
    add("--guidance", type=float, metavar="G", help="prompts: how strongly the prompt is followed")
    add("--shift", type=float, metavar="X",
        help="prompts: of the noise schedule towards high noise")
    add("--sampler", metavar="NAME", help="prompts: euler, unipc or ancestral")
    add("--candidates", type=int, metavar="N", help="prompts: most that are drawn of each clip")
    add("--binding", type=float, metavar="X", help="prompts: how strongly things are told apart")
    add("--frames", type=int, metavar="N", help="prompts: length of the clips")
    add("--size", metavar="WxH", help="prompts: width and height in pixels")
    add("--dtype", choices=("fp32", "bf16", "fp16"), help="prompts: of the computation")
    add("--results", action="append", default=[], metavar="FILE",
        help="leaderboard: results of temporal or of prompts; may be repeated")
    eval_temporal.add_arguments(parser)


def run(args: Namespace, report: Report) -> int:
    """Check the output, measure, write the results, show a table."""
    kind = _kind(args.benchmark)
    _refuse_others(args, kind)
    if kind == "leaderboard":
        return _run_leaderboard(args, report)
    if Path(args.output).suffix != ".json":
        raise OutputError(f"results are JSON; {args.output} should end in .json")
    return eval_temporal.run(args, report) if kind == "temporal" else _run_prompts(args, report)


def _kind(benchmark: str) -> str:
    """Which suite is meant; a list of prompts is one by its file."""
    names = ("temporal", "leaderboard")
    if benchmark in names:
        return benchmark
    if Path(benchmark).suffix in SUFFIXES:
        return "prompts"
    raise InputError(f"unknown suite {benchmark!r}; {nearest(benchmark, names)} Or give a file of "
                     "prompts, .txt or .json")


def _refuse_others(args: Namespace, kind: str) -> None:
    """Refuse options that another suite would heed."""
    parser = Parser("vidgen eval", DESCRIPTION)
    add_arguments(parser)
    heeded = {
        "temporal": eval_temporal.OPTIONS, "prompts": _OF_PROMPTS, "leaderboard": {"results"},
    }[kind]  # fmt: skip
    for name, value in vars(args).items():
        if name not in heeded | _SHARED and value != parser.get_default(name):
            option = name.replace("_", "-")
            raise InputError(f"--{option} has no meaning for suite {args.benchmark}; leave it out")


def _run_prompts(args: Namespace, report: Report) -> int:
    """Make a suite's clips, measure them, write the results; 1 if a clip failed."""
    from vidgen.evaluation.scale import SuiteRun, run_suite
    from vidgen.pipeline.workers.types import Staff

    settings = {name: value for name in _SETTINGS if (value := getattr(args, name)) is not None}
    run_of = SuiteRun(
        args.benchmark, args.model, args.seeds, args.seed, settings, args.dtype,
        tuple(args.network), args.first_images, args.augmentation,
        Staff(args.workers, args.ray, args.threads),
    )  # fmt: skip
    eval_temporal.check_outputs(args, 1)
    return eval_temporal.write_results(run_suite(run_of, args.output, report), args, report)


def _run_leaderboard(args: Namespace, report: Report) -> int:
    from vidgen.core.runtime import check_output
    from vidgen.evaluation.leaderboard import page, read_entries, tables

    if Path(args.output).suffix != ".html":
        raise OutputError(f"a leaderboard is HTML; {args.output} should end in .html")
    check_output(args.output, overwrite=args.overwrite)
    entries = read_entries(args.results)
    return write_leaderboard(args.output, tables(entries), page(entries), report)


def write_leaderboard(
    output: str, found: Sequence[Mapping[str, Any]], html: str, report: Report
) -> int:
    """Write the page of many results, and report its tables."""
    from vidgen.core.runtime import atomic_write

    atomic_write(output, html.encode())
    report({"event": "written", "path": output})
    lines = [f"{number}. {row['name']}: {row['verdict']}" for table in found
             for number, row in enumerate(table["rows"], 1)]
    report.result({"path": output, "tables": found}, "\n".join([*lines, output]))
    return 0
