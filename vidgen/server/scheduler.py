"""The scheduler: runs the queue's jobs in a worker process and supervises both.

Its thread starts the process, claims the next job, handles the process's messages, restarts it if
it died or hangs, and removes expired jobs.
"""

from __future__ import annotations

import logging
import math
import pickle
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from multiprocessing.connection import Pipe, wait
from typing import Any

from vidgen.core.errors import Cancelled, InputError, ModelError, OutputError
from vidgen.pipeline.workers import types as workers
from vidgen.pipeline.workers.pool import LocalWorker, Message
from vidgen.server.hub import Event, Hub, Metrics
from vidgen.server.jobs import Jobs
from vidgen.server.layout import without_folders
from vidgen.server.responses import Live, view
from vidgen.server.settings import Settings
from vidgen.server.types import CANCELLED, OPEN, PAUSED, MemoryFull, QueuedJob

_GB = 1 << 30
LOOK_S, SWEEP_S = 1.0, 10.0
SILENCE_S = 120.0
"""Time without a heartbeat after which a process counts as hanging."""
STOP_PATIENCE_S = 30.0
"""Time for a process to stop a cancelled or deleted job; then it is restarted."""
PAUSES_S = (0.1, 1.0, 5.0, 15.0, 30.0)
"""Pauses before a crashed process is restarted, by the number of crashes in a row."""
_CODES = {InputError: "invalid_request", OutputError: "storage_error", ModelError: "model_error",
          MemoryFull: "out_of_memory"}
"""Code of a failed job by its error's class."""
log = logging.getLogger(__name__)


