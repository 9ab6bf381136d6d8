"""Several gloo ranks for a test: forked from a server that has imported all once, so cheap."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from vidgen.core.errors import VidgenError


def forking_context() -> ForkServerContext:
    """A context whose server imports once, as it starts, all that ranks of any test file use."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.velocity", "tests.ranks", "deepspeed"])
    return context


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
    context = forking_context()
    store = dist.TCPStore("127.0.0.1", 0, size, is_master=True, wait_for_workers=False)
    pipes = [context.Pipe(duplex=False) for _ in range(size)]
    children = [
        context.Process(target=_run, args=(store.port, rank, size, launched, call, args, pipe[1]))
        for rank, pipe in enumerate(pipes)
    ]
    try:
        for child in children:
            child.start()
        answers = []
        for ours, _ in pipes:
            assert ours.poll(timeout_s), "the ranks hang"
            answers.append(ours.recv())
    finally:
        for child in children:
            child.kill()
            child.join()
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
        context = forking_context()
        self.store = dist.TCPStore("127.0.0.1", 0, size, is_master=True, wait_for_workers=False)
        self.logs = [folder / f"rank-{rank}.log" for rank in range(size)]
        self.ranks = [
            context.Process(target=_speak, args=(self.store.port, rank, size, log, call, args))
            for rank, log in enumerate(self.logs)
        ]
        for rank in self.ranks:
            rank.start()

    def codes(self, timeout_s: float) -> list[int | None]:
        """Exit codes of all ranks; None of one that has not left by then, which is killed."""
        until = time.monotonic() + timeout_s
        for rank in self.ranks:
            rank.join(max(0.0, until - time.monotonic()))
        codes = [rank.exitcode for rank in self.ranks]
        self.kill()
        return codes

    def kill(self) -> None:
        """Have all gone at once."""
        for rank in self.ranks:
            rank.kill()
        for rank in self.ranks:
            rank.join()


def _speak(
    port: int, rank: int, size: int, log: Path, call: Callable[..., Any], args: tuple[Any, ...]
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
