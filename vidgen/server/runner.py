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

import base64
import logging
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidgen.core.errors import Cancelled, InputError, ModelError, OutputError, VidgenError
from vidgen.core.protocols import OnEvent

if TYPE_CHECKING:
    from vidgen.pipeline.types import Preview
    from vidgen.server.film_making import FilmMaker
    from vidgen.server.making import Maker

OPEN, CANCELLED, PAUSED = "open", "cancelled", "paused"
PROGRESS_PAUSE_S = 0.1
"""Between two messages on a stage's progress; steps of the sampler are always reported."""
log = logging.getLogger(__name__)


class MemoryFull(VidgenError):
    """A job that needs more memory than there is."""


class Runner:
    """Makes clips and films of one model; see `vidgen.pipeline.workers.types.Work`."""

    _tell: OnEvent

    def __init__(self, model: str) -> None:
        self._model = model
        self._makers: dict[str, Maker | FilmMaker] = {}
        self._reported_s = 0.0

    def __call__(self, payload: dict[str, Any], tell: OnEvent) -> dict[str, Any] | None:
        """Open the model, or do a job and return its facts.

        Raises:
            ModelError: the model can't be opened.
            VidgenError: the job failed, or was cancelled.
        """
        if payload["kind"] == OPEN:
            self._open()
            return None
        self._tell = tell
        folder, maker = Path(payload["folder"]), self._makers[payload["kind"]]
        try:
            return maker.make(folder, payload["spec"], self._preview)
        except Cancelled as error:
            if str(error) == CANCELLED:
                remove_half_made(folder)
            raise
        except (InputError, ModelError, OutputError):
            raise
        except Exception as error:
            log.error("the job failed", exc_info=error)
            raise failure(error) from None

    def _open(self) -> None:
        logging.getLogger().setLevel(logging.INFO)
        from vidgen.core.runtime import reuse_freed_memory
        from vidgen.pipeline.engine import load_own

        reuse_freed_memory()
        engine = load_own(self._model, "the service makes clips of its own models alone")
        from vidgen.server.film_making import FilmMaker
        from vidgen.server.making import Maker

        self._makers = {"video": Maker(engine, self._report),
                        "film": FilmMaker(engine, self._report)}

    def _report(self, event: dict[str, Any]) -> None:
        """Pass on an event of the makers, those that come by the frame not too often."""
        now = time.monotonic()
        often = event["event"] == "progress" and event["stage"] in ("write", "assemble")
        if often and now - self._reported_s < PROGRESS_PAUSE_S and event["done"] < event["total"]:
            return
        self._reported_s = now
        self._tell(event)

    def _preview(self, shown: Preview) -> None:
        from vidgen.pipeline.preview import as_webp

        image = base64.b64encode(as_webp(shown)).decode()
        self._tell({"event": "preview", "step": shown.step, "fps": float(shown.fps),
                    "image": f"data:image/webp;base64,{image}"})


def failure(error: Exception) -> VidgenError:
    """Return an error of ours, for clients, in place of one that isn't."""
    if isinstance(error, MemoryError):
        return MemoryFull("the memory is full; ask for a smaller or shorter clip")
    if "out of memory" in str(error).lower():
        return MemoryFull("the memory of the device is full; ask for a smaller or shorter clip")
    return VidgenError("the job failed for a reason of the service's own")


def remove_half_made(folder: Path) -> None:
    """Remove the journals that would let a job go on."""
    from vidgen.pipeline.journal.job import SUFFIX, remove_job

    for path in folder.rglob(f"*{SUFFIX}"):
        with suppress(OSError):
            remove_job(path)