class Scheduler:
    """Runs queued jobs, publishes their events to the hub, and updates the metrics."""

    def __init__(self, settings: Settings, jobs: Jobs, hub: Hub, metrics: Metrics) -> None:
        self.settings, self.jobs, self.hub, self.metrics = settings, jobs, hub, metrics
        self._lock = threading.RLock()
        self._woken, self._bell = Pipe(duplex=False)
        self._child: LocalWorker | None = None
        self._running: Live | None = None
        self._broken: str | None = None
        self._is_ready = self._is_draining = self._is_over = False
        self._last_message_s = self._start_s = self._sweep_s = 0.0
        self._deaths, self._pace = 0, 1.0
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)

    def start(self) -> None:
        """Queue interrupted jobs of an earlier run again, and start the thread."""
        from vidgen.server.making import Runner  # loads torch

        self._work = pickle.dumps(Runner(self.settings.model))
        for job_id in self.jobs.recover():
            self._remove(job_id)
        self._thread.start()

    @property
    def state(self) -> str:
        """State: starting, ready, busy, "broken: REASON", draining or stopped."""
        with self._lock:
            if self._is_draining:
                return "stopped" if self._is_over else "draining"
            if self._broken is not None:
                return f"broken: {self._broken}"
            return "busy" if self._running else "ready" if self._is_ready else "starting"

    def wake(self) -> None:
        """Wake the thread after a job was added."""
        self._bell.send_bytes(b"!")

    def view(self, job: QueuedJob) -> dict[str, Any]:
        """Return the JSON data of a job's response."""
        return self.views([job])[0]

    def views(self, jobs: list[QueuedJob]) -> list[dict[str, Any]]:
        """Return the JSON data of several jobs' responses."""
        is_waiting = not all(job.is_finished for job in jobs)
        places = {job.id: place for job, *place in self._places()} if is_waiting else {}
        return [view(job, self.live(job), *places.get(job.id, ())) for job in jobs]

    def live(self, job: QueuedJob) -> Live | None:
        """Return the state of a job; None if it isn't running."""
        with self._lock:
            return self._running if self._running and self._running.job.id == job.id else None

    def cancel(self, job: QueuedJob) -> QueuedJob:
        """Cancel an unfinished job and return it; the process stops before its next step."""
        live, now = self.live(job), self.jobs.get(job.id)
        while now is not None and not now.is_finished:  # its state may change meanwhile
            self._finish(now, live.kept() if live else {}, (CANCELLED, "the job was cancelled"))
            now = self.jobs.get(job.id)
        self._stop(job, CANCELLED)
        if now is not None:
            self._tell_status(now)
        return now or job

    def delete(self, job: QueuedJob, reason: str = "deleted") -> None:
        """Delete a job in any state; `reason` is for the audit log."""
        if self.jobs.delete(job, reason):
            self._publish("deleted", job, {})
            self._tell_places()
        if not self._stop(job, CANCELLED):
            self._remove(job.id)

    def drain(self, patience_s: float) -> None:
        """Start no more jobs; wait for the running one or pause it; then end the process."""
        with self._lock:
            self._is_draining = True
        self._await_end(patience_s)
        running = self._running
        if running is not None and self._stop(running.job, PAUSED):
            self._await_end(max(patience_s, 5.0))
        self._is_over = True
        self.wake()
        if self._thread.is_alive():
            self._thread.join(10.0)

    def _await_end(self, patience_s: float) -> None:
        until = time.monotonic() + patience_s
        while self._running is not None and time.monotonic() < until and self._is_ready:
            time.sleep(0.05)

    def _run(self) -> None:
        while not self._is_over:
            for work in (self._look_after_child, self._begin_next, self._sweep, self._listen):
                try:
                    work()
                except OutputError as error:  # a full disk; the write is retried
                    log.error("%s", error)
                except Exception:
                    log.exception("the scheduler failed")
                    time.sleep(LOOK_S)
        if self._child is not None:
            self._child.stop()
            self._child.end(2.0)

    def _look_after_child(self) -> None:
        now = time.monotonic()
        with self._lock:
            if self._child is None and now >= self._start_s and not self._is_draining:
                self._last_message_s = now
                threads = workers.WorkerOptions().num_threads
                self._child = LocalWorker(1, self._work, threads)
            child, live = self._child, self._running
            silent = now - self._last_message_s > SILENCE_S
            stuck = live is not None and now - live.stop_sent_s > STOP_PATIENCE_S
        if child is not None and (silent or stuck):
            log.error("the runner %s; restarting it",
                      "doesn't respond" if silent else "doesn't stop")
            self._last_message_s = now
            if live is not None:
                live.stop_sent_s = math.inf  # kill it once
            child.process.kill()

    def _listen(self) -> None:
        """Handle the process's messages; wait up to a second for one, or for a new job."""
        child = self._child
        ready = wait([self._woken, *([child.connection] if child else [])], LOOK_S)
        while self._woken.poll():
            self._woken.recv_bytes()
        if child is not None and child.connection in ready:
            self._take(child, child.receive())

    def _begin_next(self) -> None:
        with self._lock:
            if self._running or not self._is_ready or self._is_draining or self._child is None:
                return
            job = self.jobs.claim()
            if job is None:
                return
            self._running = Live(job)
            self._child.begin(workers.Job(job.id, {
                "kind": job.kind, "spec": job.spec,
                "folder": str(self.settings.job_folder(job.id))}))
        log.info("started", extra={"job": job.id, "attempt": job.attempt})
        self._tell_status(job)

    def _take(self, worker: LocalWorker, message: Message) -> None:
        self._last_message_s, live = time.monotonic(), self._running
        match message:
            case "lost", fate:
                worker.end()
                self._on_lost(fate)
            case ("ready",):
                worker.begin(workers.Job(OPEN, {"kind": OPEN}))
            case "log", level, text, trace:
                log.log(level, "%s", text, extra={"job": live and live.job.id, "trace": trace})
                if level >= logging.WARNING and live is not None:
                    self._on_note(live, {"text": text})
            case "done", _ if not self._is_ready:
                with self._lock:
                    self._is_ready, self._broken, self._deaths = True, None, 0
            case "failed", error if not self._is_ready:
                self._broken = str(error)
                log.error("the model can't be opened: %s", self._broken)
                worker.stop()
            case "event", event if live is not None:
                getattr(self, f"_on_{event['event']}")(live, event)
            case ("done" | "failed") as end, outcome if live is not None:
                getattr(self, f"_on_{end}")(live, outcome)

    def _on_progress(self, live: Live, message: dict[str, Any]) -> None:
        now, stages = time.monotonic(), {message["stage"], live.facts["stage"]}
        if stages == {"sample"} and message["done"] > 1:
            self.metrics.step.observe(now - live.progress_s)
        live.progress_s = now
        live.update(message)
        self._publish("progress", live.job, {
            "status": "in_progress", "queue_position": None, **live.facts})

    def _on_preview(self, live: Live, message: dict[str, Any]) -> None:
        shown = {name: message[name] for name in ("step", "fps", "image")}
        live.preview = self._publish("preview", live.job, shown | {"shot": live.facts["shot"]})

    def _on_shot(self, live: Live, message: dict[str, Any]) -> None:
        live.shots[message["shot"]["id"]] = message["shot"]
        self._tell_status(live.job)

    def _on_note(self, live: Live, message: dict[str, Any]) -> None:
        live.warn(without_folders(message["text"], self.settings.data))

    def _on_done(self, live: Live, facts: dict[str, Any]) -> None:
        job, seconds = live.job, facts["inference_time_s"]
        if job.expected_s > 0 and job.attempt == 1:  # a moving average
            self._pace += 0.3 * (seconds / job.expected_s - self._pace)
        self.metrics.memory.set(facts["peak_memory_mb"] * 1e6)

        def write() -> None:
            if self._finish(job, {**facts, "warnings": live.warnings}):
                self.metrics.took.labels(job.kind).observe(
                    self.jobs.clock() - (job.started_at or 0.0))
                log.info("completed", extra={"job": job.id, "seconds": seconds})

        self._release(job, write)

    def _on_failed(self, live: Live, error: Exception) -> None:
        text = without_folders(str(error), self.settings.data)
        if not isinstance(error, Cancelled):
            code = next((code for kind, code in _CODES.items() if isinstance(error, kind)),
                        "server_error")
            self._fail(live, code, text)
        elif text == PAUSED:
            self._release(live.job, lambda: self.jobs.put_back(live.job))
        else:
            self._release(live.job, lambda: None)

    def _on_lost(self, fate: str) -> None:
        """Queue the job of a dead process again, unless it has crashed too many processes."""
        with self._lock:
            self._child, self._is_ready = None, False
            self._start_s = time.monotonic() + PAUSES_S[min(self._deaths, len(PAUSES_S) - 1)]
            self._deaths += 1
            live = self._running
        log.error("the runner %s", fate, extra={"job": live and live.job.id})
        if live is None:
            return
        deaths = live.job.deaths + 1
        if deaths >= self.settings.limits.deaths:
            self._fail(live, "runner_died",
                       f"the job crashed {deaths} processes in a row, the last {fate}")
        else:
            self._release(live.job, lambda: self.jobs.put_back(live.job, died=True))

    def _fail(self, live: Live, code: str, text: str) -> None:
        def write() -> None:
            if self._finish(live.job, live.kept(), (code, text)):
                log.info("failed", extra={"job": live.job.id, "error": code})

        self._release(live.job, write)

    def _finish(
        self, job: QueuedJob, result: dict[str, Any], error: tuple[str, str] | None = None
    ) -> bool:
        files = self.settings.job_folder(job.id).rglob("*")
        size = sum(path.stat().st_size for path in files if path.is_file())
        return self.jobs.finish(job, result=result, num_bytes=size, error=error,
                                keep_s=self.settings.keep_hours * 3600)

    def _release(self, job: QueuedJob, write: Callable[[], object]) -> None:
        """Write the running job's new state, again while the disk is full, and let the job go."""
        while not self._is_over:
            try:
                write()
                break
            except OutputError as problem:
                log.error("%s", problem, extra={"job": job.id})
                with suppress(OutputError, OSError):
                    self._sweep()  # removing old clips may free the disk
                time.sleep(LOOK_S)
        with self._lock:
            self._running, self._last_message_s = None, time.monotonic()
        now = self.jobs.get(job.id)
        if now is None:
            self._remove(job.id)
        else:
            self._tell_status(now)

    def _stop(self, job: QueuedJob, why: str) -> bool:
        """Tell the process to stop a job; return whether the job is running."""
        with self._lock:
            live = self.live(job)
            if live is not None and self._child is not None:
                self._child.cancel(why)
                if why == CANCELLED:
                    live.stop_sent_s = min(live.stop_sent_s, time.monotonic())
            return live is not None

    def _sweep(self) -> None:
        now = time.monotonic()
        if now < self._sweep_s:
            return
        self._sweep_s = now + SWEEP_S
        quota_gb = self.settings.quota_gb
        key_quota_gb = self.settings.key_quota_gb or quota_gb
        for job_id in self.jobs.outdated(int(quota_gb * _GB), int(key_quota_gb * _GB)):
            if (job := self.jobs.get(job_id)) is not None:
                self.delete(job, "expired")

    def _remove(self, job_id: str) -> None:
        with suppress(FileNotFoundError):
            shutil.rmtree(self.settings.job_folder(job_id))
        self.jobs.purge(job_id)

    def _places(self) -> Iterator[tuple[QueuedJob, int | None, float]]:
        """Yield unfinished jobs, their positions (None: it runs), and the seconds to their ends."""
        ahead_s, position = 0.0, 0
        for job in self.jobs.waiting():
            live = self.live(job)
            eta_s = live.facts["eta_s"] if live else None
            ahead_s += job.expected_s * self._pace if eta_s is None else eta_s
            position += live is None
            yield job, None if live else position, round(ahead_s, 1)

    def _tell_status(self, job: QueuedJob) -> None:
        self._publish("status", job, self.view(job))
        self._tell_places()

    def _publish(self, name: str, job: QueuedJob, facts: Mapping[str, Any]) -> dict[str, Any]:
        data = {"id": job.id, "object": job.kind, **facts}
        self.hub.publish(Event(name, job.id, job.owner, data))
        return data

    def _tell_places(self) -> None:
        """Publish the places of all owners' waiting jobs."""
        for job, position, eta_s in self._places() if self.hub.has_listeners else ():
            if position is not None:
                self._publish("queue", job, {"queue_position": position, "eta_s": eta_s})
