"""The common door of the training programs: one YAML run, overrides, resume, clean errors."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any, TypeVar

from train.toybox.phases import PhasedTask, train
from train.toybox.runs import load_run
from vidgen.core.config import build, dump
from vidgen.core.errors import exit_code
from vidgen.training.engines.distributed import join_ranks

Run = TypeVar("Run", bound=Any)


def run_program(doc: str, run_type: type[Run], make_task: Callable[[Run], PhasedTask]) -> int:
    """Read `-c RUN.yaml` as `run_type` (which has a field `run`), train, print scores as JSON.

    Returns:
        Exit code: 0 done, 2 bad input (message on stderr, no traceback).
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("-c", "--config", required=True, metavar="RUN.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed's launcher
    options = parser.parse_args()

    def work() -> None:
        settings = load_run(options.config, options.set)
        config = build(run_type, settings, options.config)
        with join_ranks(config.run) as place:
            task = make_task(config)
            result = train(task, config.run, resume=options.resume, record=dump(config))
        if place.main:
            print(json.dumps({"step": result.step, "finished": result.finished, **result.metrics}))

    return exit_code(work)
