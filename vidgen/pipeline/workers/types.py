"""Jobs, outcomes and settings that the scheduler, workers and processes share."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vidgen.core.errors import InputError
from vidgen.core.protocols import OnEvent
from vidgen.core.runtime import available_memory

if TYPE_CHECKING:
    import torch

MAX_WORKERS = MAX_THREADS = 1024


Work = Callable[[Any, OnEvent], Any]
"""Function of a job's payload, which reports events and returns a picklable result.

It is pickled to each worker, where it keeps what it opens.
"""


@dataclass(frozen=True, slots=True)
class Job:
    """A piece of work for one worker."""

    key: str  # unique, for other jobs' needs
    payload: Any  # picklable, the argument of `Work`
    needs: tuple[str, ...] = ()  # keys of jobs that run before it; an unknown one counts as done
    name: str = ""  # shown in messages


@dataclass(frozen=True, slots=True)
class Outcome:
    """A job's result, or the error that ended it."""

    job: Job
    result: Any = None
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class Patience:
    """Time limits of workers, in seconds."""

    silence: float = 60.0  # between messages; the heartbeat comes every second
    stall: float = 3600.0  # between events of a job, even with a heartbeat
    grace: float = 5.0  # for workers to stop before they are killed


@dataclass(frozen=True)
class WorkerOptions:
    """Number and kind of workers; raises InputError if a number is out of range."""

    count: int | None = None  # None: one, or as many as a Ray cluster has GPUs or else machines
    ray: str | None = None  # "auto", "host:port", "ray://host:port", or "local" to start one here
    threads: int | None = None  # of each job; None: this process's share
    patience: Patience = field(default_factory=Patience)

    def __post_init__(self) -> None:
        for name, value, high in (("workers", self.count, MAX_WORKERS),
                                  ("threads", self.threads, MAX_THREADS)):
            if value is not None and not 1 <= value <= high:
                raise InputError(f"{name} is {value}; give a whole number from 1 to {high}")

    @property
    def is_here(self) -> bool:
        """True if this process runs the jobs itself."""
        return self.ray is None and self.count in (None, 1)

    @property
    def num_threads(self) -> int | None:
        """Threads of a job: as given, or OMP_NUM_THREADS, or a worker's share of torch's.

        None: each machine of a Ray cluster decides.
        """
        if self.threads is not None or self.ray is not None:
            return self.threads
        import torch

        count = torch.get_num_threads()
        return count if "OMP_NUM_THREADS" in os.environ else max(1, count // (self.count or 1))

    def memory(self, device: torch.device) -> int | None:
        """Return the free bytes for each worker; None if unknown, as on a cluster."""
        have = None if self.ray is not None else available_memory(device)
        if have is None or self.count is None:
            return have
        import torch

        devices = torch.cuda.device_count() if device.type == "cuda" else 1
        return have // -(-self.count // devices)


def pin_threads(count: int | None) -> None:
    """Make torch compute on `count` threads, even if a resumed journal set another number."""
    if count is None:
        return
    torch = sys.modules.get("torch")  # not loaded yet: OMP_NUM_THREADS is set
    if torch is not None and torch.get_num_threads() != count:
        torch.set_num_threads(count)
