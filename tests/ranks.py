"""Several gloo ranks for a test: forked by `warm` from a process that has imported all of it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from importlib import import_module
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from vidgen.core.errors import VidgenError

ROOT = Path(__file__).parents[1]


def start_rank(call: Callable[..., None], *args: Any) -> tuple[subprocess.Popen[bytes], Connection]:
    """A process that calls `call(*args, answer)`, and the other end of the pipe `answer`."""
    ours, theirs = Pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.ranks", str(theirs.fileno())], cwd=ROOT,
        pass_fds=[theirs.fileno()], env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    theirs.close()
    ours.send(sys.path)  # which test files are found by
    ours.send((call, args))
    return process, ours


def run_ranks(
    size: int, call: Callable[..., Any], *args: Any, timeout_s: float = 120, launched: bool = False
) -> list[Any]:
    """What `call(*args)` returns on each of `size` ranks of one process group.

    Args:
        size: number of ranks.
        call: a function of a module that can be imported; with picklable arguments and result.
        args: for it.
        timeout_s: after this they count as hanging.
        launched: don't make the group, but leave the environment that torchrun gives.
    """
    store = dist.TCPStore("127.0.0.1", 0, size, is_master=True, wait_for_workers=False)
    ranks = [start_rank(_run, store.port, rank, size, launched, call, args)
             for rank in range(size)]
    try:
        answers = []
        for _, answer in ranks:
            assert answer.poll(timeout_s), "the ranks hang"
            answers.append(answer.recv())
    finally:
        for child, answer in ranks:
            child.kill()
            child.wait()
            answer.close()
    failures = [text for _, text in answers if text]
    assert not failures, "\n".join(failures)
    return [answer for answer, _ in answers]


def launch_environment(port: int, rank: int, size: int) -> dict[str, str]:
    """What torchrun tells a rank whose rendezvous store runs elsewhere, at a port."""
    return {
        "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1",
    }


def _run(
    port: int, rank: int, size: int, launched: bool, call: Callable[..., Any],
    args: tuple[Any, ...], answer: Connection,
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    try:
        if launched:
            os.environ.update(launch_environment(port, rank, size))
        else:
            store = dist.TCPStore("127.0.0.1", port, size, is_master=False)
            dist.init_process_group(
                "gloo", store=dist.PrefixStore("ranks", store), rank=rank, world_size=size,
                timeout=timedelta(seconds=60),
            )
        answer.send((call(*args), ""))
    except BaseException:  # whatever it was, it is told
        answer.send((None, f"rank {rank}: {traceback.format_exc()}"))


class Launch:
    """Ranks that may die: processes as torchrun starts them, each with its messages in a file.

    Args:
        size: number of ranks.
        folder: where `rank-<n>.log` are written.
        call: a function of a module that can be imported.
        args: for it.
    """

    def __init__(self, size: int, folder: Path, call: Callable[..., Any], *args: Any) -> None:
        self.store = dist.TCPStore("127.0.0.1", 0, size, is_master=True, wait_for_workers=False)
        self.logs = [folder / f"rank-{rank}.log" for rank in range(size)]
        started = [start_rank(_speak, self.store.port, rank, size, log, call, args)
                   for rank, log in enumerate(self.logs)]
        self.ranks = [process for process, _ in started]
        self._pipes = [pipe for _, pipe in started]

    def codes(self, timeout_s: float) -> list[int | None]:
        """Exit codes of all ranks; None of one that has not left by then, which is killed."""
        until = time.monotonic() + timeout_s
        for rank in self.ranks:
            with suppress(subprocess.TimeoutExpired):
                rank.wait(max(0.0, until - time.monotonic()))
        codes = [rank.poll() for rank in self.ranks]
        self.kill()
        return codes

    def kill(self) -> None:
        """Have all gone at once."""
        for rank in self.ranks:
            rank.kill()
        for rank in self.ranks:
            rank.wait()


def _speak(
    port: int, rank: int, size: int, log: Path, call: Callable[..., Any], args: tuple[Any, ...],
    _answer: Connection,
) -> None:
    os.environ.update(launch_environment(port, rank, size))
    torch.set_num_threads(1)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    code = 0
    try:
        call(*args)
    except VidgenError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    sys.stderr.flush()
    os._exit(code)


def follow_order(answer: Connection) -> None:
    """Make the call that comes by a pipe."""
    sys.path[:] = answer.recv()
    call, args = answer.recv()
    call(*args, answer)


if __name__ == "__main__":
    # Calls are pickled as this module's, not as __main__'s.
    import_module("tests.ranks").follow_order(Connection(int(sys.argv[1])))
