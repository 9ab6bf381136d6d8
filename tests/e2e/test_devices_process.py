"""`--devices` as a command: a device that dies ends it, Ctrl-C as well."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROMPT = "a red car bounces across the desert"


def workers_of(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children
            if "workers.process" in Path(f"/proc/{child}/cmdline").read_text()]


def is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@contextmanager
def sampling(model: Path, folder: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A generation on two devices of more steps than anybody waits for, once it takes some."""
    events = folder / "events"
    command = [
        sys.executable, "-m", "vidgen", "generate", PROMPT, "--model", str(model), "--seed", "3",
        "--steps", "1000", "--devices", "2", "-o", "clip.mp4", "--events", str(events),
    ]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    try:
        until = time.monotonic() + 120
        while not (events.is_file() and '"sample"' in events.read_text()):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < until
            time.sleep(0.05)
        yield process, workers_of(process.pid)
    finally:
        process.kill()
        process.wait()


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's /proc")
@pytest.mark.parametrize(("victim", "code", "said"), [
    ("worker", 1, "error: device 1 of 2 failed: killed by SIGKILL"),
    ("interrupt", 130, "Stopped."),
    ("command", -9, ""),
])  # fmt: skip
def test_nothing_is_left_over(
    tiny_model: Path, tmp_path: Path, victim: str, code: int, said: str
) -> None:
    with sampling(tiny_model, tmp_path) as (process, workers):
        assert len(workers) == 1
        os.kill(*{
            "worker": (workers[0], signal.SIGKILL), "interrupt": (process.pid, signal.SIGINT),
            "command": (process.pid, signal.SIGKILL),
        }[victim])
        _, told = process.communicate(timeout=60)
        assert process.returncode == code
        assert said in told
        assert "Traceback" not in told
    until = time.monotonic() + 20
    while any(map(is_running, workers)):
        assert time.monotonic() < until
        time.sleep(0.05)
