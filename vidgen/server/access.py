"""Dependencies of routes: the owner of a request, its job, its fields, and whether it may pass."""

from __future__ import annotations

import math
import shutil
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import Depends, Header, Path, Request

from vidgen.core.runtime import write_error
from vidgen.server.body import read_body
from vidgen.server.keys import LOCAL
from vidgen.server.service import Service
from vidgen.server.types import ApiError, Call, Kind, QueuedJob

COOKIE = "vidgen_key"
MAX_KEY = 200
RETRY_COUNT = "x-stainless-retry-count"
"""Header in which OpenAI's clients count their retries."""


def service_of(request: Request) -> Service:
    """Return the application's one service."""
    service: Service = request.app.state.service
    return service


def owner_of(request: Request) -> str | None:
    """Return the owner of a request; None if it has no known key."""
    service = service_of(request)
    if not key_required(service):
        return LOCAL
    kind, _, key = request.headers.get("authorization", "").partition(" ")
    if kind.lower() != "bearer":
        key = request.cookies.get(COOKIE, "")
    return service.keys.owner(key.strip()) if 0 < len(key) <= MAX_KEY else None


def key_required(service: Service) -> bool:
    """Return whether requests without a key are refused."""
    return not service.settings.is_loopback or service.keys.are_used


def authenticate(request: Request) -> str:
    """Return the owner, counted in the service's crowd until the guard sees the request's end.

    Raises:
        ApiError: no key, or too many requests of the owner are under way.
    """
    owner = owner_of(request)
    if owner is None:
        raise ApiError(401, "invalid_api_key", "no key was given, or one that isn't known; send "
                       "Authorization: Bearer KEY", headers={"WWW-Authenticate": "Bearer"})
    if not service_of(request).crowd.enter(owner):
        most = service_of(request).settings.at_once
        raise ApiError(429, "too_many_requests", f"{most} requests of this key are under way; end "
                       "one, such as a stream of events, or wait", headers={"Retry-After": "1"})
    request.state.owner = owner
    return owner


Owner = Annotated[str, Depends(authenticate)]


def begin(
    request: Request, owner: Owner,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
) -> Call:
    """Accept a request that may make a job, before its body comes in.

    Raises:
        ApiError: the service stops, or the owner asks too often.
        OutputError: the disk is nearly full.
    """
    service = service_of(request)
    if service.scheduler.state in ("draining", "stopped"):
        raise ApiError(503, "stopping", "the service stops; ask again in a moment",
                       headers={"Retry-After": "5"})
    early_s = service.pace.take(owner)
    if early_s > 0:
        raise ApiError(429, "rate_limit_exceeded", f"{service.settings.per_minute} requests a "
                       f"minute may begin jobs; ask again in {early_s:.1f} s",
                       headers={"Retry-After": str(math.ceil(early_s))})
    service.check_room()
    tries = request.headers.get(RETRY_COUNT, "0")
    return Call(owner, idempotency_key, tries.isdigit() and int(tries) > 0, service.jobs.clock())


Caller = Annotated[Call, Depends(begin)]


async def read_fields(request: Request, call: Caller) -> AsyncIterator[dict[str, Any]]:  # noqa: ARG001
    """Yield the body's fields; files that nobody took are removed afterwards."""
    uploads = service_of(request).settings.uploads / request.state.request_id
    try:
        uploads.mkdir()
    except OSError as error:
        raise write_error(uploads, error) from error
    try:
        yield await read_body(request, uploads)
    finally:
        shutil.rmtree(uploads, ignore_errors=True)


Fields = Annotated[dict[str, Any], Depends(read_fields)]


def _any(kind: Kind) -> Any:
    """Depend on the job of a kind that a path names."""
    def find(request: Request, owner: Owner, job_id: str = Path(alias=f"{kind}_id")) -> QueuedJob:
        job = service_of(request).jobs.get(job_id, owner)
        if job is None or job.kind != kind:
            raise ApiError(404, "not_found", f"there is no {kind} {job_id[:80]!r}", f"{kind}_id")
        return job

    return Depends(find)


ANY_VIDEO, ANY_FILM = _any("video"), _any("film")
VideoJob = Annotated[QueuedJob, ANY_VIDEO]
FilmJob = Annotated[QueuedJob, ANY_FILM]
