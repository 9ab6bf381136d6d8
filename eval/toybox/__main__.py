"""Score a model on the Toybox suites: does a clip show what its sentence says?

    python -m eval.toybox -o results.json [--suite text] [--split test] [--model FOLDER]...

Results are JSON; the scores of single clips go to FILE.jsonl as they come, so a killed run goes on
where it stopped when it is called again.
"""

from __future__ import annotations

import json
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from eval.toybox.suite.items import Benchmark
from eval.toybox.suite.run import run_toybox
from eval.toybox.suite.table import table, weak_spots_table
from vidgen.cli.main import as_exit_code, parser_of
from vidgen.cli.options import add_workers
from vidgen.cli.report import Report
from vidgen.core.errors import OutputError
from vidgen.core.runtime import atomic_write, check_output
from vidgen.pipeline.workers.types import WorkerOptions

DESCRIPTION = "Score a model. A killed run goes on where it stopped when called again."
NOT_OF_BENCHMARK = {"output", "overwrite", "json", "events", "sheet", "workers", "ray", "threads"}
_TELL_EVERY_S = 20


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options; apart from the output's they are the fields of `Benchmark`."""
    add = parser.add_argument
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
        ("seeds", 1, "clips of each prompt, of seeds --seed and on"),
        ("batch", 8, "clips made at once"),
    ):
        add(f"--{name}", type=int, default=default, metavar="N", help=f"{what}; default {default}")
    add("--steps", type=int, metavar="N", help="denoising steps; default the model's, as all below")
    add("--guidance", type=float, metavar="G", help="how strongly the prompt is followed")
    add("--shift", type=float, metavar="X", help="of the noise schedule towards high noise")
    add("--sampler", metavar="NAME", help="euler, unipc or ancestral")
    parser.add_argument("--set", dest="own_settings", action="append", default=[],
        metavar="KEY=VALUE", help="a setting of this model alone; repeatable")
    add("--frames", type=int, metavar="N", help="length of the clips")
    add("--size", metavar="WxH", help="width and height in pixels")
    add("--dtype", choices=("fp32", "bf16", "fp16"), help="of the computation")
    add("--judge", metavar="FOLDER", help="another judge than the embedded one")
    add("--sound-judge", metavar="FOLDER", help="judge of sound; default the embedded one")
    add_workers(parser, "clips")


def run(args: Namespace, report: Report) -> int:
    """Check the output, score, write the results, show a table."""
    if Path(args.output).suffix != ".json":
        raise OutputError(f"results are JSON; {args.output} should end in .json")
    for path in (args.output, args.sheet):
        if path is not None:
            check_output(path, overwrite=args.overwrite)
    bench = Benchmark(**{k: v for k, v in vars(args).items() if k not in NOT_OF_BENCHMARK})
    workers = WorkerOptions(args.workers, args.ray, args.threads)
    result = run_toybox(bench, args.output, _told(report), args.sheet, workers)
    atomic_write(args.output, (json.dumps(result, indent=1) + "\n").encode())
    report({"event": "written", "path": args.output})
    report.result(result, args.output)
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 132)
    for drawn in filter(None, (table(result), weak_spots_table(result))):
        console.print(drawn)
    return 0


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


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code: 0, 1, 2 or 130."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    with as_exit_code(arguments) as codes:
        codes.append(_run(arguments))
    return codes[-1]


def _run(arguments: Sequence[str]) -> int:
    args = parser_of(sys.modules[__name__], "python -m eval.toybox").parse(arguments)
    with Report(as_json=args.json, events=args.events) as report:
        return run(args, report)


if __name__ == "__main__":
    raise SystemExit(main())
