"""The work of the process that makes clips and films: it opens the model once, then job by job.

It runs as a worker of `vidgen.pipeline.workers`. A payload is a dict: `kind`, "open", "video" or
"film"; of the last two also `folder`, the job's, and `spec`. A job's result is a dict of facts; one
that was cancelled fails with `Cancelled`. Events of a job, each a dict:
    progress    stage, done, total and, where known, fraction, eta_s, shot
    preview     step, fps, image: an animation as a data URL
    shot        shot: one of a film is finished
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
    """A job that needs more memory than there is."""


class Runner:
    """Makes clips and films of one model; see `vidgen.pipeline.workers.types.Work`."""

    _engine: Engine

    def __init__(self, model: str) -> None:
        self._model = model

    def __call__(self, payload: dict[str, Any], tell: OnEvent) -> dict[str, Any] | None:
        """Open the model, or do a job and return its facts.

        Raises:
            ModelError: the model can't be opened.
            VidgenError: the job failed, or was cancelled.
        """
        if payload["kind"] == OPEN:
            self._open()
            return None
        from vidgen.server.making import Reporter, make_clip, make_film

        make = make_film if payload["kind"] == "film" else make_clip
        folder, report = Path(payload["folder"]), Reporter(tell)
        try:
            return make(self._engine, folder, payload["spec"], report) | report.facts()
        except Cancelled as error:
            if str(error) == CANCELLED:
                _remove_half_made(folder)
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
        self._engine = load_own(self._model, "the service makes clips of its own models alone")


def _failure(error: Exception) -> VidgenError:
    """Return an error of ours, for clients, in place of one that isn't."""
    if isinstance(error, MemoryError):
        return MemoryFull("the memory is full; ask for a smaller or shorter clip")
    if "out of memory" in str(error).lower():
        return MemoryFull("the memory of the device is full; ask for a smaller or shorter clip")
    return VidgenError("the job failed for a reason of the service's own")


def _remove_half_made(folder: Path) -> None:
    """Remove the journals that would let a job go on."""
    from vidgen.pipeline.journal.job import SUFFIX, remove_job

    for path in folder.rglob(f"*{SUFFIX}"):
        with suppress(OSError):
            remove_job(path)
