"""/v1/videos: clips, in OpenAI's shape."""

from __future__ import annotations

import base64
from functools import partial
from typing import Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse

from vidgen.server.access import Caller, Fields, Owner, job_of, service_of
from vidgen.server.errors import ApiError
from vidgen.server.job import Job, Kind
from vidgen.server.layout import content_of, read_recipe
from vidgen.server.responses import ERRORS, Deleted, Video, VideoPage
from vidgen.server.schema import EditAsk, ExtensionAsk, RemixAsk, VideoAsk, body_schema
from vidgen.server.streams import event_stream

MAX_PAGE = 100
POLL_MS = 1000
router = APIRouter(prefix="/v1/videos", tags=["videos"], responses=ERRORS)
Variant = Literal["video", "thumbnail", "spritesheet"]


@router.post("", response_model=Video, openapi_extra=body_schema(VideoAsk))
async def create_video(request: Request, call: Caller, fields: Fields) -> Any:
    """Ask for a clip."""
    service = service_of(request)
    return await queued(request, partial(service.video, fields, call))


@router.post("/edits", response_model=Video, openapi_extra=body_schema(EditAsk))
async def edit_video(request: Request, call: Caller, fields: Fields) -> Any:
    """Ask for a clip re-imagined."""
    return await queued(request, partial(service_of(request).edit, fields, call))


@router.post("/extensions", response_model=Video, openapi_extra=body_schema(ExtensionAsk))
async def extend_video(request: Request, call: Caller, fields: Fields) -> Any:
    """Ask for a clip to go on."""
    return await queued(request, partial(service_of(request).extend, fields, call))


@router.post("/{video_id}/remix", response_model=Video, openapi_extra=body_schema(RemixAsk))
async def remix_video(request: Request, video_id: str, call: Caller, fields: Fields) -> Any:
    """Ask for a clip as another one was asked for, with what is given here changed."""
    source = await run_in_threadpool(job_of, request, "video", video_id, call.owner)
    return await queued(request, partial(service_of(request).remix, source, fields, call))


@router.post("/{video_id}/replay", response_model=Video)
async def replay_video(request: Request, video_id: str, call: Caller) -> Any:
    """Ask for a clip once more; its frames are the same."""
    source = await run_in_threadpool(job_of, request, "video", video_id, call.owner)
    return await queued(request, partial(service_of(request).replay, source, call))


@router.get("", response_model=VideoPage)
def list_videos(
    request: Request, owner: Owner, after: str | None = Query(None, max_length=100),
    limit: int = Query(20, ge=0, le=MAX_PAGE), order: Literal["asc", "desc"] = "desc",
) -> Any:
    """Clips, the newest first."""
    return page(request, "video", owner, after, limit, order)


@router.get("/{video_id}", response_model=Video)
def retrieve_video(request: Request, response: Response, video_id: str, owner: Owner) -> Any:
    """A clip as it stands."""
    return shown(request, response, job_of(request, "video", video_id, owner))


@router.delete("/{video_id}", response_model=Deleted)
def delete_video(request: Request, video_id: str, owner: Owner) -> Any:
    """Take a clip out of the world; one that is being made stops within a step."""
    return delete(request, job_of(request, "video", video_id, owner))


@router.post("/{video_id}/cancel", response_model=Video)
def cancel_video(request: Request, video_id: str, owner: Owner) -> Any:
    """End a clip that isn't finished; it stops within a step."""
    return cancel(request, job_of(request, "video", video_id, owner))


@router.get("/{video_id}/content", response_class=FileResponse, responses={
    200: {"content": {"video/mp4": {}, "image/webp": {}, "image/jpeg": {}}},
    206: {"description": "a range of it"}, 416: {"description": "no such range"}})
def download_video(
    request: Request, video_id: str, owner: Owner, variant: Variant = "video",
    download: bool = False,
) -> Response:
    """A clip's file, or a still of it."""
    return content(request, job_of(request, "video", video_id, owner), variant, download=download)


