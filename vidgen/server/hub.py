"""Publish events of jobs from any thread to streams of the event loop; and all metrics."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
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

    @property
    def is_last(self) -> bool:
        """Whether no event of the job follows."""
        return self.name == "deleted" or self.data.get("status") in ("completed", "failed")


EventQueue = asyncio.Queue[Event | None]


class Hub:
    """Publishes events of jobs from any thread to streams of the event loop."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._streams: dict[EventQueue, tuple[asyncio.AbstractEventLoop, str, str | None]] = {}
        self._is_closed = False

    @property
    def has_listeners(self) -> bool:
        """Whether a stream is open."""
        return bool(self._streams)

    def publish(self, event: Event | None) -> None:
        """Send an event to its streams; None ends all of them, and later ones at once."""
        with self._lock:
            self._is_closed |= event is None
            for queue, (loop, owner, job) in self._streams.items():
                if event is None or (event.owner == owner and job in (None, event.job)):
                    with suppress(RuntimeError):  # the loop is closed
                        loop.call_soon_threadsafe(_put, queue, event)

    @contextmanager
    def listen(self, owner: str, job: str | None) -> Iterator[EventQueue]:
        """Yield a queue of the events of an owner's jobs, or of one job; None is the end."""
        queue = EventQueue()
        with self._lock:
            self._streams[queue] = asyncio.get_running_loop(), owner, job
            if self._is_closed:
                queue.put_nowait(None)
        try:
            yield queue
        finally:
            with self._lock:
                del self._streams[queue]


def _put(queue: EventQueue, event: Event | None) -> None:
    if event is None or event.name not in PASSING or queue.qsize() <= MAX_WAITING:
        queue.put_nowait(event)


class Metrics:
    """Prometheus metrics of one service."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        kept: dict[str, Any] = {"namespace": "vidgen", "registry": self.registry}
        self.requests = Counter("http_requests", "Requests answered", ["method", "route", "status"],
                                **kept)
        self.took = Histogram("job_seconds", "From a job's first start to its end", ["kind"],
                              buckets=_JOBS, **kept)
        self.step = Histogram("step_seconds", "One denoising step", buckets=_STEPS, **kept)
        self.memory = Gauge("job_peak_memory_bytes", "Peak memory of the last completed job",
                            **kept)
        self._jobs = Gauge("jobs", "Jobs by status", ["status"], **kept)
        ProcessCollector(registry=self.registry)  # of the web process

    def text(self, counts: Mapping[str, int]) -> bytes:
        """Return the metrics in Prometheus' text format, with the number of jobs by status."""
        for status in get_args(Status):
            self._jobs.labels(status).set(counts.get(status, 0))
        return generate_latest(self.registry)
