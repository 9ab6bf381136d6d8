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
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe, wait
from typing import IO, TYPE_CHECKING, Any

from vidgen.core.runtime import child_environment, exit_text

if TYPE_CHECKING:
    from vidgen.pipeline.workers.types import Job

Message = tuple[Any, ...]


class WorkerHandle(ABC):
    """Handle of one worker; a worker that replaces another has the same number."""

    def __init__(self, number: int) -> None:
        self.number = number  # from 1 on
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
        """Send a message of `process`; errors are left to `listen`, which reports a lost worker."""

    @abstractmethod
    def stop(self) -> None:
        """Ask the worker to save its state and exit."""

    @abstractmethod
    def end(self, grace_s: float = 0.0) -> None:
        """Kill the worker, after `grace_s` seconds to exit by itself."""


class WorkerPool(ABC):
    """All workers of one kind, in `workers` after `start`."""

    def __init__(self, count: int) -> None:
        self.workers: list[Any] = []
        self._count = count

    def start(self) -> None:
        """Start all workers, or request them."""
        for number in range(1, self._count + 1):
            self.workers.append(self._start_worker(number))

    @abstractmethod
    def listen(self, seconds: float) -> Sequence[tuple[WorkerHandle, Message]]:
        """Return workers' messages, after up to `seconds`; ("lost", why) for a lost worker."""

    def replace(self, worker: WorkerHandle) -> None:
        """Kill a worker and start another one with its number."""
        worker.end()
        self.workers[worker.number - 1] = self._start_worker(worker.number)

    def end(self, grace_s: float = 0.0) -> None:
        """Kill all workers, after `grace_s` seconds to exit by themselves."""
        until = time.monotonic() + grace_s
        for worker in self.workers:
            worker.end(max(0.0, until - time.monotonic()))

    @abstractmethod
    def _start_worker(self, number: int) -> WorkerHandle:
        """Start a worker, or request it."""


class LocalPool(WorkerPool):
    """Processes of this machine, for pickled work.

    Args:
        threads: threads of each job; None: as the work sets them.
        gpus: names in CUDA_VISIBLE_DEVICES, one for each process in turn; empty: every process
            sees all GPUs.
    """

    def __init__(
        self, work: bytes, count: int, threads: int | None, gpus: Sequence[str] = ()
    ) -> None:
        super().__init__(count)
        self._work, self._threads, self._gpus = work, threads, gpus

    def _start_worker(self, number: int) -> LocalWorker:
        own: dict[str, str] = {}
        if self._threads is not None:
            own["OMP_NUM_THREADS"] = str(self._threads)
        if self._gpus:
            own["CUDA_VISIBLE_DEVICES"] = self._gpus[(number - 1) % len(self._gpus)]
        return LocalWorker(number, self._work, self._threads, own)

    def listen(self, seconds: float) -> list[tuple[LocalWorker, Message]]:
        """See `WorkerPool`."""
        waiting = {worker.connection: worker for worker in self.workers}
        messages: list[tuple[LocalWorker, Message]] = []
        for connection in wait(list(waiting), seconds):
            assert isinstance(connection, Connection)
            worker = waiting[connection]
            try:
                message = connection.recv()
            except (EOFError, OSError, pickle.UnpicklingError):
                message = ("lost", worker.fate())
            messages.append((worker, message))
        return messages


class LocalWorker(WorkerHandle):
    """Process of this machine with its own environment; it exits when this one does."""

    def __init__(
        self, number: int, work: bytes, threads: int | None, own: Mapping[str, str]
    ) -> None:
        super().__init__(number)
        self.connection, theirs = Pipe()
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vidgen.pipeline.workers.process", str(theirs.fileno())],
            pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=self._stderr, env=child_environment(**own),
        )
        theirs.close()
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
        """Return a description of its end, such as "killed by SIGKILL"."""
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
