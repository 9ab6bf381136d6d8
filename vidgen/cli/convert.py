"""`vidgen convert SRC DST --to LAYOUT`: a model folder in another program's layout."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from vidgen.cli.report import Report

DESCRIPTION = "Write a model folder in another layout; the source stays as it is."


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument("source", metavar="SRC", help="an embedded model's name, or a folder")
    parser.add_argument("target", metavar="DST", help="the folder to make")
    parser.add_argument("--to", choices=("diffusers",), required=True,
                        help="the layout that diffusers' WanPipeline.from_pretrained reads")


def run(args: Namespace, report: Report) -> int:
    """Convert, and name what the other layout has no place for."""
    from vidgen.weights.convert import to_diffusers
    from vidgen.weights.folder import open_model

    left = to_diffusers(open_model(args.source), Path(args.target))
    told = f"; without {len(left)} tensors of its sound" if left else ""
    report.result({"path": args.target, "left_behind": left}, f"{args.target}{told}")
    return 0
