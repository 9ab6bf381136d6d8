"""`vidgen check FILE`: find flashes, frozen or black stretches, drift and more in a film file."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from vidgen.cli.report import Report

DESCRIPTION = "Find faults in a clip. The exit code is 1 if it has one."


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument("file", metavar="FILE", help="video, animation or folder of pictures")
    parser.add_argument("--image", metavar="FIRST",
                        help="the picture that the clip must start with")


def run(args: Namespace, report: Report) -> int:
    """Check the file; return 1 if it has a fault."""
    from vidgen.media.checks import as_data, check_file

    found = as_data(check_file(args.file, args.image))
    lines = [f"{f['severity']}: {f['kind']}: {f['text']}" for f in found["findings"]]
    text = "\n".join([*lines, f"{args.file}: {found['verdict']}"])
    report.result({"path": args.file, **found}, text)
    return int(found["verdict"] == "fault")