@router.get("/{video_id}/preview", response_class=Response, responses={
    200: {"content": {"image/webp": {}}}})
def preview_video(request: Request, video_id: str, owner: Owner) -> Response:
    """How a clip looks while it forms."""
    job = job_of(request, "video", video_id, owner)
    image = service_of(request).scheduler.preview(job)
    if image is None:
        raise ApiError(404, "no_preview", f"there is no preview; the video is {job.status}")
    return Response(base64.b64decode(image.partition(",")[2]), media_type="image/webp")


@router.get("/{video_id}/recipe", response_model=dict[str, Any])
def recipe_of_video(request: Request, video_id: str, owner: Owner) -> Any:
    """What made a clip."""
    job = job_of(request, "video", video_id, owner)
    recipe = read_recipe(service_of(request).settings.job_folder(job.id))
    if job.status != "completed" or recipe is None:
        raise ApiError(409, "not_completed", f"the video is {job.status}; wait until it is "
                                             "completed")
    return JSONResponse(recipe)


@router.get("/{video_id}/events", response_class=StreamingResponse, responses={
    200: {"content": {"text/event-stream": {}}}})
async def events_of_video(request: Request, video_id: str, owner: Owner) -> Response:
    """What happens to a clip, as it happens."""
    job = await run_in_threadpool(job_of, request, "video", video_id, owner)
    return event_stream(service_of(request), owner, job)


async def queued(request: Request, make: Any) -> dict[str, Any]:
    """Have a job queued, and show it."""
    job = await run_in_threadpool(make)
    return await run_in_threadpool(service_of(request).scheduler.view, job)


def page(
    request: Request, kind: Kind, owner: str, after: str | None, limit: int, order: str
) -> dict[str, Any]:
    """Some of an owner's jobs."""
    service = service_of(request)
    jobs, has_more = service.jobs.page(kind, owner, after=after, limit=limit,
                                       newest_first=order == "desc")
    data = service.scheduler.views(jobs)
    ids = [job.id for job in jobs]
    return {"data": data, "has_more": has_more, "first_id": ids[0] if ids else None,
            "last_id": ids[-1] if ids else None}


def shown(request: Request, response: Response, job: Job) -> dict[str, Any]:
    """A job, with a word to clients on when to ask again."""
    if not job.is_finished:
        response.headers["openai-poll-after-ms"] = str(POLL_MS)
    return service_of(request).scheduler.view(job)


def delete(request: Request, job: Job) -> dict[str, Any]:
    """Take a job out of the world."""
    service_of(request).scheduler.delete(job)
    return {"id": job.id, "object": f"{job.kind}.deleted"}


def cancel(request: Request, job: Job) -> dict[str, Any]:
    """End a job that isn't finished.

    Raises:
        ApiError: it is.
    """
    if job.is_finished:
        raise ApiError(409, "already_finished", f"the {job.kind} is {job.status} already")
    scheduler = service_of(request).scheduler
    return scheduler.view(scheduler.cancel(job))


def content(request: Request, job: Job, variant: str, *, download: bool) -> Response:
    """A file of a finished job; ranges of it where they are asked for.

    Raises:
        ApiError: the job isn't finished, or has no such file.
    """
    if job.status != "completed":
        raise ApiError(409, "not_completed", f"the {job.kind} is {job.status}; wait until it is "
                                             "completed")
    found = content_of(service_of(request).settings.job_folder(job.id), job.kind, variant)
    if found is None or not found[0].is_file():
        raise ApiError(404, "not_found", f"the {job.kind} has no {variant}", "variant")
    path, media = found
    name = f"{job.id}{path.suffix}" if variant == "video" else f"{job.id}-{variant}{path.suffix}"
    return FileResponse(path, media_type=media, filename=name,
                        content_disposition_type="attachment" if download else "inline")
