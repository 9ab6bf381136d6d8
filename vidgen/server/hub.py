"""Events of jobs, from any thread to the streams of the event loop; and the counters."""

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
    generate_latest,
)
from prometheus_client.metrics_core import GaugeMetricFamily
from prometheus_client.registry import Collector

from vidgen.server.types import QueuedJob, Status

MAX_WAITING = 200
"""Events that may wait for a slow listener; above that, passing ones are left out."""
PASSING = ("queue", "progress", "preview")
"""Events that the next one of their kind replaces."""
_STEPS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_JOBS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10_000.0)


@dataclass(frozen=True)
class Event:
    """An event of a job: status, queue, progress, preview or deleted."""

    name: str
    job: str
    owner: str
    data: dict[str, Any]
    is_last: bool = False


@dataclass(eq=False)
class Listener:
    """One stream of events, of an owner's jobs or one of them."""

    owner: str
    job: str | None
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    _events: asyncio.Queue[Event | None] = field(default_factory=asyncio.Queue)

    def offer(self, event: Event | None) -> None:
        """Queue an event, from any thread; None ends the stream."""
        with suppress(RuntimeError):  # the loop is closed, so nobody listens any more
            self._loop.call_soon_threadsafe(self._put, event)

    def _put(self, event: Event | None) -> None:
        is_passing = event is not None and event.name in PASSING
        if not is_passing or self._events.qsize() <= MAX_WAITING:
            self._events.put_nowait(event)

    async def stream(self) -> AsyncIterator[Event]:
        """Yield events as they come, up to the last."""
        while (event := await self._events.get()) is not None:
            yield event
            if event.is_last and self.job is not None:
                return


class Hub:
    """Passes events to their listeners."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listeners: set[Listener] = set()
        self._is_closed = False

    @property
    def has_listeners(self) -> bool:
        """Whether anyone listens."""
        return bool(self._listeners)

    def publish(self, event: Event) -> None:
        """Pass an event to its listeners, from any thread."""
        with self._lock:
            for each in self._listeners:
                if each.owner == event.owner and each.job in (None, event.job):
                    each.offer(event)

    def close(self) -> None:
        """End all streams, now and from here on."""
        with self._lock:
            self._is_closed = True
            for each in self._listeners:
                each.offer(None)

    @contextmanager
    def listen(self, owner: str, job: str | None) -> Iterator[Listener]:
        """Collect the events of an owner's jobs, or of one of them, inside the block."""
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
    """All counters of one service, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        kept: dict[str, Any] = {"namespace": "vidgen", "registry": self.registry}
        self.requests = Counter("http_requests", "Requests answered", ["method", "route", "status"],
                                **kept)
        self.latency = Histogram("http_request_seconds", "Until the head of the answer was sent",
                                 ["route"], buckets=(0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 60.0),
                                 **kept)
        self.wait = Histogram("queue_wait_seconds", "From a job's acceptance to its first start",
                              buckets=_JOBS, **kept)
        self.took = Histogram("job_seconds", "From a job's first start to its end", ["kind"],
                              buckets=_JOBS, **kept)
        self.step = Histogram("step_seconds", "One denoising step", buckets=_STEPS, **kept)
        self.stage = Histogram("stage_seconds", "A stage of a finished job", ["stage"],
                               buckets=_JOBS, **kept)
        self.completed = Counter("jobs_completed", "Jobs that were completed", ["kind"], **kept)
        self.failures = Counter("jobs_failed", "Jobs that failed, by code", ["code"], **kept)
        self.refused = Counter("requests_refused", "Requests that were refused, by code", ["code"],
                               **kept)
        self.restarts = Counter("runner_exits", "Worker processes that ended", **kept)
        self.memory = Gauge("job_peak_memory_bytes", "Of the last completed job", **kept)
        ProcessCollector(registry=self.registry)  # of the one that answers

    def count_end(self, job: QueuedJob, error: tuple[str, str] | None, now: float) -> None:
        """Count the end of a job at `now`."""
        if error is None:
            self.completed.labels(job.kind).inc()
            self.took.labels(job.kind).observe(max(0.0, now - (job.started_at or now)))
        else:
            self.failures.labels(error[0]).inc()

    def watch_queue(self, counts: Callable[[], dict[str, int]]) -> None:
        """Count the queue at each scrape."""
        self.registry.register(_Queue(counts))

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class _Queue(Collector):
    """Numbers of jobs by status, read at once."""

    def __init__(self, counts: Callable[[], dict[str, int]]) -> None:
        self._counts = counts

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the numbers, zeros included."""
        counts = self._counts()
        jobs = GaugeMetricFamily("vidgen_jobs", "Jobs by status", labels=["status"])
        for status in get_args(Status):
            jobs.add_metric([status], counts.get(status, 0))
        yield jobs
