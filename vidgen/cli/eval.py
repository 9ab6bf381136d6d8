"""`vidgen eval SUITE`: score a model or clips, with intervals beside each figure."""

from __future__ import annotations

import json
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vidgen.cli import eval_suite, eval_temporal
from vidgen.cli.parser import Parser
from vidgen.cli.report import Report
from vidgen.core.errors import InputError, OutputError, nearest

DESCRIPTION = "Score a model or clips. A killed run goes on where it stopped when called again."
_SHARED = {"benchmark", "output", "overwrite", "json", "events"}
_STAFF = {"workers", "ray", "threads"}
_OTHERS = (eval_temporal.OPTIONS | eval_suite.OWN) - _STAFF - {"seeds"}
_NOT_OF_BENCHMARK = _SHARED | {"sheet"} | _STAFF | _OTHERS
_TELL_EVERY_S = 20


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the verb's options; apart from the output's they are the fields of `Benchmark`."""
    add = parser.add_argument
    add("benchmark", metavar="SUITE",
        help="toybox: prompts of the procedural world, scored by its judge; "
             "temporal: clips of --videos, how steady they are in time; "
             "a file of prompts, .txt or .json: clips of them are made, then measured as temporal; "
             "leaderboard: --results on one page")
    add("-o", "--output", metavar="FILE", required=True,
        help="results as JSON; the scores of single clips go to FILE.jsonl as they come")
    add("--overwrite", action="store_true", help="replace existing results")
    add("--sheet", metavar="PNG", help="also draw the first 16 clips, six frames each")
    add("--model", default="toybox", metavar="NAME|FOLDER", help="default %(default)s")
    add("--split", choices=("dev", "test"), default="dev",
        help="dev for choosing, test to be run once for a release")
    add("--suite", choices=("all", "text", "image", "vae", "judge", "triples", "phrasings",
                            "extend", "sound", "full"), default="all",
        help="which part; all: text, image and vae; full: every part; default all")
    for name, default, what in (
        ("prompts", 300, "prompts of text to video"),
        ("held-out", 100, "prompts whose sprite, motion and place never came together in training"),
        ("images", 200, "first frames of image to video"),
        ("reserved", 60, "clips of reserved sprites for the VAE"),
        ("two", 60, "prompts of two sprites"),
        ("pairs", 1000, "of prompts alike but for a sprite, one triple trained on, one not"),
        ("phrasings", 200, "prompts as people type them, beside the grammar's of the same scenes"),
        ("extensions", 20, "clips of several windows"),
        ("windows", 4, "of each of these"),
        ("sounds", 100, "bouncing clips with sound"),
        ("seed", 0, "of the first clip, the others follow"),
        ("batch", 8, "clips made at once"),
    ):
        add(f"--{name}", type=int, default=default, metavar="N", help=f"{what}; default {default}")
    add("--steps", type=int, metavar="N", help="denoising steps; default the model's, as all below")
    add("--guidance", type=float, metavar="G", help="how strongly the prompt is followed")
    add("--shift", type=float, metavar="X", help="of the noise schedule towards high noise")
    add("--sampler", metavar="NAME", help="euler, unipc or ancestral")
    add("--candidates", type=int, metavar="N", help="most that are drawn of each clip")
    add("--binding", type=float, metavar="X", help="how strongly things are told apart")
    add("--frames", type=int, metavar="N", help="length of the clips")
    add("--size", metavar="WxH", help="width and height in pixels")
    add("--dtype", choices=("fp32", "bf16", "fp16"), help="of the computation")
    add("--judge", metavar="FOLDER", help="another judge than the embedded one")
    add("--sound-judge", metavar="FOLDER", help="judge of sound; default the embedded one")
    eval_temporal.add_arguments(parser)
    eval_suite.add_arguments(parser)


def run(args: Namespace, report: Report) -> int:
    """Check the output, score, write the results, show a table."""
    from vidgen.core.runtime import atomic_write, check_output

    kind = _kind(args.benchmark)
    _refuse_others(args, kind)
    if kind == "leaderboard":
        return eval_suite.run_leaderboard(args, report)
    if Path(args.output).suffix != ".json":
        raise OutputError(f"results are JSON; {args.output} should end in .json")
    if kind == "temporal":
        return eval_temporal.run(args, report)
    if kind == "prompts":
        return eval_suite.run(args, report)
    from vidgen.evaluation.toybox.run import Benchmark

    for path in (args.output, args.sheet):
        if path is not None:
            check_output(path, overwrite=args.overwrite)
    options = {k: v for k, v in vars(args).items() if k not in _NOT_OF_BENCHMARK}
    bench = Benchmark(**options)

    from rich.console import Console

    from vidgen.evaluation.toybox.run import run_toybox
    from vidgen.evaluation.toybox.table import table, weak_spots_table
    from vidgen.pipeline.workers.scheduler import Staff

    staff = Staff(args.workers, args.ray, args.threads)
    result = run_toybox(bench, args.output, _told(report), args.sheet, staff)
    atomic_write(args.output, (json.dumps(result, indent=1) + "\n").encode())
    report({"event": "written", "path": args.output})
    report.result(result, args.output)
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 132)
    for drawn in filter(None, (table(result), weak_spots_table(result))):
        console.print(drawn)
    return 0


def _kind(benchmark: str) -> str:
    """Which suite is meant; a list of prompts is one by its file."""
    names = ("toybox", "temporal", "leaderboard")
    if benchmark in names:
        return benchmark
    if Path(benchmark).suffix in eval_suite.SUFFIXES:
        return "prompts"
    raise InputError(f"unknown suite {benchmark!r}; {nearest(benchmark, names)} Or give a file of "
                     "prompts, .txt or .json")


def _refuse_others(args: Namespace, kind: str) -> None:
    """Refuse options that another suite would heed."""
    parser = Parser("vidgen eval", DESCRIPTION)
    add_arguments(parser)
    heeded = {
        "temporal": eval_temporal.OPTIONS, "prompts": eval_suite.OPTIONS,
        "leaderboard": {"results"}, "toybox": vars(args).keys() - _OTHERS,
    }[kind]  # fmt: skip
    for name, value in vars(args).items():
        if name not in heeded | _SHARED and value != parser.get_default(name):
            option = name.replace("_", "-")
            raise InputError(f"--{option} has no meaning for suite {args.benchmark}; leave it out")


def _told(report: Report) -> Callable[[dict[str, Any]], None]:
    """Pass events on; where no progress bar can be drawn, say now and then how long it takes."""
    last = time.monotonic()

    def tell(event: dict[str, Any]) -> None:
        nonlocal last
        report(event)
        if event["event"] != "progress":
            return
        now = time.monotonic()
        if sys.stderr.isatty() or (now - last < _TELL_EVERY_S and event["done"] < event["total"]):
            return
        last = now
        minutes = event["seconds_left"] / 60
        print("{stage}: {done}/{total}".format(**event), f"{minutes:.0f} min left", file=sys.stderr)

    return tell
