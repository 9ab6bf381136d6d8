"""Scheduler of jobs: here, in processes of this machine, or on a Ray cluster."""

from __future__ import annotations

import logging
import pickle
import time
from collections import Counter
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping
from contextlib import closing
from functools import partial
from typing import Any, TypeVar

from vidgen.core.errors import InputError, VidgenError
from vidgen.core.protocols import OnEvent
from vidgen.pipeline.workers.pool import LocalPool, Message, WorkerHandle, WorkerPool, visible_gpus
from vidgen.pipeline.workers.types import Job, Outcome, Patience, Work, WorkerOptions, pin_threads

log = logging.getLogger(__name__)
Key = TypeVar("Key", bound=Hashable)
MAX_DEATHS = 3
"""Number of workers that die with one job before the job fails."""


def run_jobs(
    jobs: Iterable[Job], work: Work, workers: WorkerOptions, on_event: OnEvent
) -> Iterator[Outcome]:
    """Run jobs, each after those that it needs; yield each one's outcome when it finishes.

    A caller that leaves the loop, or is interrupted, stops all workers within seconds; their jobs
    can be resumed. `on_event` gets workers' events, with `worker` added if several run. Workers
    that don't start raise VidgenError.
    """
    queue = _Queue(jobs)
    run = _run_here if workers.is_here else _run_in_pool
    with closing(run(queue, work, workers, on_event)) as outcomes:
        for outcome in outcomes:
            yield from queue.finish(outcome)


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


class _Queue:
    """Unfinished jobs in their order."""

    def __init__(self, jobs: Iterable[Job]) -> None:
        self.left: dict[str, Job] = {}
        for job in jobs:
            assert job.key not in self.left, job.key
            self.left[job.key] = job
        self._waiting = dict(self.left)

    def take(self) -> Job | None:
        """Return the first job that can begin now."""
        for job in self._waiting.values():
            if self.left.keys().isdisjoint(job.needs):
                return self._waiting.pop(job.key)
        return None

    def again(self, job: Job) -> None:
        """Put back a job that wasn't finished."""
        self._waiting = {job.key: job, **self._waiting}

    def finish(self, outcome: Outcome) -> Iterator[Outcome]:
        """Remove a job; yield its outcome and, if it failed, those of the jobs that need it."""
        outcomes = [outcome]
        while outcomes:
            outcome = outcomes.pop()
            done = outcome.job
            if self.left.pop(done.key, None) is None:
                continue  # it failed with another job that it needs
            self._waiting.pop(done.key, None)
            yield outcome
            if outcome.error is not None:
                text = f"it needs {done.name or done.key}, which could not be made"
                outcomes += [Outcome(job, error=VidgenError(text))
                             for job in reversed(self.left.values()) if done.key in job.needs]


def _run_here(
    queue: _Queue, work: Work, workers: WorkerOptions, on_event: OnEvent
) -> Generator[Outcome, None, None]:
    import torch

    before, threads = torch.get_num_threads(), workers.num_threads
    try:
        while (job := queue.take()) is not None:
            pin_threads(threads)
            try:
                outcome = Outcome(job, work(job.payload, on_event))
            except VidgenError as error:
                outcome = Outcome(job, error=error)
            yield outcome
    finally:
        pin_threads(before)


def _run_in_pool(
    queue: _Queue, work: Work, workers: WorkerOptions, on_event: OnEvent
) -> Generator[Outcome, None, None]:
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
        yield from _outcomes(queue, pool, workers.patience, on_event)
    finally:
        pool.end(workers.patience.grace)


def _outcomes(
    queue: _Queue, pool: WorkerPool, patience: Patience, on_event: OnEvent
) -> Iterator[Outcome]:
    deaths, failed_starts = Counter[str](), 0
    while queue.left:
        for worker in pool.workers:
            if worker.is_ready and worker.job is None and (waiting := queue.take()) is not None:
                worker.begin(waiting)
        for worker, (kind, *details) in _messages(pool, patience):
            job = worker.job
            if kind == "ready":
                worker.is_ready, failed_starts = True, 0
            elif kind == "log":
                log.log(details[0], "%s", details[1])
            elif kind == "event" and job is not None:
                worker.last_progress_s = time.monotonic()
                on_event({**details[0], "worker": worker.number})
            elif kind in ("done", "failed"):
                assert job is not None, details
                worker.job = None
                result = details[0]
                yield Outcome(job, result) if kind == "done" else Outcome(job, error=result)
            elif kind == "lost":
                (why,) = details
                failed_starts += not worker.is_ready
                if failed_starts >= MAX_DEATHS:
                    raise VidgenError(f"workers can't be started: {why}")
                pool.replace(worker)
                name = "" if job is None else job.name or job.key
                text = f"worker {worker.number} was lost ({why})"
                text += f"; its job, {name}, starts again" if name else ""
                on_event({"event": "note", "worker": worker.number, "text": text})
                if job is None:
                    continue
                deaths[job.key] += 1
                if deaths[job.key] < MAX_DEATHS:
                    queue.again(job)
                else:
                    text = f"{name} ended {MAX_DEATHS} workers in a row; the last: {why}"
                    yield Outcome(job, error=VidgenError(text))


def _messages(pool: WorkerPool, patience: Patience) -> list[tuple[WorkerHandle, Message]]:
    """Return the workers' messages, and ("lost", why) for workers that hang."""
    messages, now = [*pool.listen(0.5)], time.monotonic()
    responsive = {worker for worker, _ in messages}
    for worker in pool.workers:
        if worker in responsive:
            worker.last_message_s = now
        elif worker.last_message_s is not None and now - worker.last_message_s > patience.silence:
            messages.append((worker, ("lost", f"it sent nothing for {patience.silence:g} s")))
        elif worker.job is not None and now - worker.last_progress_s > patience.stall:
            why = f"its job made no progress for {patience.stall:g} s"
            messages.append((worker, ("lost", why)))
    return messages
