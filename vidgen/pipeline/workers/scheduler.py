"""The one scheduler: jobs that depend on each other, run by one or many workers.

    for outcome in run_jobs(jobs, work, Staff(workers=4), tell): ...
    for key, result in results_of(function, payloads, 4, tell): ...   # independent ones

Jobs come from an iterator, each after those that it needs, and only a window of them is held, so a
film of ten thousand shots takes no more memory than one of ten. A single worker is this process;
several are processes of this machine or actors of a Ray cluster (`pool`, `ray`). One that dies or
falls silent is replaced, and its job resumes elsewhere from its journal.
"""

from __future__ import annotations

import heapq
import logging
import pickle
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from vidgen.core.errors import InputError, VidgenError
from vidgen.core.protocols import OnEvent
from vidgen.core.runtime import fingerprint
from vidgen.core.store import Store
from vidgen.pipeline.workers.pool import LocalPool, WorkerHandle, WorkerPool, visible_gpus
from vidgen.pipeline.workers.types import MAX_THREADS, Job, Outcome, Staff, Work, pin_threads

log = logging.getLogger(__name__)
Key = TypeVar("Key", bound=Hashable)
THREADS = "threads"
MAX_DEATHS = 3
"""Workers that one job may kill before it is given up."""
WINDOW = 32
"""Jobs held per worker, so that waiting jobs don't leave any idle."""


def run_jobs(jobs: Iterable[Job], work: Work, staff: Staff, tell: OnEvent) -> Iterator[Outcome]:
    """Run jobs; yield each one's outcome as it comes.

    A caller that leaves the loop, or is interrupted, stops all workers within seconds; their jobs
    can be resumed. Jobs, each after those that it needs, are read as they are needed. `tell` gets
    workers' events, with `worker` added if there are several. Workers that don't start raise
    VidgenError.
    """
    if staff.is_here:
        yield from _alone(_Queue(iter(jobs), WINDOW), work, staff.num_threads, tell)
        return
    with _open_pool(work, staff) as pool:
        queue = _Queue(iter(jobs), WINDOW * len(pool.workers))
        yield from _Dispatcher(queue, pool, staff, tell).outcomes()


def results_of(
    function: Callable[[Any], Any], payloads: Mapping[Key, Any], workers: int, tell: OnEvent
) -> Iterator[tuple[Key, Any]]:
    """Yield a function's results for independent, picklable payloads, by key, as they finish.

    Args:
        function: of a module; called in this process if one worker is enough.
        workers: processes at most.
        tell: called when a worker is gone.

    Raises:
        VidgenError: as the function raises it; or a payload that killed several workers.
    """
    if not payloads:
        return
    keys = list(payloads)
    staff = Staff(min(workers, len(keys)))
    jobs = (Job(str(number), payloads[key], name=str(key)) for number, key in enumerate(keys))
    for outcome in run_jobs(jobs, partial(_call, function), staff, tell):
        if outcome.error is not None:
            raise outcome.error
        yield keys[int(outcome.job.key)], outcome.result


def _call(function: Callable[[Any], Any], payload: Any, _tell: OnEvent) -> Any:
    return function(payload)


def settle_threads(folder: Path, staff: Staff, tell: OnEvent, name: str = THREADS) -> Staff:
    """Return staff with the threads that a folder's clips were begun with on this kind of machine.

    A clip's last bits may depend on their number, so the folder's file `name` records it for
    whoever makes the rest. A requested number replaces it. `tell` gets a note if the number isn't
    the default.
    """
    store, place = Store(folder), "ray" if staff.ray else fingerprint()["cpu"]
    kept = store.data(name)
    begun = kept.get(place)
    if staff.threads is None and isinstance(begun, int) and 1 <= begun <= MAX_THREADS:
        if begun != staff.num_threads:
            tell({"event": "note", "text": f"each clip takes {begun} threads, as "
                  f"{folder / name}.json has it from before; --threads N changes that"})
        return replace(staff, threads=begun)
    if staff.ray and staff.threads is None:
        return staff  # the cluster's machines tell
    settled = replace(staff, threads=staff.num_threads)
    store.keep(name, kept | {place: settled.threads})
    return settled


