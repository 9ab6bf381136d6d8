"""Errors as clients read them: OpenAI's envelope with the right status.

No traceback of ours ever goes out.

    {"error": {"message": "...", "type": "...", "param": "seconds", "code": "invalid_request"}}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vidgen.core.errors import InputError, OptionError, OutputError, VidgenError
from vidgen.server.schema import NAMES

POLICY = "content_policy_violation"
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class Conflict(InputError):
    """An idempotency key that was used for another request."""


class Full(InputError):
    """As many jobs wait as may."""


class Refusal(OptionError):
    """A request that was checked and refused; `code` is for the client."""

    def __init__(self, text: str, option: str = "", code: str = "invalid_request") -> None:
        super().__init__(text, option)
        self.code = code


class ApiError(Exception):
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


def from_vidgen(error: VidgenError) -> ApiError:
    """Return an error of ours as an answer."""
    text, param = str(error), None
    if isinstance(error, OptionError) and error.option:
        param = NAMES.get(error.option, error.option)
    match error:
        case Conflict():
            return ApiError(422, "idempotency_conflict", text)
        case Full():
            return ApiError(429, "queue_full", text, headers={"Retry-After": "10"})
        case Refusal():
            return ApiError(400, error.code, text, param)
        case InputError():
            return ApiError(400, "invalid_request", text, param)
        case OutputError():
            return ApiError(507, "insufficient_storage", text)
    return ApiError(500, "server_error", "the service failed for a reason of its own")
