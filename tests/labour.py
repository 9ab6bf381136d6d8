"""Work for the scheduler's tests, by modules so that other processes find it."""

from __future__ import annotations

import logging
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidgen.core.errors import InputError


@dataclass
class Labour:
    """Does what its payload says: (what, value).

    Args:
        folder: for marks that jobs leave.
    """

    folder: Path

    def __call__(self, payload: tuple[str, Any], tell: Any) -> Any:
        what, value = payload
        try:
            tell({"event": "progress", "stage": what, "done": 0, "total": 1, "pid": os.getpid()})
            if what == "events":
                return self.events(value, tell)
            return getattr(self, what)(value)
        finally:
            if what == "wait":  # as a journal keeps what there is
                (self.folder / value).touch()

    def square(self, number: int) -> int:
        return number * number

    def events(self, count: int, tell: Any) -> None:
        """Report progress ten times a second."""
        for done in range(1, count + 1):
            tell({"event": "progress", "stage": "events", "done": done})
            time.sleep(0.1)

    def refuse(self, text: str) -> None:
        raise InputError(text)

    def fail(self, text: str) -> None:
        raise KeyError(text)

    def warn(self, text: str) -> None:
        logging.getLogger("labour").warning(text)

    def die(self, times: int) -> int:
        """SIGKILL this process, so many times in all."""
        return self._until(times, signal.SIGKILL)

    def freeze(self, times: int) -> int:
        """Stop this process, heartbeat and all."""
        return self._until(times, signal.SIGSTOP)

    def hang(self, times: int) -> int:
        """Wait without a word, so many times in all."""
        if self._count("hang") <= times:
            time.sleep(600)
        return os.getpid()

    def wait(self, _name: str) -> None:
        """Wait until it is stopped."""
        time.sleep(600)

    def _until(self, times: int, number: signal.Signals) -> int:
        if self._count(number.name) <= times:
            os.kill(os.getpid(), number)
            time.sleep(600)
        return os.getpid()

    def _count(self, name: str) -> int:
        marks = len(list(self.folder.glob(f"{name}-*"))) + 1
        (self.folder / f"{name}-{marks}").touch()
        return marks


class Unloadable:
    """Can be pickled, but not unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _unload, ()


def _unload() -> None:
    raise RuntimeError("this can't be opened here")
