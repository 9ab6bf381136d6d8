"""Independent calls on several processes of this machine, each result as it comes."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import TypeVar

from vidgen.core.errors import VidgenError

Key = TypeVar("Key", bound=Hashable)
Job = TypeVar("Job")
Result = TypeVar("Result")


def worked(
    call: Callable[[Job], Result], jobs: Mapping[Key, Job], workers: int
) -> Iterator[tuple[Key, Result]]:
    """What `call` gives for each job, in the order in which they get ready.

    Args:
        call: a module's function; called in this process where one worker is enough.
        jobs: by what their results are to be known by; picklable.
        workers: processes at most. They end with this one, however it ends.

    Raises:
        VidgenError: a worker was killed; and whatever `call` raises.
    """
    workers = min(workers, len(jobs))
    if workers < 2:
        for key, job in jobs.items():
            yield key, call(job)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent) as pool:
        running: dict[Future[Result], Key] = {pool.submit(call, j): k for k, j in jobs.items()}
        try:
            for future in as_completed(running):
                yield running.pop(future), future.result()
        except BrokenProcessPool:
            raise VidgenError(
                "a worker was killed, perhaps for want of memory; call again with fewer --workers, "
                "what is done stays"
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _end_with_parent() -> None:
    """Have this process end when the one that started it is gone, be it by SIGKILL."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
