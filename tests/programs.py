"""The programs in `train/` and `eval/`, which are in no package: run, or as modules."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from types import ModuleType

from tests.faults import ForkServer, Job

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Ended:
    """What a program left with."""

    returncode: int
    stdout: str
    stderr: str


def run_program(server: ForkServer, path: str, *arguments: str) -> Ended:
    """A program as `python PATH ARGUMENTS` runs it, but for the seconds of its imports.

    Args:
        server: forks its process.
        path: below the root: `train/toybox/release.py`.
        arguments: behind it.
    """
    job = Job("tests.programs:as_main", (path, arguments), timeout_s=300)
    outcome = server.run(job)
    assert outcome.result is not None, outcome
    return Ended(*outcome.result)


def as_main(path: str, arguments: tuple[str, ...]) -> tuple[int, str, str]:
    """In its process: exit code and what went to stdout and stderr."""
    out, err, code = StringIO(), StringIO(), 0
    sys.argv = [path, *arguments]
    with redirect_stdout(out), redirect_stderr(err):
        try:
            runpy.run_path(str(ROOT / path), run_name="__main__")
        except SystemExit as end:
            code = int(end.code or 0)
    return code, out.getvalue(), err.getvalue()


def load_program(path: str) -> ModuleType:
    """A program's module, made anew.

    Args:
        path: below the root: `train/toybox/release.py`.
    """
    name = path.removesuffix(".py").replace("/", "_")
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    program = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look there
    spec.loader.exec_module(program)
    return program
