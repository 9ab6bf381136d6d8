"""Server-sent events out of the hub."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse

from vidgen.server.hub import Event
from vidgen.server.job import Job
from vidgen.server.service import Service

PING_S = 15.0
RETRY_MS = 1000
"""How long a browser waits before it connects once more."""


def event_stream(service: Service, owner: str, job: Job | None) -> StreamingResponse:
    """An owner's events, or those of one job, beginning with how all that isn't done stands."""
    return StreamingResponse(_lines(service, owner, job), media_type="text/event-stream",
                             headers={"X-Accel-Buffering": "no"})


async def _lines(service: Service, owner: str, job: Job | None) -> AsyncIterator[str]:
    listener = service.hub.listen(owner, job.id if job else None)  # first: nothing is lost
    try:
        yield f"retry: {RETRY_MS}\n\n"
        for now in await run_in_threadpool(_now, service, owner, job):
            yield _line(now)
            if now.is_last:
                return
        async for event in service.hub.stream(listener, PING_S):
            yield ": ping\n\n" if event is None else _line(event)
    finally:
        service.hub.leave(listener)


def _now(service: Service, owner: str, job: Job | None) -> list[Event]:
    """How a job stands, or each of an owner's that isn't finished."""
    if job is None:
        jobs = [each for each in service.jobs.waiting() if each.owner == owner]
    elif (now := service.jobs.get(job.id)) is not None:
        jobs = [now]
    else:
        data = {"id": job.id, "object": job.kind}
        return [Event("deleted", job.id, owner, data, is_last=True)]
    events = []
    for each, data in zip(jobs, service.scheduler.views(jobs), strict=True):
        is_last = job is not None and each.is_finished
        events.append(Event("status", each.id, owner, data, is_last))
        if (preview := service.scheduler.preview(each)) is not None:
            events.append(Event("preview", each.id, owner, preview))
    return events


def _line(event: Event) -> str:
    return f"event: {event.name}\ndata: {json.dumps(event.data)}\n\n"
