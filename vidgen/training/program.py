"""The common door of the programs in `train/`: one YAML run, overrides, resume, clean errors."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from vidgen.core.config import apply_overrides, build, dump, load_yaml
from vidgen.core.errors import VidgenError
from vidgen.core.runtime import atomic_write
from vidgen.training.loop import Task, train

Run = TypeVar("Run", bound=Any)


def run_program(doc: str, run_type: type[Run], make_task: Callable[[Run], Task]) -> int:
    """Read `-c RUN.yaml` as `run_type` (which has a field `run`), train, print scores as JSON.

    Returns:
        Exit code: 0 done, 2 bad input (message on stderr, no traceback).
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("-c", "--config", required=True, metavar="RUN.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    options = parser.parse_args()
    try:
        settings = apply_overrides(load_yaml(options.config), options.set)
        config = build(run_type, settings, options.config)
        Path(config.run.folder).mkdir(parents=True, exist_ok=True)
        resolved = json.dumps(dump(config), indent=1).encode()
        atomic_write(Path(config.run.folder) / "task.json", resolved)
        result = train(make_task(config), config.run, resume=options.resume)
    except VidgenError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps({"step": result.step, "finished": result.finished, **result.metrics}))
    return 0
