"""/v1/films: films from scripts."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from fastapi import Query, Request, Response
from fastapi.responses import FileResponse

from vidgen.server.access import Caller, Fields, FilmJob, Router, film_of, service_of
from vidgen.server.answers import add_job_routes, checked, content, queued
from vidgen.server.errors import ApiError
from vidgen.server.files import FILE_ANSWERS, JobFile
from vidgen.server.layout import shot_file
from vidgen.server.responses import ERRORS, Film, FilmCheck, FilmPage
from vidgen.server.schema import FilmAsk, body_schema

router = Router(prefix="/v1/films", tags=["films"], responses=ERRORS)
Variant = Literal["video", "thumbnail", "storyboard", "srt", "vtt"]
_SHOT = {"video": (".mp4", "video/mp4"), "thumbnail": (".webp", "image/webp")}


@router.post("", response_model=Film, openapi_extra=body_schema(FilmAsk))
async def create_film(request: Request, call: Caller, fields: Fields) -> Any:
    """Ask for a film."""
    return await queued(request, partial(service_of(request).film, fields, call))


@router.post("/check", response_model=FilmCheck, openapi_extra=body_schema(FilmAsk))
async def check_film(request: Request, call: Caller, fields: Fields) -> Any:
    """Hear what a script would make, or what is wrong with it; nothing is made."""
    return await checked(request, partial(service_of(request).check_film, fields, call))


add_job_routes(router, "film", film_of, Film, FilmPage, {
    "list": "Films, the newest first.",
    "retrieve": "A film as it stands.",
    "delete": "Take a film out of the world; one that is being made stops within a step.",
    "cancel": "End a film that isn't finished; shots that are there can be taken over by the next.",
    "preview": "How the shot at work looks while it forms.",
    "events_of": "What happens to a film, as it happens.",
})


@router.get("/{film_id}/content", response_class=FileResponse, responses={
    200: {"content": {"video/mp4": {}, "image/webp": {}, "text/html": {}, "text/vtt": {},
                      "application/x-subrip": {}}}, **FILE_ANSWERS})
def download_film(
    request: Request, film: FilmJob, variant: Variant = "video", download: bool = False,
) -> Response:
    """A film's file, or one that was written beside it."""
    found = content(request, film, variant, download=download)
    if variant == "storyboard":  # a page of its own, with its style in it
        found.headers["content-security-policy"] = (
            "default-src 'none'; img-src data:; media-src 'self'; style-src 'unsafe-inline'; "
            "sandbox")
    return found


@router.get("/{film_id}/shots/{shot_id}/content", response_class=FileResponse, responses={
    200: {"content": {"video/mp4": {}, "image/webp": {}}}, **FILE_ANSWERS})
def download_shot(
    request: Request, film: FilmJob, shot_id: str,
    variant: Literal["video", "thumbnail"] = "video",
    take: int | None = Query(None, ge=0, lt=2**63, description="seed of one of several takes"),
) -> Response:
    """One shot of a film, or a take of it, as soon as the shot is there."""
    planned = {each["id"]: each for each in film.ask["shots"]}.get(shot_id)
    if planned is None:
        raise ApiError(404, "not_found", f"there is no shot {shot_id[:80]!r}", "shot_id")
    folder = service_of(request).settings.job_folder(film.id)
    shot = shot_file(folder, shot_id)
    if not shot.is_file():
        raise ApiError(409, "not_completed", f"the shot {shot_id!r} isn't there yet")
    is_only = planned["takes"] == 1 and take == planned["seed"]
    path = shot if take is None or is_only else shot_file(folder, shot_id, take)
    if not path.is_file():
        raise ApiError(404, "not_found", f"the shot has no take of the seed {take}", "take")
    suffix, media = _SHOT[variant]
    file = path.with_suffix(suffix)
    return JobFile(file, media, file.name)
