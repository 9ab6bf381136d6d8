"""Program of a worker process: receive jobs, run them, report; its argument is a pipe's number.

Messages to a worker, after the pickled work and its number of threads:
    ("job", payload)        run a job; one at a time
    ("cancel", why)         stop the running job at its next event
Messages from it:
    ("beat",)               once a second, so that a hanging worker is noticed
    ("ready",)              the work is unpickled
    ("event", event)        an event of the job
    ("log", level, text, trace)
    ("done", result), ("failed", error)     a cancelled job failed with `Cancelled`

A worker that loses its scheduler exits: first by a signal that lets a journal save its state, then
at once.
"""

from __future__ import annotations

import logging
import os
import pickle
import queue
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from vidgen.core.errors import Cancelled, VidgenError
from vidgen.pipeline.workers.types import Work, pin_threads

BEAT_S = 1.0
GRACE_S = 5.0
Send = Callable[[tuple[Any, ...]], None]


class LogMessages(logging.Handler):
    """Log handler that sends the root logger's records to the scheduler."""

    def __init__(self, send: Send) -> None:
        super().__init__()
        self.send = send

    def emit(self, record: logging.LogRecord) -> None:
        """Send a record, its traceback separately."""
        trace = logging.Formatter().formatException(record.exc_info) if record.exc_info else None
        self.send(("log", record.levelno, record.getMessage(), trace))


class Worker:
    """Runner of jobs, one at a time, in a process or an actor.

    `send` sends a message to the scheduler; `threads` None leaves the process's number.
    """

    def __init__(self, send: Send, threads: int | None) -> None:
        self._send, self._threads = send, threads
        self._jobs: queue.SimpleQueue[tuple[Any] | None] = queue.SimpleQueue()
        self._reason: str | None = None
        logging.getLogger().addHandler(LogMessages(send))
        warnings.showwarning = self._show_warning

    def receive(self, kind: str, content: Any) -> None:
        """Queue a job for `run`, or cancel the running one."""
        if kind == "cancel":
            self._reason = content
        else:
            self._reason = None  # an earlier cancel was for another job
            self._jobs.put((content,))

    def stop(self) -> None:
        """Cancel the running job, and let `run` return after it."""
        self._reason = "stopped"
        self._jobs.put(None)

    def run(self, work: Work) -> None:
        """Run jobs as they are received."""
        self._send(("ready",))
        while (job := self._jobs.get()) is not None:
            self._send(self._answer(work, *job))

    def _answer(self, work: Work, payload: Any) -> tuple[Any, ...]:
        try:
            pin_threads(self._threads)
            return "done", work(payload, self._on_event)
        except VidgenError as error:
            return "failed", error
        except Exception as error:
            trace = "".join(traceback.format_exception(error)).strip()
            text = f"a worker failed with {type(error).__name__}: {error}\n{trace}"
            return "failed", VidgenError(text)

    def _on_event(self, event: dict[str, Any]) -> None:
        if self._reason is not None:
            raise Cancelled(self._reason)
        self._send(("event", event))

    def _show_warning(
        self, message: Warning | str, category: type[Warning], *_: object, **__: object
    ) -> None:
        if issubclass(category, UserWarning):
            self._send(("log", logging.WARNING, str(message), None))


def main() -> int:
    """Run jobs until the connection to the scheduler ends; return the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the scheduler gets it too, and decides
    signal.signal(signal.SIGTERM, _stop)
    connection, lock = Connection(int(sys.argv[1])), threading.Lock()

    def send(message: tuple[Any, ...]) -> None:
        with lock:
            connection.send(message)

    threading.Thread(target=_beat, args=(send,), daemon=True).start()
    try:
        content, threads = connection.recv()
        worker = Worker(send, threads)
        work = pickle.loads(content)
        threading.Thread(target=_receive, args=(connection, worker), daemon=True).start()
        worker.run(work)
    except (EOFError, KeyboardInterrupt, BrokenPipeError, ConnectionResetError):
        pass
    return 0


def _receive(connection: Connection, worker: Worker) -> None:
    with suppress(EOFError, OSError):
        while True:
            worker.receive(*connection.recv())
    _leave()


def _beat(send: Send) -> None:
    with suppress(OSError):
        while True:
            send(("beat",))
            time.sleep(BEAT_S)
    _leave()


def _leave() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S)
    os._exit(1)


def _stop(*_: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the first one is enough
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
