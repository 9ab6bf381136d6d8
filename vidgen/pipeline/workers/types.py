"""The values that schedulers, workers and their processes hand to each other."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from typing import Any, Protocol

from vidgen.core.errors import InputError
from vidgen.core.protocols import OnEvent

MAX_WORKERS = MAX_THREADS = 1024


class Work(Protocol):
    """What workers do; it is pickled to each of them, and keeps there what it has opened."""

    def __call__(self, payload: Any, tell: OnEvent, /) -> Any:
        """Do one job, telling events; the result must be picklable."""
        ...


@dataclass(frozen=True, slots=True)
class Job:
    """A piece of work.

    Attributes:
        key: by which others need it; no two jobs have the same.
        payload: picklable, what `Work` is called with.
        needs: keys of jobs that come before it; one that was never given counts as done.
        name: for people.
    """

    key: str
    payload: Any
    needs: tuple[str, ...] = ()
    name: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a job: its result, or the error that ended it."""

    job: Job
    result: Any = None
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class Patience:
    """How long is waited, in seconds.

    Attributes:
        silence: for a worker's heartbeat, which comes every second.
        stall: for progress in a job, whatever the heartbeat says.
        grace: for workers that are to stop, before they are killed.
    """

    silence: float = 60.0
    stall: float = 3600.0
    grace: float = 5.0


@dataclass(frozen=True)
class Staff:
    """Who works.

    Args:
        workers: how many; None: one, or as many as a Ray cluster has GPUs or else machines.
        ray: address of a Ray cluster: "auto", "host:port", "ray://host:port", or "local" for one
            that is started here.
        threads: that each job computes on; None: this process's share.

    Raises:
        InputError: a number out of its range.
    """

    workers: int | None = None
    ray: str | None = None
    threads: int | None = None
    patience: Patience = field(default_factory=Patience)

    def __post_init__(self) -> None:
        for name, high in (("workers", MAX_WORKERS), ("threads", MAX_THREADS)):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= high:
                raise InputError(f"{name} is {value}; give a whole number from 1 to {high}")

    @property
    def is_here(self) -> bool:
        """Whether this process itself works."""
        return self.ray is None and self.workers in (None, 1)

    @property
    def num_threads(self) -> int:
        """Threads of a job: as given, as OMP_NUM_THREADS says, or a worker's share of torch's."""
        if self.threads is not None:
            return self.threads
        import torch

        count = torch.get_num_threads()
        return count if "OMP_NUM_THREADS" in os.environ else max(1, count // (self.workers or 1))


def pin_threads(count: int) -> None:
    """Have torch compute on so many threads, whatever a resumed journal set before.

    A process in which it isn't loaded yet is to be born with OMP_NUM_THREADS.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != count:
        torch.set_num_threads(count)
