"""Publish events of jobs from any thread to streams of the event loop; and all metrics."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
)

from vidgen.server.types import Status

MAX_WAITING = 200
"""Events that may wait for a slow listener; above that, transient ones are dropped."""
PASSING = ("queue", "progress", "preview")
"""Transient events: the next one of their kind replaces them."""
_STEPS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_JOBS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10_000.0)


@dataclass(frozen=True)
class Event:
    """An event of a job, named status, queue, progress, preview or deleted."""

    name: str
    job: str
    owner: str
    data: dict[str, Any]
    is_last: bool = False


@dataclass(eq=False)
class Listener:
    """One stream of events, of all jobs of an owner or of one job."""

    owner: str
    job: str | None
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    _events: asyncio.Queue[Event | None] = field(default_factory=asyncio.Queue)

    def offer(self, event: Event | None) -> None:
        """Queue an event, from any thread; None ends the stream."""
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._put, event)

    def _put(self, event: Event | None) -> None:
        is_passing = event is not None and event.name in PASSING
        if not is_passing or self._events.qsize() <= MAX_WAITING:
            self._events.put_nowait(event)

    async def stream(self) -> AsyncIterator[Event]:
        """Yield events up to the last one."""
        while (event := await self._events.get()) is not None:
            yield event
            if event.is_last and self.job is not None:
                return


class Hub:
    """Distributes events to listeners."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listeners: set[Listener] = set()
        self._is_closed = False

    @property
    def has_listeners(self) -> bool:
        """Whether a stream is open."""
        return bool(self._listeners)

    def publish(self, event: Event) -> None:
        """Send an event to its listeners, from any thread."""
        with self._lock:
            for each in self._listeners:
                if each.owner == event.owner and each.job in (None, event.job):
                    each.offer(event)

    def close(self) -> None:
        """End all streams; streams opened later end at once."""
        with self._lock:
            self._is_closed = True
            for each in self._listeners:
                each.offer(None)

    @contextmanager
    def listen(self, owner: str, job: str | None) -> Iterator[Listener]:
        """Yield a listener to the events of an owner's jobs, or of one job."""
        listener = Listener(owner, job)
        with self._lock:
            self._listeners.add(listener)
            if self._is_closed:
                listener.offer(None)
        try:
            yield listener
        finally:
            with self._lock:
                self._listeners.discard(listener)


class Metrics:
    """Prometheus metrics of one service; `counts` returns the number of jobs by status."""

    def __init__(self, counts: Callable[[], dict[str, int]]) -> None:
        self.registry = CollectorRegistry()
        kept: dict[str, Any] = {"namespace": "vidgen", "registry": self.registry}
        self.requests = Counter("http_requests", "Requests answered", ["method", "route", "status"],
                                **kept)
        self.took = Histogram("job_seconds", "From a job's first start to its end", ["kind"],
                              buckets=_JOBS, **kept)
        self.step = Histogram("step_seconds", "One denoising step", buckets=_STEPS, **kept)
        self.memory = Gauge("job_peak_memory_bytes", "Peak memory of the last completed job",
                            **kept)
        jobs = Gauge("jobs", "Jobs by status", ["status"], **kept)
        for status in get_args(Status):
            jobs.labels(status).set_function(lambda status=status: counts().get(status, 0))
        ProcessCollector(registry=self.registry)  # of the web process
