"""Jobs as clients see them: the OpenAI shape, with our own fields added."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vidgen.server.responses import Film, Video
from vidgen.server.types import Job

MAX_WARNINGS = 20


@dataclass
class Live:
    """The state of a job at work, which isn't written to the queue.

    Attributes:
        fraction: done of the whole job, 0 to 1; None without an estimate.
        shot: the film's shot at work.
        shots: the film's finished shots, by id.
    """

    stage: str = "load"
    done: int = 0
    total: int = 1
    fraction: float | None = None
    eta_s: float | None = None
    shot: str | None = None
    preview: dict[str, Any] | None = None
    shots: dict[str, dict[str, Any]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def hear(self, event: dict[str, Any]) -> None:
        """Take up a progress event."""
        self.stage, self.done, self.total = event["stage"], event["done"], event["total"]
        self.fraction, self.eta_s = event.get("fraction", self.fraction), event.get("eta_s")
        if self.shot != event.get("shot"):  # what is shown is of another one
            self.shot, self.preview = event.get("shot"), None

    def warn(self, text: str) -> None:
        """Keep a note, once."""
        if text not in self.warnings and len(self.warnings) < MAX_WARNINGS:
            self.warnings.append(text)

    def kept(self) -> dict[str, Any]:
        """Return the result that is kept of a job that isn't completed."""
        shots = {"shots": list(self.shots.values())} if self.shots else {}
        return {"warnings": self.warnings, **shots}

    def facts(self) -> dict[str, Any]:
        """Return the fields of a progress event."""
        sampling = self.stage == "sample"
        return {
            "stage": self.stage, "step": self.done if sampling else None,
            "num_steps": self.total if sampling else None, "eta_s": self.eta_s,
            "progress": min(99, int(100 * (self.fraction or 0.0))),
        }


@dataclass(frozen=True)
class Place:
    """A job's `position` in the queue, 1 the next, None at work or done; and seconds to its end."""

    position: int | None = None
    eta_s: float | None = None


def view(job: Job, live: Live | None, place: Place) -> dict[str, Any]:
    """Return a job as JSON data: the fields of its answer, from what is known of it."""
    live = live if job.status == "in_progress" else None
    known: dict[str, Any] = {"captions": [], "files": [], "warnings": [], **job.ask, **job.result}
    state: dict[str, Any] = {"stage": None, "step": None, "num_steps": None, "eta_s": place.eta_s,
             "progress": 100 if job.status == "completed" else 0}
    if live is not None:
        state = {**live.facts(), "shot": live.shot, "warnings": live.warnings}
    times = {name: at if at is None else int(at) for name in (
        "created_at", "started_at", "completed_at", "expires_at") for at in (getattr(job, name),)}
    facts = {
        **known, **state, **times, "object": job.kind, "id": job.id, "status": job.status,
        "seconds": f"{known['seconds']:g}", "size": f"{known['width']}x{known['height']}",
        "fps": job.ask["fps"] if job.kind == "film" else known["fps"],
        "preview": bool(live and live.preview), "queue_position": place.position,
        "resumed": max(0, job.attempt - 1),
        "error": {"code": job.error_code, "message": job.error_message}
        if job.status == "failed" else None,
    }
    if job.kind == "film":
        facts["shots"] = _shots(job, live)
    answer = Film if job.kind == "film" else Video
    return {name: facts.get(name) for name in answer.model_fields}


def _shots(job: Job, live: Live | None) -> list[dict[str, Any]]:
    there = {each["id"]: each for each in job.result.get("shots", ())}
    there |= live.shots if live else {}
    shots = []
    for planned in job.ask["shots"]:
        made = there.get(planned["id"], {})
        at_work = live is not None and live.shot == planned["id"]
        waits = "failed" if job.is_finished else "queued"
        status = "completed" if made else "in_progress" if at_work else waits
        facts = {name: made.get(name) for name in ("made", "checks", "choice")}
        shots.append({**planned, **facts, "status": status,
                      "seed": made.get("seed", planned["seed"])})
    return shots
