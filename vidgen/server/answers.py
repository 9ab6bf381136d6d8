"""What clips and films answer alike: jobs queued, listed, shown, ended, and their files."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any, TypeVar

import anyio.to_thread
from fastapi import Request, Response
from fastapi.concurrency import run_in_threadpool

from vidgen.server.access import service_of
from vidgen.server.errors import ApiError
from vidgen.server.files import JobFile
from vidgen.server.job import Job, Kind
from vidgen.server.layout import content_of

Answer = TypeVar("Answer")
MAX_PAGE = 100
POLL_MS = 1000


async def judged(request: Request, work: Callable[[], Answer]) -> Answer:
    """Do what waits for the process that judges, in threads of its own: others go on meanwhile."""
    return await anyio.to_thread.run_sync(work, limiter=service_of(request).judged_at_once)


async def queued(request: Request, make: Callable[[], Job]) -> dict[str, Any]:
    """Have a job queued, and show it."""
    job = await judged(request, make)
    return await run_in_threadpool(service_of(request).scheduler.view, job)


def page(
    request: Request, kind: Kind, owner: str, after: str | None, limit: int, order: str
) -> dict[str, Any]:
    """Some of an owner's jobs."""
    service = service_of(request)
    jobs, has_more = service.jobs.page(kind, owner, after=after, limit=limit,
                                       newest_first=order == "desc")
    ids = [job.id for job in jobs]
    return {"data": service.scheduler.views(jobs), "has_more": has_more,
            "first_id": ids[0] if ids else None, "last_id": ids[-1] if ids else None}


def shown(request: Request, response: Response, job: Job) -> dict[str, Any]:
    """A job, with a word to clients on when to ask again."""
    if not job.is_finished:
        response.headers["openai-poll-after-ms"] = str(POLL_MS)
    return service_of(request).scheduler.view(job)


def deleted(request: Request, job: Job) -> dict[str, Any]:
    """Take a job out of the world."""
    service_of(request).scheduler.delete(job)
    return {"id": job.id, "object": f"{job.kind}.deleted"}


def cancelled(request: Request, job: Job) -> dict[str, Any]:
    """End a job that isn't finished.

    Raises:
        ApiError: it is.
    """
    if job.is_finished:
        raise ApiError(409, "already_finished", f"the {job.kind} {job.stands} already")
    scheduler = service_of(request).scheduler
    return scheduler.view(scheduler.cancel(job))


def require_completed(job: Job) -> None:
    """Refuse what a job only has once it is completed.

    Raises:
        ApiError: it isn't.
    """
    if job.status == "completed":
        return
    remedy = "wait until it is completed"
    if job.status == "failed":
        remedy = f"ask for another one ({job.error_message})"
    raise ApiError(409, "not_completed", f"the {job.kind} {job.stands}; {remedy}")


def content(request: Request, job: Job, variant: str, *, download: bool) -> Response:
    """A file of a finished job; ranges of it where they are asked for.

    Raises:
        ApiError: the job isn't finished, or has no such file.
    """
    require_completed(job)
    found = content_of(service_of(request).settings.job_folder(job.id), job.kind, variant)
    if found is None or not found[0].is_file():
        raise ApiError(404, "not_found", f"the {job.kind} has no {variant}", "variant")
    path, media = found
    name = f"{job.id}{path.suffix}" if variant == "video" else f"{job.id}-{variant}{path.suffix}"
    return JobFile(path, media, name, download=download)


def preview(request: Request, job: Job) -> Response:
    """How a job looks while it forms.

    Raises:
        ApiError: nothing of it can be seen.
    """
    found = service_of(request).scheduler.preview(job)
    if found is None:
        raise ApiError(404, "no_preview", f"there is no preview; the {job.kind} {job.stands}")
    content = base64.b64decode(found["image"].partition(",")[2])
    return Response(content, media_type="image/webp")
