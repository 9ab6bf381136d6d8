"""Responses of the service: models for its OpenAPI document, and the view of a job.

Jobs have the fields of OpenAI's API, and some of vidgen's own.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict

from vidgen.server.types import QueuedJob, Status

MAX_WARNINGS = 20
Item = TypeVar("Item")


class _Answer(BaseModel):
    model_config = ConfigDict(json_schema_serialization_defaults_required=True)


class JobError(_Answer):
    """Code and message of a failed job."""

    code: str
    message: str


class _JobAnswer(_Answer):
    id: str
    model: str
    status: Status
    progress: int = 0
    stage: str | None = None
    step: int | None = None
    num_steps: int | None = None
    created_at: int
    started_at: int | None
    completed_at: int | None
    expires_at: int | None
    seconds: str
    size: str
    fps: str
    num_frames: int | None = None
    error: JobError | None = None
    eta_s: float | None = None
    queue_position: int | None
    resumed: int
    checks: dict[str, Any] | None = None
    inference_time_s: float | None = None
    peak_memory_mb: float | None = None
    recipe_sha256: str | None = None
    warnings: list[str] = []


class Video(_JobAnswer):
    """Clip, at any state of its job."""

    object: Literal["video"]
    prompt: str
    kind: Literal["create", "remix", "edit", "extension", "replay"]
    remixed_from_video_id: str | None
    source_video_id: str | None
    seed: int | None
    num_inference_steps: int
    negative_prompt: str
    guidance_scale: float
    sound: bool | None = None
    captions: list[dict[str, Any]] = []


class Film(_JobAnswer):
    """Film and its shots, at any state of its job."""

    object: Literal["film"]
    title: str | None
    draft: bool
    shot: str | None = None
    shots: list[dict[str, Any]]
    timeline: list[dict[str, Any]] | None = None
    files: list[str] = []
    previous_film_id: str | None
    script: dict[str, Any]


class Listing(_Answer, Generic[Item]):
    """Complete list of items."""

    object: Literal["list"] = "list"
    data: list[Item]


class Page(Listing[Item]):
    """Page of a list."""

    has_more: bool
    first_id: str | None
    last_id: str | None


class FilmCheck(_Answer):
    """Plan of the film that a script describes."""

    object: Literal["film.check"] = "film.check"
    title: str | None
    shots: list[dict[str, Any]]
    seconds: float
    size: str
    fps: str
    expected_s: float
    notes: list[str]
    script: dict[str, Any]


class Deleted(_Answer):
    """Confirmation of a deleted job."""

    id: str
    object: Literal["video.deleted", "film.deleted"]
    deleted: Literal[True] = True


class ErrorBody(_Answer):
    """Message, type, field and code of an error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(_Answer):
    """Envelope of every error."""

    error: ErrorBody


class Model(_Answer):
    """Served model, with its limits."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "vidgen"
    license: str
    tasks: list[str]
    defaults: dict[str, Any]
    limits: dict[str, float]
    loras: list[str]
    makes_sound: bool


class Session(_Answer):
    """Authentication of the caller."""

    object: Literal["session"] = "session"
    key_required: bool
    authenticated: bool
    owner: str | None


class Health(_Answer):
    """Liveness of the service."""

    status: Literal["ok"] = "ok"


class Readiness(_Answer):
    """Readiness of the service to run jobs."""

    ready: bool
    runner: str
    queue: int


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": text} for status, text in {
        400: "the request is invalid", 401: "the key is missing or invalid",
        403: "another host or origin", 404: "not found", 408: "the body took too long",
        409: "not possible in the job's state", 413: "too large",
        415: "unsupported type of body", 422: "the idempotency key belongs to another request",
        429: "too many requests or jobs", 500: "the service failed",
        503: "the service is stopping or overloaded", 507: "the disk is full",
    }.items()
}


@dataclass
class Live:
    """The running job, with the state that isn't stored in the queue.

    Attributes:
        facts: fields of its response and of its progress events; `shot` is the film's current one.
        shots: the film's finished shots, by id.
        progress_s, stop_sent_s: times of its last progress and of the request to stop it.
    """

    job: QueuedJob
    facts: dict[str, Any] = field(default_factory=lambda: {
        "stage": "load", "step": None, "num_steps": None, "eta_s": None, "progress": 0,
        "shot": None})
    preview: dict[str, Any] | None = None
    shots: dict[str, dict[str, Any]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    progress_s: float = field(default_factory=time.monotonic)
    stop_sent_s: float = math.inf

    def update(self, event: dict[str, Any]) -> None:
        """Apply a progress event."""
        if self.facts["shot"] != (shot := event.get("shot")):
            self.preview = None  # it belongs to another shot
        self.facts = self.facts | {
            "stage": event["stage"], "step": None, "num_steps": None, "eta_s": event.get("eta_s"),
            "shot": shot}
        if event["stage"] == "sample":
            self.facts |= {"step": event["done"], "num_steps": event["total"]}
        if (fraction := event.get("fraction")) is not None:
            self.facts["progress"] = min(99, int(100 * fraction))

    def warn(self, text: str) -> None:
        """Add a warning, once."""
        if text not in self.warnings and len(self.warnings) < MAX_WARNINGS:
            self.warnings.append(text)

    def kept(self) -> dict[str, Any]:
        """Return the result to store of a job that didn't complete."""
        shots = {"shots": list(self.shots.values())} if self.shots else {}
        return {"warnings": self.warnings, **shots}


def view(
    job: QueuedJob, live: Live | None, position: int | None = None, eta_s: float | None = None
) -> dict[str, Any]:
    """Return the JSON data of a job's response.

    `position` is that in the queue, 1 is next; `eta_s` are the seconds to the job's end.
    """
    live = live if job.status == "in_progress" else None
    known = job.request | job.result
    state: dict[str, Any] = {
        "progress": 100 if job.status == "completed" else 0, "eta_s": eta_s}
    if live is not None:
        state = live.facts | {"warnings": live.warnings}
    if job.status == "failed":
        state["error"] = {"code": job.error_code, "message": job.error_message}
    if job.kind == "film":
        state["shots"] = _shots(job, live)
    times = {name: at and int(at) for name in (
        "created_at", "started_at", "completed_at", "expires_at") for at in (getattr(job, name),)}
    facts = {
        **known, **state, **times, "object": job.kind, "id": job.id, "status": job.status,
        "seconds": f"{known['seconds']:g}", "size": f"{known['width']}x{known['height']}",
        "queue_position": position, "resumed": max(0, job.attempt - 1)}
    return (Film if job.kind == "film" else Video)(**facts).model_dump()


def _shots(job: QueuedJob, live: Live | None) -> list[dict[str, Any]]:
    known = {each["id"]: each for each in job.result.get("shots", ())}
    known |= live.shots if live else {}
    shots = []
    for planned in job.request["shots"]:
        made = known.get(planned["id"], {})
        is_running = live is not None and live.facts["shot"] == planned["id"]
        waits = "failed" if job.is_finished else "queued"
        status = "completed" if made else "in_progress" if is_running else waits
        facts = {name: made.get(name) for name in ("made", "checks", "choice")}
        shots.append({**planned, **facts, "status": status,
                      "seed": made.get("seed", planned["seed"])})
    return shots