@contextmanager
def _open_pool(work: Work, staff: Staff) -> Iterator[WorkerPool]:
    try:
        content = pickle.dumps(work)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise InputError(f"the work can't be sent to other processes ({error}); give functions of "
                         "modules, or functools.partial of them") from None
    pool: WorkerPool
    if staff.ray is None:
        count = staff.workers or 1
        pool = LocalPool(content, count, staff.num_threads, visible_gpus() if count > 1 else ())
    else:
        from vidgen.pipeline.workers.ray import RayPool

        pool = RayPool(content, staff)
    try:
        pool.start()
        yield pool
    finally:
        for worker in pool.workers:
            worker.stop()
        pool.end(staff.patience.grace)


def _alone(queue: _Queue, work: Work, threads: int, tell: OnEvent) -> Iterator[Outcome]:
    import torch

    before = torch.get_num_threads()
    try:
        while (job := queue.take()) is not None:
            pin_threads(threads)
            try:
                outcome = Outcome(job, work(job.payload, tell))
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
        self._numbers: dict[str, int] = {}  # of jobs that are held
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
        """Put back a job that wasn't done."""
        heapq.heappush(self._ready, (self._numbers[job.key], job))

    def finish(self, outcome: Outcome) -> None:
        """Note a job's outcome, and release those that waited for it."""
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
        """Yield outcomes of jobs that can't run because one that they need failed."""
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
    def __init__(self, queue: _Queue, pool: WorkerPool, staff: Staff, tell: OnEvent) -> None:
        self.queue, self.pool, self.patience, self.tell = queue, pool, staff.patience, tell
        self._deaths = Counter[str]()
        self._stillborn = 0

    def outcomes(self) -> Iterator[Outcome]:
        """Yield every job's outcome."""
        while not self.queue.is_over:
            self._hand_out()
            heard = [self._heard(*said) for said in self.pool.listen(0.5)]
            for outcome in filter(None, (*heard, *self._missed())):
                self.queue.finish(outcome)
                yield outcome
            yield from self.queue.undone()

    def _hand_out(self) -> None:
        for worker in self.pool.workers:
            if worker.is_ready and worker.job is None:
                if (job := self.queue.take()) is None:
                    return
                worker.begin(job)

    def _heard(self, worker: WorkerHandle, message: tuple[Any, ...]) -> Outcome | None:
        worker.heard_s = now = time.monotonic()
        kind, job = message[0], worker.job
        if kind == "ready":
            worker.is_ready, self._stillborn = True, 0
        elif kind == "lost":
            return self._lost(worker, message[1])
        elif kind == "tell" and job is not None:
            worker.moved_s = now
            self.tell({**message[1], "worker": worker.number})
        elif kind == "log":
            log.log(message[1], "%s", message[2])
        elif kind in ("done", "failed"):
            assert job is not None, message
            worker.job = None
            self._deaths.pop(job.key, None)
            return Outcome(job, message[1]) if kind == "done" else Outcome(job, error=message[1])
        return None

    def _missed(self) -> Iterator[Outcome | None]:
        for worker in list(self.pool.workers):
            why, now = "", time.monotonic()
            if worker.heard_s is not None and now - worker.heard_s > self.patience.silence:
                why = f"it said nothing for {self.patience.silence:g} s"
            elif worker.job is not None and now - worker.moved_s > self.patience.stall:
                why = f"its job didn't move for {self.patience.stall:g} s"
            if why:
                yield self._lost(worker, why)

    def _lost(self, worker: WorkerHandle, why: str) -> Outcome | None:
        job, was_ready = worker.job, worker.is_ready
        self._stillborn += not was_ready
        if self._stillborn >= MAX_DEATHS:
            raise VidgenError(f"workers can't be started: {why}")
        self.pool.replace(worker)
        name = "" if job is None else job.name or job.key
        self.tell({"event": "note", "worker": worker.number,
                   "text": f"worker {worker.number} is gone ({why})"
                   + (f"; its job, {name}, is taken from it" if name else "")})
        if job is None:
            return None
        self._deaths[job.key] += 1
        if self._deaths[job.key] >= MAX_DEATHS:
            text = f"{name} ended {MAX_DEATHS} workers one after the other; the last: {why}"
            return Outcome(job, error=VidgenError(text))
        self.queue.again(job)
        return None
