"""The worker process that generates clips and films: it opens the model once, then runs jobs.

It is a worker of `vidgen.pipeline.workers`. A payload is a dict with `kind`: "open", "video" or
"film"; the last two also have `folder`, the job's folder, and `spec`. The result of a job is a dict
of facts; a cancelled job fails with `Cancelled`. Events of a job, each a dict:
    progress    stage, done, total and, if known, fraction, eta_s, shot
    preview     step, fps, image: an animation as a data URL
    shot        shot: facts of a finished shot of a film
    note        text
"""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidgen.core.errors import Cancelled, InputError, ModelError, OutputError, VidgenError
from vidgen.core.protocols import OnEvent

if TYPE_CHECKING:
    from vidgen.pipeline.engine import Engine

OPEN, CANCELLED, PAUSED = "open", "cancelled", "paused"
log = logging.getLogger(__name__)


class MemoryFull(VidgenError):
    """A job ran out of memory."""


class Runner:
    """Generates clips and films with one model; see `vidgen.pipeline.workers.types.Work`."""

    _engine: Engine

    def __init__(self, model: str) -> None:
        self._model = model

    def __call__(self, payload: dict[str, Any], on_event: OnEvent) -> dict[str, Any] | None:
        """Open the model, or run a job and return its facts.

        Raises:
            ModelError: the model can't be opened.
            VidgenError: the job failed, or was cancelled.
        """
        if payload["kind"] == OPEN:
            self._open()
            return None
        from vidgen.server.making import JobReporter, make_clip, make_film

        make = make_film if payload["kind"] == "film" else make_clip
        folder, report = Path(payload["folder"]), JobReporter(on_event)
        try:
            return make(self._engine, folder, payload["spec"], report) | report.facts()
        except Cancelled as error:
            if str(error) == CANCELLED:
                _remove_journals(folder)
            raise
        except (InputError, ModelError, OutputError):
            raise
        except Exception as error:
            log.error("the job failed", exc_info=error)
            raise _failure(error) from None

    def _open(self) -> None:
        logging.getLogger().setLevel(logging.INFO)
        from vidgen.core.runtime import reuse_freed_memory
        from vidgen.pipeline.engine import load_own

        reuse_freed_memory()
        self._engine = load_own(self._model, "the service runs only vidgen's own models")


def _failure(error: Exception) -> VidgenError:
    """Return the error for clients in place of an internal one."""
    if isinstance(error, MemoryError):
        return MemoryFull("out of memory; request a smaller or shorter clip")
    if "out of memory" in str(error).lower():
        return MemoryFull("out of device memory; request a smaller or shorter clip")
    return VidgenError("the job failed; see the service's log")


def _remove_journals(folder: Path) -> None:
    """Remove the journals from which a job could continue."""
    from vidgen.pipeline.journal.job import SUFFIX, remove_job

    for path in folder.rglob(f"*{SUFFIX}"):
        with suppress(OSError):
            remove_job(path)
