"""/v1/videos: clips, in OpenAI's shape."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from fastapi import Query, Request, Response
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse

from vidgen.server.access import Caller, Fields, Owner, Router, VideoJob, service_of
from vidgen.server.answers import (
    MAX_PAGE,
    cancelled,
    content,
    deleted,
    event_stream,
    page,
    preview,
    queued,
    require_completed,
    shown,
)
from vidgen.server.errors import ApiError
from vidgen.server.files import FILE_ANSWERS
from vidgen.server.layout import read_recipe
from vidgen.server.responses import ERRORS, Deleted, Video, VideoPage
from vidgen.server.schema import EditAsk, ExtensionAsk, RemixAsk, VideoAsk, body_schema

router = Router(prefix="/v1/videos", tags=["videos"], responses=ERRORS)
Variant = Literal["video", "thumbnail", "spritesheet"]


@router.post("", response_model=Video, openapi_extra=body_schema(VideoAsk))
async def create_video(request: Request, call: Caller, fields: Fields) -> Any:
    """Ask for a clip."""
    return await queued(request, partial(service_of(request).video, fields, call))


@router.post("/edits", response_model=Video, openapi_extra=body_schema(EditAsk))
async def edit_video(request: Request, call: Caller, fields: Fields) -> Any:
    """Ask for a clip re-imagined."""
    return await queued(request, partial(service_of(request).edit, fields, call))


@router.post("/extensions", response_model=Video, openapi_extra=body_schema(ExtensionAsk))
async def extend_video(request: Request, call: Caller, fields: Fields) -> Any:
    """Ask for a clip to go on."""
    return await queued(request, partial(service_of(request).extend, fields, call))


@router.post("/{video_id}/remix", response_model=Video, openapi_extra=body_schema(RemixAsk))
async def remix_video(request: Request, call: Caller, source: VideoJob, fields: Fields) -> Any:
    """Ask for a clip as another one was asked for, with what is given here changed."""
    return await queued(request, partial(service_of(request).remix, source, fields, call))


@router.post("/{video_id}/replay", response_model=Video)
async def replay_video(request: Request, call: Caller, source: VideoJob) -> Any:
    """Ask for a clip once more; its frames are the same."""
    return await queued(request, partial(service_of(request).replay, source, call))


@router.get("", response_model=VideoPage)
def list_videos(
    request: Request, owner: Owner, after: str | None = Query(None, max_length=100),
    limit: int = Query(20, ge=0, le=MAX_PAGE), order: Literal["asc", "desc"] = "desc",
) -> Any:
    """Clips, the newest first."""
    return page(request, "video", owner, after, limit, order)


@router.get("/{video_id}", response_model=Video)
def retrieve_video(request: Request, response: Response, video: VideoJob) -> Any:
    """A clip as it stands."""
    return shown(request, response, video)


@router.delete("/{video_id}", response_model=Deleted)
def delete_video(request: Request, video: VideoJob) -> Any:
    """Take a clip out of the world; one that is being made stops within a step."""
    return deleted(request, video)


@router.post("/{video_id}/cancel", response_model=Video)
def cancel_video(request: Request, video: VideoJob) -> Any:
    """End a clip that isn't finished; it stops within a step."""
    return cancelled(request, video)


@router.get("/{video_id}/content", response_class=FileResponse, responses={
    200: {"content": {"video/mp4": {}, "image/webp": {}, "image/jpeg": {}}}, **FILE_ANSWERS})
def download_video(
    request: Request, video: VideoJob, variant: Variant = "video", download: bool = False,
) -> Response:
    """A clip's file, or a still of it."""
    return content(request, video, variant, download=download)


@router.get("/{video_id}/preview", response_class=Response, responses={
    200: {"content": {"image/webp": {}}}})
def preview_video(request: Request, video: VideoJob) -> Response:
    """How a clip looks while it forms."""
    return preview(request, video)


@router.get("/{video_id}/recipe", response_model=dict[str, Any])
def recipe_of_video(request: Request, video: VideoJob) -> Any:
    """What made a clip."""
    require_completed(video)
    recipe = read_recipe(service_of(request).settings.job_folder(video.id))
    if recipe is None:
        raise ApiError(404, "not_found", "the video has no recipe")
    return JSONResponse(recipe)


@router.get("/{video_id}/events", response_class=StreamingResponse, responses={
    200: {"content": {"text/event-stream": {}}}})
async def events_of_video(request: Request, owner: Owner, video: VideoJob) -> Response:
    """What happens to a clip, as it happens."""
    return event_stream(service_of(request), owner, video)
