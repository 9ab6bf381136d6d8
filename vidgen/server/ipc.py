"""Both ends of a child process that speaks JSON lines.

Crashes, hangs and memory stay in the child, and the process that answers HTTP goes on. The child
leaves as soon as its parent is gone, however that ended.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import IO, Any

from vidgen.core.runtime import child_environment

Message = dict[str, Any]
HEARTBEAT_S = 2.0
log = logging.getLogger(__name__)


class Child:
    """The parent's end: starts the process and reads its messages.

    Args:
        module: that the process runs; it speaks through `Parent`.
        arguments: of the module.
        on_message: called with each message, from a thread of its own.
        on_exit: called once with why the process left, after its last message.
    """

    def __init__(
        self, module: str, arguments: Sequence[str], on_message: Callable[[Message], None],
        on_exit: Callable[[str], None],
    ) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
            env=child_environment(),
        )
        self._on_message, self._on_exit = on_message, on_exit
        self._lock = threading.Lock()
        self._last_words: deque[str] = deque(maxlen=5)
        self._stderr = threading.Thread(target=self._hear_stderr, daemon=True)
        self._reader = threading.Thread(target=self._hear, daemon=True)
        self._stderr.start()
        self._reader.start()

    def send(self, message: Message) -> None:
        """Send a message; one to a process that has left is lost."""
        with self._lock, suppress(OSError, ValueError):
            _pipe(self.process.stdin).write(json.dumps(message).encode() + b"\n")
            _pipe(self.process.stdin).flush()

    def leave(self, patience_s: float) -> None:
        """Let it end by itself; kill it after a while."""
        with self._lock, suppress(OSError):
            _pipe(self.process.stdin).close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(patience_s)
        self.kill()
        self._reader.join()

    def kill(self) -> None:
        """Kill it."""
        self.process.kill()
        self.process.wait()

    def _hear(self) -> None:
        with _pipe(self.process.stdout) as lines:
            for line in lines:
                self._take_in(line)
        self.process.wait()
        self._stderr.join(1.0)
        with self._lock, suppress(OSError):  # what was never sent on can't be any more
            _pipe(self.process.stdin).close()
        self._on_exit(self._fate())

    def _take_in(self, line: bytes) -> None:
        try:
            message = json.loads(line)
        except ValueError:
            return  # the end of a line that a kill cut off
        try:
            self._on_message(message)
        except Exception:
            log.exception("a message could not be taken in")

    def _hear_stderr(self) -> None:
        with _pipe(self.process.stderr) as lines:
            for line in lines:
                text = line.decode(errors="replace").rstrip()
                self._last_words.append(text)
                log.info("%s", text)

    def _fate(self) -> str:
        code = self.process.returncode
        if code < 0:
            name = signal.Signals(-code).name
            return f"killed by {name}" + (", maybe for lack of memory" if code == -9 else "")
        told = f" ({self._last_words[-1][:200]})" if self._last_words else ""
        return f"left with exit code {code}{told if code else ''}"


class Parent:
    """The child's end; nothing but messages goes to the real stdout from here on.

    Args:
        on_message: called with each message, from a thread of its own.
    """

    def __init__(self, on_message: Callable[[Message], None]) -> None:
        self._out = os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)
        self._lock, self._on_message = threading.Lock(), on_message
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is the parent's to answer
        threading.Thread(target=self._hear, daemon=True).start()
        threading.Thread(target=self._beat, daemon=True).start()

    def tell(self, message: Message) -> None:
        """Send a message to the parent; leave if it is gone."""
        try:
            with self._lock:
                self._out.write(json.dumps(message).encode() + b"\n")
                self._out.flush()
        except OSError:
            os._exit(1)

    def _hear(self) -> None:
        for line in sys.stdin.buffer:
            self._on_message(json.loads(line))
        os._exit(0)  # the parent is gone, or wants this one gone: what there is lies on the disk

    def _beat(self) -> None:
        pause = threading.Event()
        while not pause.wait(HEARTBEAT_S):
            self.tell({"event": "alive"})


class TellingHandler(logging.Handler):
    """Sends log records to the parent, with the job at work."""

    def __init__(self, parent: Parent, job: Callable[[], str | None]) -> None:
        super().__init__(logging.INFO)
        self._parent, self._job = parent, job

    def emit(self, record: logging.LogRecord) -> None:
        """Send a record."""
        trace = record.exc_info and logging.Formatter().formatException(record.exc_info)
        self._parent.tell({"event": "log", "level": record.levelname, "job": self._job(),
                           "logger": record.name, "text": record.getMessage(), "trace": trace})


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe
