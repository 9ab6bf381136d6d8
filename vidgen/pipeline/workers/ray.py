"""Workers on a Ray cluster: one actor each, whose messages a thread passes on.

Every machine needs this version of vidgen and must share the same folders, including the command's
working folder.
"""

from __future__ import annotations

import logging
import os
import pickle
import queue
import re
import socket
import sys
import threading
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidgen import __version__
from vidgen.core.errors import InputError
from vidgen.core.protocols import OnEvent
from vidgen.pipeline.workers.pool import Message, WorkerHandle, WorkerPool
from vidgen.pipeline.workers.process import Worker

if TYPE_CHECKING:
    from vidgen.pipeline.workers.types import Work, WorkerOptions

LISTEN_S = 1.0
"""Time that an actor waits for a message before it answers; the answer is its heartbeat."""
_REACH_S = 20.0


class Actor:
    """A worker in the process that Ray creates on a machine of the cluster."""

    def __init__(self, work: bytes, threads: int, folder: str, version: str) -> None:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # before torch is loaded
        self._outbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._worker = Worker(self._outbox.put, threads)
        opened = _opened(work, folder, version)
        self._thread = threading.Thread(target=self._worker.run, args=(opened,), daemon=True)
        self._thread.start()

    def receive(self, kind: str, content: Any) -> None:
        """Begin a job, or cancel the running one."""
        self._worker.receive(kind, content)

    def listen(self) -> list[Message]:
        """Return the messages since the last call; wait up to `LISTEN_S` for the first."""
        messages: list[Message] = []
        with suppress(queue.Empty):
            messages.append(self._outbox.get(timeout=LISTEN_S))
            while True:
                messages.append(self._outbox.get_nowait())
        return messages or [("beat",)]

    def stop(self, seconds: float) -> None:
        """Stop between two steps and save the state."""
        self._worker.stop()
        self._thread.join(seconds)


def _opened(work: bytes, folder: str, version: str) -> Work:
    """Unpickle the work; with another version of vidgen or no such folder, refuse each job."""
    machine, problem = os.uname().nodename, ""
    try:
        os.chdir(folder)
    except OSError as error:
        problem = (f"machine {machine} can't open {folder} ({error.strerror}); all machines must "
                   "share the folders of the film and the model")
    if version != __version__:
        problem = (f"machine {machine} has vidgen {__version__}, the command {version}; install "
                   "the same on all")
    if not problem:
        try:
            opened: Work = pickle.loads(work)
            return opened
        except Exception as error:  # such as a module that this machine lacks
            problem = f"machine {machine} can't open the work ({type(error).__name__}: {error})"

    def refuse(_payload: Any, _on_event: OnEvent) -> Any:
        raise InputError(problem)

    return refuse


class RayPool(WorkerPool):
    """Actors of a cluster; raises InputError without Ray, or without such a cluster."""

    def __init__(self, work: bytes, workers: WorkerOptions) -> None:
        assert workers.ray is not None
        try:
            import ray
            import ray.exceptions
        except ImportError:
            raise InputError("--ray needs Ray; pip install 'vidgen[ray]'") from None
        self._ray: Any = ray
        self._stdout = redirect_stdout(sys.stderr)  # Ray reports problems on stdout
        self._is_own = not self._ray.is_initialized()
        if self._is_own:
            _connect(self._ray, workers.ray)
        machines = [each["Resources"] for each in self._ray.nodes() if each["Alive"]]
        gpus = int(sum(each.get("GPU", 0) for each in machines))
        count = workers.count or gpus or len(machines)
        cpus = int(min(each.get("CPU", 1) for each in machines))
        threads = workers.threads or max(1, min(cpus, len(machines) * cpus // count))
        options = {"num_cpus": min(threads, max(cpus, 1)), "num_gpus": int(gpus > 0),
                   "max_restarts": 0, "max_concurrency": 4}
        actor = self._ray.remote(**options)(Actor)
        self._stdout.__enter__()
        super().__init__(lambda number: RayWorker(number, self._ray, actor.remote(
            work, threads, str(Path.cwd()), __version__)), count)

    def end(self, grace_s: float = 0.0) -> None:
        """Kill all workers, and leave the cluster if this pool joined it."""
        super().end(grace_s)
        if self._is_own:
            self._ray.shutdown()
        self._stdout.__exit__(None, None, None)


class RayWorker(WorkerHandle):
    """An actor of the cluster."""

    def __init__(self, number: int, ray: Any, actor: Any) -> None:
        super().__init__(number)
        self._ray, self._actor = ray, actor
        self._fate = "its connection ended"
        self._stopped: Any = None
        self._thread = threading.Thread(target=self._pass_on, daemon=True)
        self._thread.start()

    def _pass_on(self) -> None:
        """Pass the actor's messages on until it or this worker ends."""
        with self._theirs, suppress(OSError):
            try:
                while True:
                    for message in self._ray.get(self._actor.listen.remote()):
                        self._theirs.send(message)
            except self._ray.exceptions.RayError as error:
                self._fate = str(error).strip().splitlines()[0]

    def send(self, kind: str, content: Any) -> None:
        """See `WorkerHandle`."""
        self._actor.receive.remote(kind, content)

    def fate(self) -> str:
        """See `WorkerHandle`."""
        return self._fate

    def stop(self) -> None:
        """See `WorkerHandle`."""
        if self.job is not None:
            self._stopped = self._actor.stop.remote(60.0)

    def end(self, grace_s: float = 0.0) -> None:
        """See `WorkerHandle`."""
        if self._stopped is not None and grace_s:
            self._ray.wait([self._stopped], timeout=grace_s)
        self._ray.kill(self._actor)
        self.connection.close()
        self._thread.join(5)  # until its process ends and frees its locks


def _connect(ray: Any, address: str) -> None:
    own = {"include_dashboard": False} if address == "local" else {}
    try:
        if (place := re.fullmatch(r"(?:ray://)?([\w.-]+):(\d+)", address)) is not None:
            # Ray itself would try for minutes
            socket.create_connection((place[1], int(place[2])), timeout=_REACH_S).close()
        ray.init(address=address, namespace="vidgen", log_to_driver=False,
                 logging_level=logging.ERROR, configure_logging=False, **own)
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"the Ray cluster {address!r} can't be joined: {error}; give auto, "
                         "host:port, ray://host:port, or local for one on this machine") from None
