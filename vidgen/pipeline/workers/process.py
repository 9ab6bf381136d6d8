"""A worker's program: receive jobs, run them, report; `python -m` with a pipe's number.

Messages to a worker, after the work itself and its number of threads:
    ("job", payload)        run this; one at a time
    ("cancel", why)         stop the job at work at its next event
and from it:
    ("beat",)               once a second, so that a hanging worker is noticed
    ("ready",)              the work is unpickled
    ("tell", event)         an event of the job
    ("log", level, text, trace)
    ("done", result), ("failed", error)     a cancelled job failed with `Cancelled`

A worker whose scheduler is gone exits: first by a signal that lets a journal save its state, then
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

from vidgen.core.errors import Cancelled, InputError, VidgenError
from vidgen.core.protocols import OnEvent
from vidgen.pipeline.workers.types import pin_threads

BEAT_S = 1.0
GRACE_S = 5.0
Say = Callable[[tuple[Any, ...]], None]


class LogMessages(logging.Handler):
    """Sends the root logger's records to the scheduler; its level is WARNING by default."""

    def __init__(self, say: Say) -> None:
        super().__init__()
        self.say = say

    def emit(self, record: logging.LogRecord) -> None:
        """Send one, its traceback separately."""
        trace = logging.Formatter().formatException(record.exc_info) if record.exc_info else None
        self.say(("log", record.levelno, record.getMessage(), trace))


def tell_warnings(say: Say) -> None:
    """Send this process's warnings from here on."""
    logging.getLogger().addHandler(LogMessages(say))

    def show(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        if issubclass(category, UserWarning):
            say(("log", logging.WARNING, str(message), None))

    warnings.showwarning = show


def answer(work: Any, payload: Any, threads: int, tell: OnEvent) -> tuple[Any, ...]:
    """Run a job: ("done", result) or ("failed", error)."""
    try:
        pin_threads(threads)
        return "done", work(payload, tell)
    except VidgenError as error:
        return "failed", error
    except Exception as error:
        told = "".join(traceback.format_exception(error)).strip()
        return "failed", VidgenError(f"a worker came upon {type(error).__name__}: {error}\n{told}")


def check_place(folder: str) -> None:
    """Work from a folder, or raise InputError if it doesn't exist here."""
    try:
        os.chdir(folder)
    except OSError as error:
        raise InputError(f"machine {os.uname().nodename} doesn't see {folder} ({error.strerror}); "
                         "all machines must share the folders of the film and the model") from None


class _Orders:
    """Receives the scheduler's messages while a job runs."""

    def __init__(self, connection: Connection) -> None:
        self.jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._connection = connection
        self._reason: str | None = None
        threading.Thread(target=self._receive, daemon=True).start()

    def check_cancelled(self) -> None:
        """Raise Cancelled if the job is to be stopped."""
        if self._reason is not None:
            raise Cancelled(self._reason)

    def _receive(self) -> None:
        with suppress(EOFError, OSError):
            while True:
                kind, content = self._connection.recv()
                if kind == "cancel":
                    self._reason = content
                else:
                    self._reason = None  # what came before was for another job
                    self.jobs.put(content)
        _leave()


def main() -> int:
    """Run jobs until the scheduler is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the scheduler hears it, and says what to do
    signal.signal(signal.SIGTERM, _stop)
    connection, lock = Connection(int(sys.argv[1])), threading.Lock()

    def say(message: tuple[Any, ...]) -> None:
        with lock:
            connection.send(message)

    threading.Thread(target=_beat, args=(say,), daemon=True).start()
    try:
        content, threads = connection.recv()
        tell_warnings(say)
        work = pickle.loads(content)
        orders = _Orders(connection)

        def tell(event: dict[str, Any]) -> None:
            orders.check_cancelled()
            say(("tell", event))

        say(("ready",))
        while True:
            say(answer(work, orders.jobs.get(), threads, tell))
    except (EOFError, KeyboardInterrupt, BrokenPipeError, ConnectionResetError):
        return 0


def _beat(say: Say) -> None:
    while True:
        try:
            say(("beat",))
        except OSError:
            _leave()
        time.sleep(BEAT_S)


def _leave() -> None:
    """Let the job save its state, then exit."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S)
    os._exit(1)


def _stop(*_: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the first one is enough
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
