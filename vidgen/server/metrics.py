"""The service's counters, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, Metric

from vidgen.server.types import Job

_STEPS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_JOBS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10_000.0)


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
        self.failures = Counter("jobs_failed", "Jobs that failed, by why", ["code"], **kept)
        self.refused = Counter("requests_refused", "Requests that were refused, by why", ["code"],
                               **kept)
        self.restarts = Counter("runner_exits", "Processes at work that went down", **kept)
        self.memory = Gauge("job_peak_memory_bytes", "Of the last completed job", **kept)
        ProcessCollector(registry=self.registry)  # of the one that answers

    def count_end(self, job: Job, error: tuple[str, str] | None, now: float) -> None:
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


class _Queue:

    def __init__(self, counts: Callable[[], dict[str, int]]) -> None:
        self._counts = counts

    def collect(self) -> Iterator[Metric]:
        """Yield the number of jobs by status."""
        family = GaugeMetricFamily("vidgen_jobs", "Jobs that are there", labels=["status"])
        for status, count in self._counts().items():
            family.add_metric([status], count)
        yield family

    def describe(self) -> Iterator[Metric]:
        """Yield the name alone, without a look at the queue."""
        yield GaugeMetricFamily("vidgen_jobs", "Jobs that are there", labels=["status"])
