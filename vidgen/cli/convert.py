"""`vidgen convert SRC DST --to LAYOUT`: write a model folder in another program's layout."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from vidgen.cli.report import Report

DESCRIPTION = "Write a model folder in another layout, without loss; the source stays as it is."


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument("source", metavar="SRC",
                        help="an embedded model's name, a folder, or an id on the hub")
    parser.add_argument("target", metavar="DST", help="the folder to write")
    parser.add_argument("--to", choices=("wan", "diffusers", "vidgen"), required=True,
                        help="wan: for Wan's own programs; diffusers: for diffusers' Wan "
                             "pipelines; vidgen: with hashes, for this program")


def run(args: Namespace, report: Report) -> int:
    """Convert, and report the number of tensors without a name in the other layout."""
    from vidgen.weights.convert import convert
    from vidgen.weights.layouts import open_model

    unnamed = convert(open_model(args.source), Path(args.target), args.to)
    text = args.target
    if unnamed:
        text += f"; {len(unnamed)} tensors have no name in this layout and keep their own"
    result = {"path": args.target, "layout": args.to, "unnamed": unnamed}
    report.result(result, text)
    return 0
