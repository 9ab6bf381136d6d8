"""Dependencies of routes: the owner, job and fields of a request, authentication, rate limits."""

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
from vidgen.server.settings import UPLOADS
from vidgen.server.types import ApiError, Call, Kind, QueuedJob

COOKIE = "vidgen_key"
MAX_KEY = 200
RETRY_COUNT = "x-stainless-retry-count"
"""Header in which OpenAI's clients count their retries."""


def service_of(request: Request) -> Service:
    """Return the application's service."""
    service: Service = request.app.state.service
    return service


def owner_of(request: Request) -> str | None:
    """Return the owner of a request's key; None without a valid key."""
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


async def authenticate(
    request: Request, owner: Annotated[str | None, Depends(owner_of)]
) -> AsyncIterator[str]:
    """Yield the owner, and count the request as active until its end.

    Raises:
        ApiError: the key is missing or invalid, or the owner has too many active requests.
    """
    if owner is None:
        raise ApiError(401, "invalid_api_key", "the API key is missing or invalid; send "
                       "Authorization: Bearer KEY", headers={"WWW-Authenticate": "Bearer"})
    active, most = service_of(request).num_active, service_of(request).settings.at_once
    if active[owner] >= most:
        raise ApiError(429, "too_many_requests", f"this key has {most} active requests; close one, "
                       "such as a stream of events, or wait", headers={"Retry-After": "1"})
    request.state.owner = owner
    active[owner] += 1
    try:
        yield owner
    finally:
        active[owner] -= 1


Owner = Annotated[str, Depends(authenticate)]


def begin(
    request: Request, owner: Owner,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
) -> Call:
    """Accept a request that may create a job, before its body is read.

    Raises:
        ApiError: the service is stopping, or the owner exceeds the rate limit.
        OutputError: the disk is nearly full.
    """
    service = service_of(request)
    if service.scheduler.state in ("draining", "stopped"):
        raise ApiError(503, "stopping", "the service is stopping; retry in a moment",
                       headers={"Retry-After": "5"})
    early_s = service.pace.take(owner)
    if early_s > 0:
        raise ApiError(429, "rate_limit_exceeded", f"{service.settings.per_minute} requests per "
                       f"minute may start jobs; retry in {early_s:.1f} s",
                       headers={"Retry-After": str(math.ceil(early_s))})
    service.check_room()
    tries = request.headers.get(RETRY_COUNT, "0")
    return Call(owner, idempotency_key, tries.isdigit() and int(tries) > 0, service.jobs.clock())


Caller = Annotated[Call, Depends(begin)]


async def read_fields(request: Request, call: Caller) -> AsyncIterator[dict[str, Any]]:  # noqa: ARG001
    """Yield the body's fields; remove unused uploads afterwards."""
    uploads = service_of(request).settings.data / UPLOADS / request.state.request_id
    try:
        uploads.mkdir()
    except OSError as error:
        raise write_error(uploads, error) from error
    try:
        yield await read_body(request, uploads, service_of(request).settings.upload_bytes)
    finally:
        shutil.rmtree(uploads, ignore_errors=True)


Fields = Annotated[dict[str, Any], Depends(read_fields)]


def _any(kind: Kind) -> Any:
    """Return the dependency that finds the job in a path; a job of another kind is not found."""
    def find(request: Request, owner: Owner, job_id: str = Path(alias=f"{kind}_id")) -> QueuedJob:
        job = service_of(request).jobs.get(job_id, owner)
        if job is None or job.kind != kind:
            raise ApiError(404, "not_found", f"{kind} {job_id[:80]!r} doesn't exist", f"{kind}_id")
        return job

    return Depends(find)


ANY_VIDEO, ANY_FILM = _any("video"), _any("film")
VideoJob = Annotated[QueuedJob, ANY_VIDEO]
FilmJob = Annotated[QueuedJob, ANY_FILM]
