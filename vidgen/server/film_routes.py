"""/v1/films: films from scripts."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, StreamingResponse

from vidgen.server.access import Caller, Fields, Owner, job_of, service_of
from vidgen.server.errors import ApiError
from vidgen.server.layout import SHOTS
from vidgen.server.responses import ERRORS, Deleted, Film, FilmCheck, FilmPage
from vidgen.server.schema import FilmAsk, body_schema
from vidgen.server.streams import event_stream
from vidgen.server.videos import MAX_PAGE, cancel, content, delete, page, queued, shown

router = APIRouter(prefix="/v1/films", tags=["films"], responses=ERRORS)
Variant = Literal["video", "thumbnail", "storyboard", "srt", "vtt"]
_SHOT = {"video": (".mp4", "video/mp4"), "thumbnail": (".webp", "image/webp")}


@router.post("", response_model=Film, openapi_extra=body_schema(FilmAsk))
async def create_film(request: Request, call: Caller, fields: Fields) -> Any:
    """Ask for a film."""
    return await queued(request, partial(service_of(request).film, fields, call))


@router.post("/check", response_model=FilmCheck, openapi_extra=body_schema(FilmAsk))
async def check_film(request: Request, call: Caller, fields: Fields) -> Any:
    """Hear what a script would make, or what is wrong with it; nothing is made."""
    return await run_in_threadpool(service_of(request).check_film, fields, call)


@router.get("", response_model=FilmPage)
def list_films(
    request: Request, owner: Owner, after: str | None = Query(None, max_length=100),
    limit: int = Query(20, ge=0, le=MAX_PAGE), order: Literal["asc", "desc"] = "desc",
) -> Any:
    """Films, the newest first."""
    return page(request, "film", owner, after, limit, order)


@router.get("/{film_id}", response_model=Film)
def retrieve_film(request: Request, response: Response, film_id: str, owner: Owner) -> Any:
    """A film as it stands."""
    return shown(request, response, job_of(request, "film", film_id, owner))


@router.delete("/{film_id}", response_model=Deleted)
def delete_film(request: Request, film_id: str, owner: Owner) -> Any:
    """Take a film out of the world; one that is being made stops within a step."""
    return delete(request, job_of(request, "film", film_id, owner))


@router.post("/{film_id}/cancel", response_model=Film)
def cancel_film(request: Request, film_id: str, owner: Owner) -> Any:
    """End a film that isn't finished; shots that are there can be taken over by the next."""
    return cancel(request, job_of(request, "film", film_id, owner))


@router.get("/{film_id}/content", response_class=FileResponse, responses={
    200: {"content": {"video/mp4": {}, "image/webp": {}, "text/html": {}, "text/vtt": {},
                      "application/x-subrip": {}}},
    206: {"description": "a range of it"}, 416: {"description": "no such range"}})
def download_film(
    request: Request, film_id: str, owner: Owner, variant: Variant = "video",
    download: bool = False,
) -> Response:
    """A film's file, or one that was written beside it."""
    job = job_of(request, "film", film_id, owner)
    found = content(request, job, variant, download=download)
    if variant == "storyboard":  # a page of its own, with its style in it
        found.headers["content-security-policy"] = (
            "default-src 'none'; img-src data:; media-src 'self'; style-src 'unsafe-inline'; "
            "sandbox")
    return found


@router.get("/{film_id}/shots/{shot_id}/content", response_class=FileResponse, responses={
    200: {"content": {"video/mp4": {}, "image/webp": {}}},
    206: {"description": "a range of it"}, 416: {"description": "no such range"}})
def download_shot(
    request: Request, film_id: str, shot_id: str, owner: Owner,
    variant: Literal["video", "thumbnail"] = "video",
    take: int | None = Query(None, ge=0, lt=2**63, description="seed of a take of several"),
) -> Response:
    """One shot of a film, or a take of it, as soon as it is there."""
    job = job_of(request, "film", film_id, owner)
    suffix, media = _SHOT[variant]
    if shot_id not in {each["id"] for each in job.ask["shots"]}:
        raise ApiError(404, "not_found", f"there is no shot {shot_id[:80]!r}", "shot_id")
    path = service_of(request).settings.job_folder(job.id) / SHOTS
    name = shot_id if take is None else f"{shot_id}-{take}"
    path = path / f"{name}{suffix}"
    if not path.is_file() and take is None:
        raise ApiError(409, "not_completed", f"the shot {shot_id!r} isn't there yet")
    if not path.is_file():
        raise ApiError(404, "not_found", f"the shot has no take of seed {take} to choose from",
                       "take")
    return FileResponse(path, media_type=media, filename=path.name,
                        content_disposition_type="inline")


@router.get("/{film_id}/events", response_class=StreamingResponse, responses={
    200: {"content": {"text/event-stream": {}}}})
async def events_of_film(request: Request, film_id: str, owner: Owner) -> Response:
    """What happens to a film, as it happens."""
    job = await run_in_threadpool(job_of, request, "film", film_id, owner)
    return event_stream(service_of(request), owner, job)
