"""The process that makes clips and films: it opens the model once and works job by job.

It receives these messages (see `ipc.py`):
    {"do": "make", "job": ID, "kind": "video", "folder": PATH, "spec": {...}}
    {"do": "stop", "job": ID, "why": "cancelled" or "paused"}

and sends, besides "alive" and "log":
    ready       the model is open
    broken      text: it can't be opened; the process leaves
    progress    job, stage, done, total and, where known, fraction, eta_s, shot
    preview     job, step, fps, image: an animation as a data URL
    shot        job, shot: one of a film is there
    note        job, text
    done        job, result
    failed      job, code, text
    stopped     job, why: as it was told to

A stop takes effect between two steps.
"""

from __future__ import annotations

import base64
import logging
import queue
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidgen.core.errors import Cancelled, InputError, ModelError, OutputError, VidgenError
from vidgen.server.ipc import Message, Parent, TellingHandler

if TYPE_CHECKING:
    from vidgen.pipeline.types import Preview

CANCELLED, PAUSED = "cancelled", "paused"
PROGRESS_PAUSE_S = 0.1
"""Between two messages on a stage's progress; steps of the sampler are always reported."""
log = logging.getLogger(__name__)


class Runner:
    """Works on one job at a time."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._jobs: queue.Queue[Message] = queue.Queue()
        self._stops: dict[str, str] = {}
        self._lock = threading.Lock()
        self._now: str | None = None
        self._told_s = 0.0
        self.parent = Parent(self._hear)

    def run(self) -> None:
        """Open the model and work until the parent is gone."""
        root = logging.getLogger()
        root.handlers = [TellingHandler(self.parent, lambda: self._now)]
        root.setLevel(logging.INFO)
        from vidgen.core.runtime import reuse_freed_memory
        from vidgen.pipeline.engine import load_own

        reuse_freed_memory()
        try:
            engine = load_own(self._model, "the service makes clips of its own models alone")
        except VidgenError as error:
            self.parent.tell({"event": "broken", "text": str(error)})
            return
        from vidgen.server.film_making import FilmMaker
        from vidgen.server.making import Maker

        makers: dict[str, Maker | FilmMaker] = {
            "video": Maker(engine, self._tell), "film": FilmMaker(engine, self._tell)}
        self.parent.tell({"event": "ready"})
        while True:
            job = self._jobs.get()
            self._now = job["job"]
            folder, make = Path(job["folder"]), makers[job["kind"]].make
            self._finish(partial(make, folder, job["spec"], self._preview), folder)
            self._now = None

    def _finish(self, make: Callable[[], dict[str, Any]], folder: Path) -> None:
        """Do a job, and report how it ended."""
        end: Message
        try:
            self._check_stop()
            end = {"event": "done", "result": make()}
        except Cancelled:
            why = self._stops.get(self._now or "", CANCELLED)
            end = {"event": "stopped", "why": why}
            if why == CANCELLED:
                remove_half_made(folder)
        except InputError as error:
            end = {"event": "failed", "code": "invalid_request", "text": str(error)}
        except OutputError as error:
            end = {"event": "failed", "code": "storage_error", "text": str(error)}
        except ModelError as error:
            end = {"event": "failed", "code": "model_error", "text": str(error)}
        except MemoryError:
            end = {"event": "failed", "code": "out_of_memory",
                   "text": "the memory is full; ask for a smaller or shorter clip"}
        except Exception as error:
            full = "out of memory" in str(error).lower()
            log.exception("the job failed")
            end = {"event": "failed", "code": "out_of_memory" if full else "server_error",
                   "text": "the memory of the device is full; ask for a smaller or shorter clip"
                   if full else "the job failed for a reason of the service's own"}
        with self._lock:
            self._stops.clear()  # what comes from here on is for another job
        self.parent.tell({"job": self._now, **end})

    def _tell(self, event: dict[str, Any]) -> None:
        """Pass on an event of the makers; work is stopped here, between two steps."""
        self._check_stop()
        now = time.monotonic()
        often = event["event"] == "progress" and event["stage"] in ("write", "assemble")
        if often and now - self._told_s < PROGRESS_PAUSE_S and event["done"] < event["total"]:
            return
        self._told_s = now
        self.parent.tell({"job": self._now, **event})

    def _check_stop(self) -> None:
        with self._lock:
            why = self._stops.get(self._now or "")
        if why is not None:
            raise Cancelled(why)

    def _preview(self, shown: Preview) -> None:
        from vidgen.pipeline.preview import as_webp

        image = base64.b64encode(as_webp(shown)).decode()
        self.parent.tell({"event": "preview", "job": self._now, "step": shown.step,
                          "fps": float(shown.fps), "image": f"data:image/webp;base64,{image}"})

    def _hear(self, message: Message) -> None:
        if message["do"] == "make":
            self._jobs.put(message)
        else:
            with self._lock:
                self._stops[message["job"]] = message["why"]


def remove_half_made(folder: Path) -> None:
    """Remove the journals that would let a job go on."""
    from vidgen.pipeline.journal.job import SUFFIX, remove_job

    for path in folder.rglob(f"*{SUFFIX}"):
        with suppress(OSError):
            remove_job(path)


def main() -> None:
    """Run as a process: MODEL."""
    Runner(sys.argv[1]).run()


if __name__ == "__main__":
    main()
