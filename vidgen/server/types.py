"""Values that the parts of the service share: jobs, files that came in, and errors.

Clients read errors in OpenAI's envelope, with the right status, and never a traceback of ours:

    {"error": {"message": "...", "type": "...", "param": "seconds", "code": "invalid_request"}}
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vidgen.core.errors import InputError, OptionError, OutputError, VidgenError

Kind = Literal["video", "film"]
Status = Literal["queued", "in_progress", "completed", "failed"]
UNFINISHED = ("queued", "in_progress")
NAMES = {
    "frames": "num_frames", "negative": "negative_prompt", "steps": "num_inference_steps",
    "guidance": "guidance_scale", "shift": "flow_shift", "image": "image_reference",
    "last_image": "last_image_reference", "video": "video_reference", "audio": "audio_reference",
}
"""Names of options of `Request` in bodies; the others keep theirs."""
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


@dataclass(frozen=True)
class Call:
    """The caller of a request.

    Attributes:
        is_retry: whether the client says that it retries.
        arrived_at: when the request began to come in, by the queue's clock.
    """

    owner: str
    idempotency_key: str | None = None
    is_retry: bool = False
    arrived_at: float = 0.0


@dataclass(frozen=True, kw_only=True)
class NewJob(Call):
    """A job to be queued, of a call.

    Attributes:
        request: the request, as clients see it.
        spec: the request, as the process that makes it reads it.
        fingerprint: a hash of the request, equal for equal requests.
        id: None draws one.
    """

    kind: Kind
    request: Mapping[str, Any]
    spec: Mapping[str, Any]
    fingerprint: str
    expected_s: float = 0.0
    id: str | None = None


@dataclass(frozen=True)
class QueuedJob:
    """A job in the queue; times are Unix seconds. See `NewJob` for the rest.

    Attributes:
        result: facts of the clip, or of its finished parts.
        attempt: number of starts; above 1 it went on after a stop.
        deaths: number of processes that it crashed.
        num_bytes: on disk, once it is finished.
    """

    id: str
    kind: Kind
    owner: str
    status: Status
    created_at: float
    request: dict[str, Any]
    spec: dict[str, Any]
    result: dict[str, Any]
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
        """Whether nothing more happens to it."""
        return self.status not in UNFINISHED

    @property
    def stands(self) -> str:
        """Its state in words, to put after its name."""
        return "has failed" if self.status == "failed" else f"is {self.status.replace('_', ' ')}"


def new_id(kind: Kind) -> str:
    """Draw an identifier that can't be guessed."""
    return f"{kind}_{secrets.token_hex(12)}"


@dataclass(frozen=True, repr=False)
class Upload:
    """A file that came in; clients never see its path, and their `name` is never used as one."""

    path: Path
    name: str
    sha256: str
    size: int

    def __repr__(self) -> str:
        return f"the file {self.name!r}"


class ApiError(VidgenError):
    """An answer that is no success: `code` is for programs, `param` the field that caused it."""

    def __init__(
        self, status: int, code: str, message: str, param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Return the envelope."""
        kind = _TYPES.get(self.status) or (
            "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param,
                          "code": self.code}}


def refusal(error: VidgenError, code: str = "invalid_request") -> ApiError:
    """Return the error of a request that can't be honoured as an answer."""
    option = error.option if isinstance(error, OptionError) else ""
    return ApiError(400, code, str(error), NAMES.get(option, option) or None)


def from_vidgen(error: VidgenError) -> ApiError:
    """Return an error of ours as an answer."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InputError):
        return refusal(error)
    if isinstance(error, OutputError):
        return ApiError(507, "insufficient_storage", str(error))
    return ApiError(500, "server_error", "the service failed for a reason of its own")
