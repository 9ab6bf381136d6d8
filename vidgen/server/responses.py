"""Models of the service's answers, for its OpenAPI document."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class _Answer(BaseModel):
    model_config = ConfigDict(protected_namespaces=())


class JobError(_Answer):
    """Why a job failed."""

    code: str
    message: str


class _Job(_Answer):
    id: str
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int
    stage: str | None
    step: int | None
    num_steps: int | None
    created_at: int
    started_at: int | None
    completed_at: int | None
    expires_at: int | None
    seconds: str
    size: str
    fps: str
    num_frames: int | None
    error: JobError | None
    eta_s: float | None
    queue_position: int | None
    preview: bool
    resumed: int
    checks: dict[str, Any] | None
    stage_durations: dict[str, float] | None
    inference_time_s: float | None
    peak_memory_mb: float | None
    recipe_sha256: str | None
    warnings: list[str]


class Video(_Job):
    """A clip."""

    object: Literal["video"]
    prompt: str
    kind: Literal["create", "remix", "edit", "extension", "replay"]
    remixed_from_video_id: str | None
    source_video_id: str | None
    seed: int | None
    num_inference_steps: int
    negative_prompt: str
    guidance_scale: float
    sound: bool | None
    captions: list[dict[str, Any]]


class Film(_Job):
    """A film and its shots."""

    object: Literal["film"]
    title: str | None
    draft: bool
    shot: str | None
    shots: list[dict[str, Any]]
    timeline: list[dict[str, Any]] | None
    files: list[str]
    previous_film_id: str | None
    script: dict[str, Any]


class _Page(_Answer):
    object: Literal["list"] = "list"
    has_more: bool
    first_id: str | None
    last_id: str | None


class VideoPage(_Page):
    """Some clips."""

    data: list[Video]


class FilmPage(_Page):
    """Some films."""

    data: list[Film]


class FilmCheck(_Answer):
    """What a script would make."""

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
    """Something is gone."""

    id: str
    object: Literal["video.deleted", "film.deleted"]
    deleted: Literal[True] = True


class ErrorBody(_Answer):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(_Answer):
    """The envelope of every error."""

    error: ErrorBody


class Model(_Answer):
    """A model that is served."""

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


class ModelPage(_Answer):
    """All models."""

    object: Literal["list"] = "list"
    data: list[Model]


class Session(_Answer):
    """Who asks."""

    object: Literal["session"] = "session"
    key_required: bool
    authenticated: bool
    owner: str | None


class AuditPage(_Answer):
    """Lines of the audit log."""

    object: Literal["list"] = "list"
    data: list[dict[str, Any]]


class Health(_Answer):
    """Whether the process answers."""

    status: Literal["ok"] = "ok"


class Readiness(_Answer):
    """Whether jobs are taken and made."""

    ready: bool
    runner: str
    queue: int


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": text} for status, text in {
        400: "the request can't be honoured", 401: "no key, or a wrong one",
        403: "not from there", 404: "there is none", 408: "the body took too long",
        409: "not in this state", 413: "too large", 415: "no body of a known kind",
        422: "an idempotency key used twice", 429: "too many, or too often",
        500: "the service failed", 503: "the service stops", 507: "the disk is full",
    }.items()
}
