"""Several gloo ranks for a test: forked from a server that has imported all once, so cheap."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist


def run_ranks(size: int, call: Callable[..., Any], *args: Any, timeout_s: float = 120) -> list[Any]:
    """What `call(*args)` returns on each of `size` ranks of one process group.

    Args:
        size: number of ranks.
        call: a function of a module that can be imported; with picklable arguments and result.
        args: for it.
        timeout_s: after this they count as hanging.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.ranks", call.__module__])
    store = dist.TCPStore("127.0.0.1", 0, size, is_master=True, wait_for_workers=False)
    pipes = [context.Pipe(duplex=False) for _ in range(size)]
    children = [
        context.Process(target=_run, args=(store.port, rank, size, call, args, pipe[1]))
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


def _run(
    port: int, rank: int, size: int, call: Callable[..., Any], args: tuple[Any, ...],
    answer: Connection,
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    try:
        store = dist.TCPStore("127.0.0.1", port, size, is_master=False)
        dist.init_process_group(
            "gloo", store=dist.PrefixStore("ranks", store), rank=rank, world_size=size,
            timeout=timedelta(seconds=60),
        )
        answer.send((call(*args), ""))
    except BaseException:  # whatever it was, it is told
        answer.send((None, f"rank {rank}: {traceback.format_exc()}"))
