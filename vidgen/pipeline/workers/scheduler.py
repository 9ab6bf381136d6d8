"""Scheduler of jobs that depend on each other, run by one or many workers.

    for outcome in run_jobs(jobs, work, WorkerOptions(count=4), on_event): ...
    for key, result in results_of(function, payloads, 4, on_event): ...   # independent

Jobs come from an iterator, each after those that it needs, and only a window of them is held, so a
film of ten thousand shots takes no more memory than one of ten. A single worker is this process;
several are processes of this machine or actors of a Ray cluster (`pool`, `ray`). A worker that dies
or stops responding is replaced, and another one resumes its job from the journal.
"""

from __future__ import annotations

import heapq
import logging
import pickle
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from vidgen.core.errors import InputError, VidgenError
from vidgen.core.protocols import OnEvent
from vidgen.pipeline.workers.pool import LocalPool, WorkerHandle, WorkerPool, visible_gpus
from vidgen.pipeline.workers.types import (
    Job,
    Outcome,
    Work,
    WorkerOptions,
    pin_threads,
)

log = logging.getLogger(__name__)
Key = TypeVar("Key", bound=Hashable)
THREADS = "threads"
MAX_DEATHS = 3
"""Number of workers that die with one job before the job fails."""
WINDOW = 32
"""Jobs held per worker, so that jobs that wait for others leave no worker idle."""


def run_jobs(
    jobs: Iterable[Job], work: Work, workers: WorkerOptions, on_event: OnEvent
) -> Iterator[Outcome]:
    """Run jobs; yield each one's outcome when it finishes.

    A caller that leaves the loop, or is interrupted, stops all workers within seconds; their jobs
    can be resumed. Jobs, each after those that it needs, are read from the iterator as workers need
    them. `on_event` gets workers' events, with `worker` added if several run. Workers that don't
    start raise VidgenError.
    """
    if workers.is_here:
        yield from _run_here(_Queue(iter(jobs), WINDOW), work, workers.num_threads, on_event)
        return
    with _open_pool(work, workers) as pool:
        queue = _Queue(iter(jobs), WINDOW * len(pool.workers))
        yield from _Dispatcher(queue, pool, workers, on_event).outcomes()


def results_of(
    function: Callable[[Any], Any], payloads: Mapping[Key, Any], workers: int, on_event: OnEvent
) -> Iterator[tuple[Key, Any]]:
    """Yield a function's results for independent, picklable payloads, by key, as they finish.

    Args:
        function: a module's function; it runs in this process if one worker is enough.
        workers: largest number of processes.
        on_event: called when a worker is lost.

    Raises:
        VidgenError: raised by the function, or for a payload that killed several workers.
    """
    if not payloads:
        return
    keys = list(payloads)
    options = WorkerOptions(min(workers, len(keys)))
    jobs = (Job(str(number), payloads[key], name=str(key)) for number, key in enumerate(keys))
    for outcome in run_jobs(jobs, partial(_call, function), options, on_event):
        if outcome.error is not None:
            raise outcome.error
        yield keys[int(outcome.job.key)], outcome.result


def _call(function: Callable[[Any], Any], payload: Any, _on_event: OnEvent) -> Any:
    return function(payload)


@contextmanager
def _open_pool(work: Work, workers: WorkerOptions) -> Iterator[WorkerPool]:
    try:
        content = pickle.dumps(work)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise InputError(f"the work can't be sent to other processes ({error}); give functions of "
                         "modules, or functools.partial of them") from None
    pool: WorkerPool
    if workers.ray is None:
        count = workers.count or 1
        pool = LocalPool(content, count, workers.num_threads, visible_gpus() if count > 1 else ())
    else:
        from vidgen.pipeline.workers.ray import RayPool

        pool = RayPool(content, workers)
    try:
        pool.start()
        yield pool
    finally:
        for worker in pool.workers:
            worker.stop()
        pool.end(workers.patience.grace)


def _run_here(queue: _Queue, work: Work, threads: int, on_event: OnEvent) -> Iterator[Outcome]:
    import torch

    before = torch.get_num_threads()
    try:
        while (job := queue.take()) is not None:
            pin_threads(threads)
            try:
                outcome = Outcome(job, work(job.payload, on_event))
            except VidgenError as error:
                outcome = Outcome(job, error=error)
            queue.finish(outcome)
            yield outcome
            yield from queue.undone()
    finally:
        pin_threads(before)


