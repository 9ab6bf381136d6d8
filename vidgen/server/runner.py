"""The work of the process that makes clips and films: it opens the model once, then job by job.

It runs as a worker of `vidgen.pipeline.workers`. A payload is a dict: `kind`, "open", "video" or
"film"; of the last two also `folder`, the job's, and `spec`. Events of a job, each a dict:
    progress    stage, done, total and, where known, fraction, eta_s, shot
    preview     step, fps, image: an animation as a data URL
    shot        shot: one of a film is finished
    note        text
A job's result is one of
    {"end": "done", "result": {...}}
    {"end": "failed", "code": ..., "text": ...}
    {"end": "stopped", "why": "cancelled" or "paused"}
"""

from __future__ import annotations

import base64
import logging
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidgen.core.errors import Cancelled, InputError, ModelError, OutputError
from vidgen.core.protocols import OnEvent

if TYPE_CHECKING:
    from vidgen.pipeline.types import Preview
    from vidgen.server.film_making import FilmMaker
    from vidgen.server.making import Maker

OPEN, CANCELLED, PAUSED = "open", "cancelled", "paused"
PROGRESS_PAUSE_S = 0.1
"""Between two messages on a stage's progress; steps of the sampler are always reported."""
log = logging.getLogger(__name__)


class Runner:
    """Makes clips and films of one model; see `vidgen.pipeline.workers.types.Work`."""

    _tell: OnEvent

    def __init__(self, model: str) -> None:
        self._model = model
        self._makers: dict[str, Maker | FilmMaker] = {}
        self._reported_s = 0.0

    def __call__(self, payload: dict[str, Any], tell: OnEvent) -> dict[str, Any] | None:
        """Open the model, or do a job and return how it ended.

        Raises:
            ModelError: the model can't be opened.
        """
        if payload["kind"] == OPEN:
            self._open()
            return None
        self._tell = tell
        folder, maker = Path(payload["folder"]), self._makers[payload["kind"]]
        try:
            result = maker.make(folder, payload["spec"], self._preview)
        except Cancelled as error:
            if str(error) == CANCELLED:
                remove_half_made(folder)
            return {"end": "stopped", "why": str(error)}
        except Exception as error:
            return {"end": "failed", **failure(error)}
        return {"end": "done", "result": result}

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


def failure(error: Exception) -> dict[str, str]:
    """Return the code and text by which clients hear of an error; log one that is our own."""
    codes = {InputError: "invalid_request", OutputError: "storage_error",
             ModelError: "model_error"}
    for kind, code in codes.items():
        if isinstance(error, kind):
            return {"code": code, "text": str(error)}
    if isinstance(error, MemoryError):
        return {"code": "out_of_memory",
                "text": "the memory is full; ask for a smaller or shorter clip"}
    log.error("the job failed", exc_info=error)
    if "out of memory" in str(error).lower():
        return {"code": "out_of_memory",
                "text": "the memory of the device is full; ask for a smaller or shorter clip"}
    return {"code": "server_error", "text": "the job failed for a reason of the service's own"}


def remove_half_made(folder: Path) -> None:
    """Remove the journals that would let a job go on."""
    from vidgen.pipeline.journal.job import SUFFIX, remove_job

    for path in folder.rglob(f"*{SUFFIX}"):
        with suppress(OSError):
            remove_job(path)
