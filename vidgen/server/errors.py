"""Errors as clients read them: OpenAI's envelope with the right status.

No traceback of ours ever goes out.

    {"error": {"message": "...", "type": "...", "param": "seconds", "code": "invalid_request"}}
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from vidgen.core.errors import InputError, OutputError, VidgenError, nearest
from vidgen.server.types import Conflict, Full, Refusal

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_NAMES = {"steps": "num_inference_steps", "frames": "num_frames", "negative": "negative_prompt",
          "guidance": "guidance_scale", "shift": "flow_shift", "image": "image_reference",
          "video": "video_reference", "audio": "audio_reference"}
"""Options of `Request` under the names that clients give them by."""
_PARAM = re.compile(r"(?:the )?(\w+)(?: [\w./-]+)? (?:is|has|must|needs|holds)\b")


class ApiError(Exception):
    """An answer that is no success.

    Args:
        status: of HTTP.
        code: one word for programs.
        message: for people.
        param: the field that caused it, or None.
        headers: of the answer.
    """

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
    text = str(error)
    match error:
        case Conflict():
            return ApiError(422, "idempotency_conflict", text)
        case Full():
            return ApiError(429, "queue_full", text, headers={"Retry-After": "10"})
        case Refusal():
            return ApiError(400, error.code, text, param_of(text))
        case InputError():
            return ApiError(400, "invalid_request", text, param_of(text))
        case OutputError():
            return ApiError(507, "insufficient_storage", text)
    return ApiError(500, "server_error", "the service failed for a reason of its own")


def from_validation(
    error: ValidationError, known: Mapping[str | None, Iterable[str]]
) -> ApiError:
    """Return the first invalid field as an answer.

    Args:
        error: of pydantic.
        known: the fields within each field that has some; under None those of the body.
    """
    first = error.errors(include_url=False, include_context=False)[0]
    place = [str(part) for part in first["loc"]]
    name = place[0] if place else None
    if first["type"] == "extra_forbidden":
        inner = place[-1]
        hint = nearest(inner, known[name if len(place) > 1 else None])
        return ApiError(400, "unknown_parameter", f"unknown field {inner!r}; {hint}", inner)
    if first["type"] == "missing":
        return ApiError(400, "missing_parameter", f"the field {name!r} is missing", name)
    text = first["msg"].removeprefix("Value error, ")
    if not place:  # of the whole body: the message begins with the field that is meant
        word = text.split()[0]
        return ApiError(400, "invalid_value", text, word if word in known[None] else None)
    given = repr(first.get("input"))
    told = f"{'.'.join(place)} is {given if len(given) <= 60 else given[:57] + '...'}: {text}"
    return ApiError(400, "invalid_value", told, name)


def param_of(text: str) -> str | None:
    """Return the field that a message begins with, if any."""
    if text.startswith("audio is 'generate'"):
        return "generate_sound"
    match = _PARAM.match(text)
    return None if match is None else _NAMES.get(match[1], match[1])
