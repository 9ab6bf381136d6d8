"""A worker's program: receive jobs, run them, report; `python -m` with a pipe's number.

A thread sends a heartbeat once a second, so that a hanging worker is noticed, and a worker without
scheduler exits: first by a signal that lets a journal save its state, then at once.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from vidgen.core.errors import InputError, VidgenError
from vidgen.pipeline.workers.types import pin_threads

BEAT_S = 1.0
GRACE_S = 5.0
Say = Callable[[tuple[Any, ...]], None]


class LogMessages(logging.Handler):
    """Sends warnings to the scheduler, which logs them."""

    def __init__(self, say: Say) -> None:
        super().__init__(logging.WARNING)
        self.say = say

    def emit(self, record: logging.LogRecord) -> None:
        """Send one."""
        self.say(("log", record.levelno, record.getMessage()))


def tell_warnings(say: Say) -> None:
    """Send this process's warnings from here on."""
    logging.getLogger().addHandler(LogMessages(say))

    def show(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        if issubclass(category, UserWarning):
            say(("log", logging.WARNING, str(message)))

    warnings.showwarning = show


def answer(work: Any, payload: Any, threads: int, say: Say) -> tuple[Any, ...]:
    """Run a job: ("done", result) or ("failed", error)."""
    try:
        pin_threads(threads)
        return "done", work(payload, lambda event: say(("tell", event)))
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
        say(("ready",))
        while True:
            say(answer(work, connection.recv(), threads, say))
    except (EOFError, KeyboardInterrupt, BrokenPipeError, ConnectionResetError):
        return 0


def _beat(say: Say) -> None:
    while True:
        try:
            say(("beat",))
        except OSError:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(GRACE_S)
            os._exit(1)
        time.sleep(BEAT_S)


def _stop(*_: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the first one is enough
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
