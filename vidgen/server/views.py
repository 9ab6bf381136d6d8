"""Jobs as clients see them: the OpenAI shape, with our own fields added."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vidgen.server.types import Job

MAX_WARNINGS = 20


@dataclass
class Live:
    """The state of a job at work, which isn't written to the queue.

    Attributes:
        stage: as the pipeline names it, `done` of `total`.
        fraction: done of the whole, 0 to 1; None without an estimate.
        eta_s: seconds left; None if unknown.
        shot: the film's shot at work.
        preview: the latest preview event.
        shots: the film's finished shots, by id.
        warnings: notes of the engine.
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

    @property
    def percent(self) -> int:
        """Share that is done, 0 to 99."""
        return min(99, int(100 * (self.fraction or 0.0)))

    def facts(self) -> dict[str, Any]:
        """Return the fields of a progress event."""
        sampling = self.stage == "sample"
        return {
            "stage": self.stage, "step": self.done if sampling else None,
            "num_steps": self.total if sampling else None, "progress": self.percent,
            "eta_s": self.eta_s,
        }


@dataclass(frozen=True)
class Place:
    """A job's place in the queue.

    Attributes:
        position: 1 is the next; None if it runs or is done.
        eta_s: seconds until it is done; None if unknown.
    """

    position: int | None = None
    eta_s: float | None = None


def view(job: Job, live: Live | None, place: Place) -> dict[str, Any]:
    """Return a job as JSON data."""
    make = film_view if job.kind == "film" else video_view
    return make(job, live if job.status == "in_progress" else None, place)


def video_view(job: Job, live: Live | None, place: Place) -> dict[str, Any]:
    """Return a clip: OpenAI's `Video` with our own fields."""
    ask, result = job.ask, job.result
    return {
        **_common(job, live, place), "object": "video", "prompt": ask["prompt"],
        "seconds": f"{result.get('seconds', ask['seconds']):g}",
        "remixed_from_video_id": ask.get("remixed_from"), "source_video_id": ask.get("source"),
        "kind": ask["kind"], "seed": result.get("seed", ask.get("seed")),
        "fps": result.get("fps", ask["fps"]),
        "num_frames": result.get("num_frames", ask["num_frames"]),
        "num_inference_steps": ask["num_steps"], "negative_prompt": ask["negative"],
        "guidance_scale": ask["guidance"],
        "sound": result.get("sound"), "captions": result.get("captions", []),
    }


def film_view(job: Job, live: Live | None, place: Place) -> dict[str, Any]:
    """Return a film with its shots."""
    ask, result = job.ask, job.result
    there = {each["id"]: each for each in result.get("shots", ())} | (live.shots if live else {})
    shots = []
    for planned in ask["shots"]:
        made = there.get(planned["id"])
        at_work = live is not None and live.shot == planned["id"]
        waits = "failed" if job.is_finished else "queued"
        status = "completed" if made else "in_progress" if at_work else waits
        facts = {name: (made or {}).get(name) for name in ("made", "checks", "choice")}
        seed = (made or planned)["seed"]
        shots.append({**planned, **facts, "status": status, "seed": seed})
    return {
        **_common(job, live, place), "object": "film", "title": ask.get("title"),
        "seconds": f"{result.get('seconds', ask['seconds']):g}", "fps": ask["fps"],
        "num_frames": result.get("num_frames"), "draft": ask["draft"],
        "shot": live.shot if live else None, "shots": shots,
        "timeline": result.get("timeline"), "files": result.get("files", []),
        "previous_film_id": ask.get("previous"), "script": ask["script"],
    }


def _common(job: Job, live: Live | None, place: Place) -> dict[str, Any]:
    ask, result = job.ask, job.result
    progress = 100 if job.status == "completed" else live.percent if live else 0
    facts = live.facts() if live else {"stage": None, "step": None, "num_steps": None}
    error = None
    if job.status == "failed":
        error = {"code": job.error_code, "message": job.error_message}
    return {
        "id": job.id, "model": ask["model"], "status": job.status, **facts, "progress": progress,
        "created_at": int(job.created_at), "started_at": _whole(job.started_at),
        "completed_at": _whole(job.completed_at), "expires_at": _whole(job.expires_at),
        "size": f"{result.get('width', ask['width'])}x{result.get('height', ask['height'])}",
        "error": error, "eta_s": live.eta_s if live else place.eta_s,
        "preview": bool(live and live.preview),
        "queue_position": place.position, "resumed": max(0, job.attempt - 1),
        "checks": result.get("checks"), "stage_durations": result.get("stage_durations"),
        "inference_time_s": result.get("inference_time_s"),
        "peak_memory_mb": result.get("peak_memory_mb"),
        "recipe_sha256": result.get("recipe_sha256"),
        "warnings": live.warnings if live else result.get("warnings", []),
    }


def _whole(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds)
