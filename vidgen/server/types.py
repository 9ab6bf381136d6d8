"""Jobs, uploads and errors of the service.

Clients get errors in OpenAI's envelope with an HTTP status, never a traceback:

    {"error": {"message": "...", "type": "...", "param": "seconds", "code": "invalid_request"}}
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator

from vidgen.core.errors import InputError, OptionError, OutputError, VidgenError

Kind = Literal["video", "film"]
Status = Literal["queued", "in_progress", "completed", "failed"]
UNFINISHED = ("queued", "in_progress")
OPEN, CANCELLED, PAUSED = "open", "cancelled", "paused"
"""Kind of the worker's first job; reasons to stop a job."""
NAMES = {
    "frames": "num_frames", "negative": "negative_prompt", "steps": "num_inference_steps",
    "guidance": "guidance_scale", "shift": "flow_shift", "image": "image_reference",
    "last_image": "last_image_reference", "video": "video_reference", "audio": "audio_reference",
}
"""Names in bodies of options of `Request`; other options keep their names."""
_Parsed = Annotated[dict[str, Any], BeforeValidator(json.loads)]
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


@dataclass(frozen=True)
class Call:
    """Caller of a request.

    Attributes:
        is_retry: whether the client marks the request as a retry.
        arrived_at: time of the request's arrival, by the queue's clock.
    """

    owner: str
    idempotency_key: str | None = None
    is_retry: bool = False
    arrived_at: float = 0.0


class QueuedJob(BaseModel, frozen=True):
    """Job in the queue; times are Unix seconds.

    Attributes:
        request: request for clients, with the plan's values.
        spec: request for the worker process.
        result: facts of the clip, or of the film's finished shots.
        attempt: number of starts; above 1 the job continued after a stop.
        deaths: number of processes that it crashed.
        num_bytes: size on disk of a finished job.
    """

    id: str
    kind: Kind
    owner: str
    status: Status
    created_at: float
    request: _Parsed
    spec: _Parsed
    result: _Parsed
    started_at: float | None = None
    completed_at: float | None = None
    expires_at: float | None = None
    error_code: str | None = None
    error_message: str | None = None
    attempt: int = 0
    deaths: int = 0
    expected_s: float = 0.0
    num_bytes: int = 0

    @property
    def is_finished(self) -> bool:
        """Whether the job has completed or failed."""
        return self.status not in UNFINISHED

    @property
    def stands(self) -> str:
        """State in words, for use after the job's name in a message."""
        return "has failed" if self.status == "failed" else f"is {self.status.replace('_', ' ')}"


def new_id(kind: Kind) -> str:
    """Draw a random job id."""
    return f"{kind}_{secrets.token_hex(12)}"


@dataclass(frozen=True, repr=False)
class Upload:
    """Uploaded file; `name` is the client's and must not be used as a path."""

    path: Path
    name: str
    sha256: str
    size: int

    def __repr__(self) -> str:
        return f"the file {self.name!r}"


class MemoryFull(VidgenError):
    """A job ran out of memory."""


class ApiError(VidgenError):
    """Error response; `code` is for programs, `param` is the field that caused it."""

    def __init__(
        self, status: int, code: str, message: str, param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Return the error in OpenAI's envelope."""
        kind = _TYPES.get(self.status) or (
            "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param,
                          "code": self.code}}


def refusal(error: VidgenError, code: str = "invalid_request") -> ApiError:
    """Return the error of an invalid request as a response."""
    option = error.option if isinstance(error, OptionError) else ""
    return ApiError(400, code, str(error), NAMES.get(option, option) or None)


def from_vidgen(error: Exception) -> ApiError:
    """Return any error as a response; the text of unexpected ones stays in the log."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InputError):
        return refusal(error)
    if isinstance(error, OutputError):
        return ApiError(507, "insufficient_storage", str(error))
    return ApiError(500, "server_error", "the service failed; see its log")
