"""Members of a crew as processes of this machine: started, watched, ended."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import IO

import torch.distributed as dist

from vidgen.core.runtime import child_environment, exit_text
from vidgen.pipeline.devices.link import FAILURE, LOST


class Child:
    """A member's process on this machine; it leaves with this one, however that ends."""

    def __init__(self, rank: int, port: int, size: int, device: str) -> None:
        self.rank = rank
        self.stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vidgen.pipeline.devices.member", str(port), str(rank),
             str(size), device],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=self.stderr,
            env=child_environment(),
        )

    def wait(self, seconds: float) -> None:
        """Wait for it to leave."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)

    def end(self) -> None:
        """Have it gone."""
        self.process.kill()
        self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.stderr.close()

    def fate(self) -> str | None:
        """How it failed; None where it didn't, or only because another one did."""
        code = self.process.poll()
        if code is None or code == LOST:
            return None
        return exit_text(code, self.stderr)


def find_failure(
    children: Sequence[Child], store: dist.Store, patience_s: float = 0.0
) -> str | None:
    """Which rank failed and why, as soon as that shows; None where nothing does.

    Args:
        children: the processes, as far as they are of this one.
        store: where a rank tells of its failure.
        patience_s: how long to look.
    """
    until = time.monotonic() + patience_s
    while True:
        with suppress(RuntimeError):
            if store.check([FAILURE]):
                return store.get(FAILURE).decode()
        for child in children:
            fate = child.fate()
            if fate is not None:
                return f"device {child.rank} of {len(children) + 1} failed: {fate}"
        if time.monotonic() >= until:
            return None
        time.sleep(0.05)


def end_all(children: Sequence[Child]) -> None:
    """End what still runs."""
    for child in children:
        child.end()