class _Queue:
    def __init__(self, jobs: Iterator[Job], window: int) -> None:
        self._jobs, self._window = jobs, window
        self._ready: list[tuple[int, Job]] = []
        self._numbers: dict[str, int] = {}  # order of the held jobs
        self._waiting: dict[str, tuple[Job, set[str]]] = {}
        self._failed: dict[str, str] = {}
        self._count = 0

    @property
    def is_over(self) -> bool:
        """True if all jobs are finished."""
        self._fill()
        return not self._numbers

    def take(self) -> Job | None:
        """Return the first job that can run now."""
        self._fill()
        return heapq.heappop(self._ready)[1] if self._ready else None

    def again(self, job: Job) -> None:
        """Put back a job that wasn't finished."""
        heapq.heappush(self._ready, (self._numbers[job.key], job))

    def finish(self, outcome: Outcome) -> None:
        """Record a job's outcome, and release the jobs that waited for it."""
        job = outcome.job
        del self._numbers[job.key]
        if outcome.error is not None:
            self._failed[job.key] = job.name or job.key
        for key, (other, missing) in list(self._waiting.items()):
            missing.discard(job.key)
            if outcome.error is None and not missing:
                del self._waiting[key]
                self.again(other)

    def undone(self) -> Iterator[Outcome]:
        """Yield failures of the jobs that need a failed one."""
        while True:
            self._fill()
            found = ((job, self._failed[key]) for job, _ in self._waiting.values()
                     for key in job.needs if key in self._failed)
            job, name = next(found, (None, ""))
            if job is None:
                return
            del self._waiting[job.key]
            outcome = Outcome(job, error=VidgenError(f"it needs {name}, which could not be made"))
            self.finish(outcome)
            yield outcome

    def _fill(self) -> None:
        while len(self._numbers) < self._window and (job := next(self._jobs, None)) is not None:
            assert job.key not in self._numbers, job.key
            self._count += 1
            self._numbers[job.key] = self._count
            missing = {key for key in job.needs if key in self._numbers or key in self._failed}
            if missing:
                self._waiting[job.key] = (job, missing)
            else:
                self.again(job)


class _Dispatcher:
    def __init__(
        self, queue: _Queue, pool: WorkerPool, workers: WorkerOptions, on_event: OnEvent
    ) -> None:
        self.queue, self.pool = queue, pool
        self.patience, self.on_event = workers.patience, on_event
        self._deaths = Counter[str]()
        self._failed_starts = 0

    def outcomes(self) -> Iterator[Outcome]:
        """Yield every job's outcome."""
        while not self.queue.is_over:
            self._hand_out()
            answered = [self._answered(*message) for message in self.pool.listen(0.5)]
            for outcome in filter(None, (*answered, *self._timed_out())):
                self.queue.finish(outcome)
                yield outcome
            yield from self.queue.undone()

    def _hand_out(self) -> None:
        for worker in self.pool.workers:
            if worker.is_ready and worker.job is None:
                if (job := self.queue.take()) is None:
                    return
                worker.begin(job)

    def _answered(self, worker: WorkerHandle, message: tuple[Any, ...]) -> Outcome | None:
        worker.last_message_s = now = time.monotonic()
        kind, job = message[0], worker.job
        if kind == "ready":
            worker.is_ready, self._failed_starts = True, 0
        elif kind == "lost":
            return self._lost(worker, message[1])
        elif kind == "event" and job is not None:
            worker.last_progress_s = now
            self.on_event({**message[1], "worker": worker.number})
        elif kind == "log":
            log.log(message[1], "%s", message[2])
        elif kind in ("done", "failed"):
            assert job is not None, message
            worker.job = None
            self._deaths.pop(job.key, None)
            return Outcome(job, message[1]) if kind == "done" else Outcome(job, error=message[1])
        return None

    def _timed_out(self) -> Iterator[Outcome | None]:
        for worker in list(self.pool.workers):
            why, now, last_s = "", time.monotonic(), worker.last_message_s
            if last_s is not None and now - last_s > self.patience.silence:
                why = f"it sent nothing for {self.patience.silence:g} s"
            elif worker.job is not None and now - worker.last_progress_s > self.patience.stall:
                why = f"its job made no progress for {self.patience.stall:g} s"
            if why:
                yield self._lost(worker, why)

    def _lost(self, worker: WorkerHandle, why: str) -> Outcome | None:
        job, was_ready = worker.job, worker.is_ready
        self._failed_starts += not was_ready
        if self._failed_starts >= MAX_DEATHS:
            raise VidgenError(f"workers can't be started: {why}")
        self.pool.replace(worker)
        name = "" if job is None else job.name or job.key
        self.on_event({"event": "note", "worker": worker.number,
                   "text": f"worker {worker.number} was lost ({why})"
                   + (f"; its job, {name}, starts again" if name else "")})
        if job is None:
            return None
        self._deaths[job.key] += 1
        if self._deaths[job.key] >= MAX_DEATHS:
            text = f"{name} ended {MAX_DEATHS} workers in a row; the last: {why}"
            return Outcome(job, error=VidgenError(text))
        self.queue.again(job)
        return None
