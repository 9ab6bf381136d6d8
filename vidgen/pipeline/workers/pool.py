"""Handles and pools of workers for the scheduler, and the processes of this machine."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Pipe, wait
from typing import IO, TYPE_CHECKING, Any

from vidgen.core.runtime import child_environment, exit_text

if TYPE_CHECKING:
    from vidgen.pipeline.workers.types import Job

Message = tuple[Any, ...]
"""Message of a worker, see `process`; ("lost", why) for a worker that ended."""


class WorkerHandle(ABC):
    """Handle of one worker, whose messages arrive at `connection`."""

    def __init__(self, number: int) -> None:
        self.number = number  # from 1 on; a worker that replaces another has the same
        self.connection, self._theirs = Pipe()
        self.job: Job | None = None  # the current one
        self.is_ready = False  # True after its message "ready"
        self.last_message_s: float | None = None
        self.last_progress_s = 0.0  # time of its job's start or last event

    def begin(self, job: Job) -> None:
        """Send a job to the worker."""
        self.job, self.last_progress_s = job, time.monotonic()
        self.send("job", job.payload)

    def cancel(self, why: str) -> None:
        """Stop its job at the next event; the job fails with `Cancelled(why)`."""
        self.send("cancel", why)

    @abstractmethod
    def send(self, kind: str, content: Any) -> None:
        """Send a message of `process`; the pool reports a worker that is lost."""

    def receive(self) -> Message:
        """Return the worker's next message."""
        try:
            message: Message = self.connection.recv()
        except (EOFError, OSError, pickle.UnpicklingError):
            return "lost", self.fate()
        return message

    @abstractmethod
    def fate(self) -> str:
        """Describe its end, such as "killed by SIGKILL"."""

    @abstractmethod
    def stop(self) -> None:
        """Ask the worker to save its state and exit."""

    @abstractmethod
    def end(self, grace_s: float = 0.0) -> None:
        """Kill the worker, after `grace_s` seconds to exit by itself."""


class WorkerPool:
    """Several workers; `start_worker` starts or requests one by its number."""

    def __init__(self, start_worker: Callable[[int], Any], count: int) -> None:
        self._start_worker = start_worker
        self.workers: list[Any] = []
        try:
            for number in range(1, count + 1):
                self.workers.append(start_worker(number))
        except BaseException:
            self.end()
            raise

    def listen(self, seconds: float) -> list[tuple[Any, Message]]:
        """Return workers' messages, at most one of each, after up to `seconds`."""
        waiting = {worker.connection: worker for worker in self.workers}
        ready = [waiting[each] for each in wait(list(waiting), seconds)]
        return [(worker, worker.receive()) for worker in ready]

    def replace(self, worker: WorkerHandle) -> None:
        """Kill a worker and start another one with its number."""
        worker.end()
        self.workers[worker.number - 1] = self._start_worker(worker.number)

    def end(self, grace_s: float = 0.0) -> None:
        """Kill all workers, after `grace_s` seconds to save their state and exit."""
        until = time.monotonic() + grace_s
        for worker in self.workers if grace_s else ():
            worker.stop()
        for worker in self.workers:
            worker.end(max(0.0, until - time.monotonic()))


class LocalPool(WorkerPool):
    """Processes of this machine, for pickled work.

    Args:
        threads: threads of each job; None: as the work sets them.
        gpus: names in CUDA_VISIBLE_DEVICES, one for each process in turn; empty: every process
            sees all GPUs.
    """

    workers: list[LocalWorker]

    def __init__(
        self, work: bytes, count: int, threads: int | None, gpus: Sequence[str] = ()
    ) -> None:
        def start_worker(number: int) -> LocalWorker:
            gpu = {"CUDA_VISIBLE_DEVICES": gpus[(number - 1) % len(gpus)]} if gpus else {}
            return LocalWorker(number, work, threads, gpu)

        super().__init__(start_worker, count)


class LocalWorker(WorkerHandle):
    """Process of this machine with its own environment; it exits when this one does."""

    def __init__(
        self, number: int, work: bytes, threads: int | None, gpu: Mapping[str, str] = {}
    ) -> None:
        super().__init__(number)
        own = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        handle = self._theirs.fileno()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vidgen.pipeline.workers.process", str(handle)],
            pass_fds=[handle], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=self._stderr, env=child_environment(**own, **gpu),
        )
        self._theirs.close()
        self._lock = threading.Lock()
        with suppress(OSError):
            self.connection.send((work, threads))

    def begin(self, job: Job) -> None:
        """See `WorkerHandle`; stderr of earlier jobs is dropped."""
        os.ftruncate(self._stderr.fileno(), 0)
        os.lseek(self._stderr.fileno(), 0, os.SEEK_SET)
        super().begin(job)

    def send(self, kind: str, content: Any) -> None:
        """See `WorkerHandle`."""
        with self._lock, suppress(OSError):
            self.connection.send((kind, content))

    def fate(self) -> str:
        """See `WorkerHandle`."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        code = self.process.poll()
        return "it closed its connection" if code is None else exit_text(code, self._stderr)

    def stop(self) -> None:
        """See `WorkerHandle`."""
        self.process.terminate()

    def end(self, grace_s: float = 0.0) -> None:
        """See `WorkerHandle`."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(grace_s)
        self.process.kill()
        self.process.wait()
        self.connection.close()
        self._stderr.close()


def visible_gpus() -> list[str]:
    """Return the visible GPUs by their names in CUDA_VISIBLE_DEVICES."""
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    names = given.split(",") if given else [str(index) for index in range(count)]
    return names[:count]
