"""`vidgen models`: what is shipped and ready to use."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from vidgen.cli.report import Report

DESCRIPTION = "List the models that are ready to use; any model folder can be named by its path."


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the verb's options: none of its own."""


def run(_args: Namespace, report: Report) -> int:
    """Print one line a model."""
    from vidgen.core.config import dump
    from vidgen.core.runtime import megabytes
    from vidgen.weights.folder import list_embedded, open_model

    models, lines = [], []
    for name in list_embedded():
        model = open_model(name)
        facts = {
            "name": name, "path": str(model.path), "family": model.family,
            "license": model.license, "tasks": list(model.tasks), "bytes": model.num_bytes,
            "defaults": dump(model.defaults),
        }
        models.append(facts)
        d = model.defaults
        lines.append(
            f"{name:<10} {megabytes(model.num_bytes):>9}  {d.width}x{d.height}, "
            f"{d.num_frames} frames at {d.fps} fps, {model.license}; {', '.join(model.tasks)}"
        )
    report.result(models, "\n".join(lines) or "no embedded model in this installation")
    return 0
