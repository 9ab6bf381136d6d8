"""Values that the parts of the service share: jobs, files that came in, refusals."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Kind = Literal["video", "film"]
Status = Literal["queued", "in_progress", "completed", "failed"]
UNFINISHED = ("queued", "in_progress")


@dataclass(frozen=True)
class NewJob:
    """A job to be queued.

    Attributes:
        ask: the request, as clients see it.
        spec: the request, as the process that makes it reads it.
        fingerprint: a hash of the request, equal for equal requests.
        is_retry: whether the client says that it retries.
        arrived_at: when the request began to come in, by the queue's clock.
        id: None draws one.
    """

    kind: Kind
    owner: str
    ask: Mapping[str, Any]
    spec: Mapping[str, Any]
    fingerprint: str
    expected_s: float = 0.0
    idempotency_key: str | None = None
    is_retry: bool = False
    arrived_at: float = 0.0
    id: str | None = None


@dataclass(frozen=True)
class Job:
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
    ask: dict[str, Any]
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
