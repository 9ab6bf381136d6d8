"""/v1/videos: clips, in OpenAI's shape."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from fastapi import Request, Response
from fastapi.responses import FileResponse, JSONResponse

from vidgen.server.access import Caller, Fields, Router, VideoJob, service_of, video_of
from vidgen.server.answers import add_job_routes, content, queued, require_completed
from vidgen.server.errors import ApiError
from vidgen.server.files import FILE_ANSWERS
from vidgen.server.layout import kept_recipe
from vidgen.server.responses import ERRORS, Video, VideoPage
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


add_job_routes(router, "video", video_of, Video, VideoPage, {
    "list": "Clips, the newest first.",
    "retrieve": "A clip as it stands.",
    "delete": "Take a clip out of the world; one that is being made stops within a step.",
    "cancel": "End a clip that isn't finished; it stops within a step.",
    "preview": "How a clip looks while it forms.",
    "events_of": "What happens to a clip, as it happens.",
})


@router.get("/{video_id}/content", response_class=FileResponse, responses={
    200: {"content": {"video/mp4": {}, "image/webp": {}, "image/jpeg": {}}}, **FILE_ANSWERS})
def download_video(
    request: Request, video: VideoJob, variant: Variant = "video", download: bool = False,
) -> Response:
    """A clip's file, or a still of it."""
    return content(request, video, variant, download=download)


@router.get("/{video_id}/recipe", response_model=dict[str, Any])
def recipe_of_video(request: Request, video: VideoJob) -> Any:
    """What made a clip."""
    require_completed(video)
    recipe = kept_recipe(service_of(request).settings.job_folder(video.id))
    if recipe is None:
        raise ApiError(404, "not_found", "the video has no recipe")
    return JSONResponse(recipe)
