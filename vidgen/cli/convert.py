"""`vidgen convert SRC DST --to LAYOUT`: a model folder in another program's layout, and back."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from vidgen.cli.report import Report

DESCRIPTION = "Write a model folder in another layout, without loss; the source stays as it is."


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument("source", metavar="SRC",
                        help="an embedded model's name, a folder, or an id on the hub")
    parser.add_argument("target", metavar="DST", help="the folder to make")
    parser.add_argument("--to", choices=("wan", "diffusers", "vidgen"), required=True,
                        help="what Wan's own programs read, what diffusers' Wan pipelines read, "
                             "or vidgen's own, with hashes")


def run(args: Namespace, report: Report) -> int:
    """Convert, and name the tensors for which the other layout has no name."""
    from vidgen.weights.convert import convert
    from vidgen.weights.layouts import open_model

    unnamed = convert(open_model(args.source), Path(args.target), args.to)
    told = f"; {len(unnamed)} tensors have no name there and keep their own" if unnamed else ""
    result = {"path": args.target, "layout": args.to, "unnamed": unnamed}
    report.result(result, f"{args.target}{told}")
    return 0
