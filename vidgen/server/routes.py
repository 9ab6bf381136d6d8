"""HTTP routes of clips (as in OpenAI's API), films, their files and events, and the service."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, MutableMapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import anyio.to_thread
from fastapi import APIRouter, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, JSONResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.staticfiles import NotModifiedResponse, StaticFiles
from starlette.types import Receive, Scope, Send

from vidgen.server import responses
from vidgen.server.access import (
    ANY_FILM,
    ANY_VIDEO,
    COOKIE,
    Caller,
    Fields,
    FilmJob,
    Owner,
    VideoJob,
    key_required,
    owner_of,
    service_of,
)
from vidgen.server.hub import Event
from vidgen.server.layout import CONTENTS, MEDIA_TYPES, shot_file
from vidgen.server.requests import loras_in
from vidgen.server.schema import (
    EditRequest,
    ExtensionRequest,
    FilmRequest,
    RemixRequest,
    VideoRequest,
    body_schema,
)
from vidgen.server.service import Service
from vidgen.server.types import ApiError, Kind, QueuedJob

Answer = TypeVar("Answer")
MAX_PAGE = 100
POLL_MS = 1000
RETRY_MS = 1000
"""Time before a browser reconnects to a stream, in milliseconds."""
_FILE_ANSWERS: dict[int | str, dict[str, Any]] = {
    206: {"description": "a range of the file"}, 304: {"description": "the file hasn't changed"},
    416: {"description": "the range is outside the file"}}
videos = APIRouter(prefix="/v1/videos", tags=["videos"], responses=responses.ERRORS)
films = APIRouter(prefix="/v1/films", tags=["films"], responses=responses.ERRORS)
others = APIRouter(tags=["service"], responses=responses.ERRORS)
_STARTED_S = int(time.time())


class EventStream(EventSourceResponse):
    """Stream of events; errors would get its `media_type` in the OpenAPI document, too."""

    media_type: Any = None


class JobFile(FileResponse):
    """Response with a file or ranges of it, or 304 if the client's copy is current (RFC 9110).

    A browser shows the file, or with `download` saves it as `name`.
    """

    def __init__(self, path: Path, name: str, *, download: bool = False) -> None:
        super().__init__(path, media_type=MEDIA_TYPES[path.suffix], filename=name,
                         content_disposition_type="attachment" if download else "inline",
                         stat_result=path.stat())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response; ApiError if the range is outside the file."""
        if StaticFiles().is_not_modified(self.headers, Headers(scope=scope)):
            await NotModifiedResponse(self.headers)(scope, receive, send)
            return

        async def send_unless_refused(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start" and message["status"] >= 400:
                raise HTTPException(message["status"])
            await send(message)

        try:
            await super().__call__(scope, receive, send_unless_refused)
        except HTTPException as error:
            if error.status_code == 416:
                raise ApiError(416, "range_not_satisfiable", "the range is outside the file; "
                               "leave out the header Range to get the whole file", "Range",
                               {"Content-Range": f"bytes */{self.headers['content-length']}"}
                               ) from None
            others = [each for each in scope["headers"] if each[0] != b"range"]  # it is malformed
            await super().__call__({**scope, "headers": others}, receive, send)


async def checked(request: Request, work: Callable[[], Answer]) -> Answer:
    """Run a check of a request in a separate pool of threads, so that other requests don't wait."""
    return await anyio.to_thread.run_sync(work, limiter=service_of(request).checked_at_once)


async def queued(request: Request, make: Callable[[], QueuedJob]) -> dict[str, Any]:
    """Queue a job and return its response."""
    job = await checked(request, make)
    return await run_in_threadpool(service_of(request).scheduler.view, job)


def add_job_routes(
    router: APIRouter, kind: Kind, found: Any, answer: type[BaseModel], pages: type[BaseModel]
) -> None:
    """Add the routes that list, retrieve, delete, cancel and stream jobs of a kind.

    `found` is the dependency that finds a path's job; `answer` and `pages` are the response models.
    """
    place = f"/{{{kind}_id}}"

    def named(verb: str, description: str, noun: str = kind) -> dict[str, Any]:
        return {"name": f"{verb}_{noun}", "description": description}

    @router.get("", response_model=pages, **named(
        "list", f"List {kind}s, the newest first.", f"{kind}s"))
    def list_jobs(
        request: Request, owner: Owner, after: str | None = Query(None, max_length=100),
        limit: int = Query(20, ge=0, le=MAX_PAGE), order: Literal["asc", "desc"] = "desc",
    ) -> Any:
        service = service_of(request)
        jobs, has_more = service.jobs.page(kind, owner, after=after, limit=limit,
                                           newest_first=order == "desc")
        ids = [job.id for job in jobs]
        return {"data": service.scheduler.views(jobs), "has_more": has_more,
                "first_id": ids[0] if ids else None, "last_id": ids[-1] if ids else None}

    @router.get(place, response_model=answer, **named("retrieve", f"Return a {kind}."))
    def retrieve(request: Request, response: Response, job: QueuedJob = found) -> Any:
        if not job.is_finished:
            response.headers["openai-poll-after-ms"] = str(POLL_MS)
        return service_of(request).scheduler.view(job)

    @router.delete(place, response_model=responses.Deleted, **named(
        "delete", f"Delete a {kind}; a running job stops within a step."))
    def delete(request: Request, job: QueuedJob = found) -> Any:
        service_of(request).scheduler.delete(job)
        return {"id": job.id, "object": f"{kind}.deleted"}

    @router.post(f"{place}/cancel", response_model=answer, **named(
        "cancel", f"Cancel an unfinished {kind}; it stops within a step."))
    def cancel(request: Request, job: QueuedJob = found) -> Any:
        if job.is_finished:
            raise ApiError(409, "already_finished", f"the {kind} {job.stands} already")
        scheduler = service_of(request).scheduler
        return scheduler.view(scheduler.cancel(job))

    @router.get(f"{place}/events", response_class=EventStream, **named(
        "events_of", f"Stream the events of a {kind}."))
    async def events(
        request: Request, owner: Owner, job: QueuedJob = found
    ) -> AsyncIterator[ServerSentEvent]:
        async for event in events_of(service_of(request), owner, job):
            yield event


def require_completed(job: QueuedJob) -> None:
    """Raise ApiError unless a job is completed."""
    if job.status != "completed":
        remedy = "wait until it is completed" if job.status != "failed" else (
            f"create another one ({job.error_message})")
        raise ApiError(409, "not_completed", f"the {job.kind} {job.stands}; {remedy}")


def content(request: Request, job: QueuedJob, variant: str, *, download: bool = False) -> Response:
    """Return a file of a completed job; ApiError if the job isn't, or has no such file."""
    require_completed(job)
    path = service_of(request).settings.job_folder(job.id) / CONTENTS[job.kind][variant]
    if not path.is_file():
        raise ApiError(404, "not_found", f"the {job.kind} has no {variant}", "variant")
    name = f"{job.id}{path.suffix}" if variant == "video" else f"{job.id}-{variant}{path.suffix}"
    return JobFile(path, name, download=download)


async def events_of(
    service: Service, owner: str, job: QueuedJob | None
) -> AsyncIterator[ServerSentEvent]:
    """Stream the events of an owner's jobs or of one job, after the current state of each."""
    # listen before the state is read, so that no event is lost
    with service.hub.listen(owner, job.id if job else None) as queue:
        yield ServerSentEvent(retry=RETRY_MS)
        known = await run_in_threadpool(_now, service, owner, job)
        while event := known.pop(0) if known else await queue.get():
            yield ServerSentEvent(event=event.name, data=event.data)
            if event.is_last and job is not None:
                return


def _now(service: Service, owner: str, job: QueuedJob | None) -> list[Event]:
    if job is None:
        jobs = [each for each in service.jobs.waiting() if each.owner == owner]
    elif (now := service.jobs.get(job.id)) is not None:
        jobs = [now]
    else:
        return [Event("deleted", job.id, owner, {"id": job.id, "object": job.kind})]
    events = []
    for each, data in zip(jobs, service.scheduler.views(jobs), strict=True):
        events.append(Event("status", each.id, owner, data))
        if (live := service.scheduler.live(each)) is not None and live.preview is not None:
            events.append(Event("preview", each.id, owner, live.preview))
    return events


@videos.post("", response_model=responses.Video, openapi_extra=body_schema(VideoRequest))
async def create_video(request: Request, call: Caller, fields: Fields) -> Any:
    """Create a clip."""
    return await queued(request, partial(service_of(request).clip, "create", fields, call))


@videos.post("/edits", response_model=responses.Video, openapi_extra=body_schema(EditRequest))
async def edit_video(request: Request, call: Caller, fields: Fields) -> Any:
    """Create a clip from another clip (video to video)."""
    return await queued(request, partial(service_of(request).clip, "edit", fields, call))


@videos.post("/extensions", response_model=responses.Video,
             openapi_extra=body_schema(ExtensionRequest))
async def extend_video(request: Request, call: Caller, fields: Fields) -> Any:
    """Extend a clip."""
    return await queued(request, partial(service_of(request).clip, "extension", fields, call))


@videos.post("/{video_id}/remix", response_model=responses.Video,
             openapi_extra=body_schema(RemixRequest))
async def remix_video(request: Request, call: Caller, source: VideoJob, fields: Fields) -> Any:
    """Create a clip with another clip's request, some fields changed."""
    return await queued(request, partial(service_of(request).clip, "remix", fields, call, source))


@videos.post("/{video_id}/replay", response_model=responses.Video)
async def replay_video(request: Request, call: Caller, source: VideoJob) -> Any:
    """Create a clip again, with identical frames."""
    return await queued(request, partial(service_of(request).clip, "replay", {}, call, source))


add_job_routes(videos, "video", ANY_VIDEO, responses.Video, responses.Page[responses.Video])


@videos.get("/{video_id}/content", response_class=FileResponse, responses={
    200: {"content": {"video/mp4": {}, "image/webp": {}}}, **_FILE_ANSWERS})
def download_video(
    request: Request, video: VideoJob, variant: Literal["video", "thumbnail"] = "video",
    download: bool = False,
) -> Response:
    """Download a clip or its thumbnail."""
    return content(request, video, variant, download=download)


@videos.get("/{video_id}/recipe", response_class=FileResponse, responses={
    200: {"content": {"application/json": {}}}, **_FILE_ANSWERS})
def recipe_of_video(request: Request, video: VideoJob) -> Response:
    """Return the recipe of a clip."""
    return content(request, video, "recipe")


@films.post("", response_model=responses.Film, openapi_extra=body_schema(FilmRequest))
async def create_film(request: Request, call: Caller, fields: Fields) -> Any:
    """Create a film."""
    return await queued(request, partial(service_of(request).film, fields, call))


@films.post("/check", response_model=responses.FilmCheck, openapi_extra=body_schema(FilmRequest))
async def check_film(request: Request, call: Caller, fields: Fields) -> Any:
    """Check a script without making its film."""
    return await checked(request, partial(service_of(request).check_film, fields, call))


add_job_routes(films, "film", ANY_FILM, responses.Film, responses.Page[responses.Film])


@films.get("/{film_id}/content", response_class=FileResponse, responses={
    200: {"content": {"video/mp4": {}, "image/webp": {}, "text/html": {}, "text/vtt": {},
                      "application/x-subrip": {}}}, **_FILE_ANSWERS})
def download_film(
    request: Request, film: FilmJob,
    variant: Literal["video", "thumbnail", "storyboard", "srt", "vtt"] = "video",
    download: bool = False,
) -> Response:
    """Download a film, its thumbnail, storyboard or subtitles."""
    found = content(request, film, variant, download=download)
    if variant == "storyboard":  # a standalone page with inline styles
        found.headers["content-security-policy"] = (
            "default-src 'none'; img-src data:; media-src 'self'; style-src 'unsafe-inline'; "
            "sandbox")
    return found


@films.get("/{film_id}/shots/{shot_id}/content", response_class=FileResponse, responses={
    200: {"content": {"video/mp4": {}, "image/webp": {}}}, **_FILE_ANSWERS})
def download_shot(
    request: Request, film: FilmJob, shot_id: str,
    variant: Literal["video", "thumbnail"] = "video",
    take: int | None = Query(None, ge=0, lt=2**63, description="seed of one of several takes"),
) -> Response:
    """Download a finished shot of a film, or one of its takes."""
    planned = {each["id"]: each for each in film.request["shots"]}.get(shot_id)
    if planned is None:
        raise ApiError(404, "not_found", f"shot {shot_id[:80]!r} doesn't exist", "shot_id")
    folder = service_of(request).settings.job_folder(film.id)
    shot = shot_file(folder, shot_id)
    if not shot.is_file():
        raise ApiError(409, "not_completed", f"the shot {shot_id!r} isn't finished yet")
    is_only = planned["takes"] == 1 and take == planned["seed"]
    path = shot if take is None or is_only else shot_file(folder, shot_id, take)
    if not path.is_file():
        raise ApiError(404, "not_found", f"the shot has no take with seed {take}", "take")
    file = path.with_suffix(".mp4" if variant == "video" else ".webp")
    return JobFile(file, file.name)


@others.get("/v1/models", response_model=responses.Listing[responses.Model])
def list_models(request: Request, owner: Owner) -> Any:  # noqa: ARG001
    """List the served model."""
    return {"data": [_served(service_of(request))]}


@others.get("/v1/models/{model_id:path}", response_model=responses.Model)
def retrieve_served(request: Request, model_id: str, owner: Owner) -> Any:  # noqa: ARG001
    """Return the served model."""
    found = _served(service_of(request))
    if model_id != found["id"]:
        raise ApiError(404, "model_not_found", f"model {model_id[:80]!r} doesn't exist", "model")
    return found


@others.get("/v1/limits", response_model=dict[str, float])
def limits(request: Request, owner: Owner) -> Any:  # noqa: ARG001
    """Return the limits of a request and of a key."""
    return service_of(request).limits


@others.get("/v1/audit", response_model=responses.Listing[dict[str, Any]])
def audit(request: Request, owner: Owner, limit: int = Query(100, ge=1, le=1000)) -> Any:
    """Return the audit log of the caller's key, newest first."""
    return {"data": service_of(request).jobs.audit(owner, limit)}


@others.get("/v1/events", response_class=EventStream)
async def events(request: Request, owner: Owner) -> AsyncIterator[ServerSentEvent]:
    """Stream the events of all jobs of the caller's key."""
    async for event in events_of(service_of(request), owner, None):
        yield event


@others.get("/v1/session", response_model=responses.Session)
def session(request: Request) -> Any:
    """Return whether a key is required, and whether the caller is authenticated."""
    return _session(request, owner_of(request))


@others.post("/v1/session", response_model=responses.Session)
def open_session(request: Request, response: Response, owner: Owner) -> Any:
    """Store the key in a cookie of the browser."""
    key = request.headers.get("authorization", "").partition(" ")[2].strip()
    if key:
        response.set_cookie(COOKIE, key, httponly=True, samesite="strict",
                            secure=request.url.scheme == "https")
    return _session(request, owner)


@others.delete("/v1/session", response_model=responses.Session)
def close_session(request: Request, response: Response) -> Any:
    """Remove the cookie."""
    response.delete_cookie(COOKIE, httponly=True, samesite="strict")
    return _session(request, None)


def _session(request: Request, owner: str | None) -> dict[str, Any]:
    return {"key_required": key_required(service_of(request)), "owner": owner,
            "authenticated": owner is not None}


@others.get("/health", response_model=responses.Health)
async def health() -> Any:
    """Return ok as long as the process responds."""
    return {}


@others.get("/ready", response_model=responses.Readiness,
            responses={503: {"model": responses.Readiness}})
def ready(request: Request) -> Any:
    """Return whether jobs are accepted and run."""
    state = service_of(request).scheduler.state
    counts = service_of(request).jobs.counts()
    body = {"ready": state in ("ready", "busy"), "runner": state.partition(":")[0],
            "queue": counts.get("queued", 0) + counts.get("in_progress", 0)}
    return JSONResponse(body, 200 if body["ready"] else 503)


@others.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
def metrics(request: Request, owner: Owner) -> Response:  # noqa: ARG001
    """Return the metrics in Prometheus text format."""
    service = service_of(request)
    return Response(service.metrics.text(service.jobs.counts()),
                    media_type="text/plain; version=0.0.4; charset=utf-8")


def _served(service: Service) -> dict[str, Any]:
    return service.model | {
        "created": _STARTED_S, "loras": [*loras_in(service.settings.loras)],
        "limits": service.limits}
