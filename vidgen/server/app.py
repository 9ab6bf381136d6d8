"""The application: its routes put together, errors in the client's envelope, the page at `/`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from vidgen import __version__
from vidgen.core.errors import VidgenError
from vidgen.server import films, rest, videos
from vidgen.server.access import service_of
from vidgen.server.errors import ApiError, from_vidgen
from vidgen.server.guard import App, Guard
from vidgen.server.layout import without_folders
from vidgen.server.schema import shared_schemas
from vidgen.server.service import Service

STUDIO = Path(__file__).parent / "studio"
_CODES = {404: "not_found", 405: "method_not_allowed", 416: "range_not_satisfiable"}


def make_app(service: Service) -> App:
    """The whole application around a service."""
    app = FastAPI(title="vidgen", version=__version__, docs_url=None, redoc_url=None)
    app.state.service = service
    app.add_exception_handler(ApiError, _answer_api_error)
    app.add_exception_handler(VidgenError, _answer_vidgen_error)
    app.add_exception_handler(RequestValidationError, _answer_validation_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.include_router(videos.router)
    app.include_router(films.router)
    app.include_router(rest.router)
    _add_page(app)
    _complete_document(app)
    return Guard(app, service)


def _add_page(app: FastAPI) -> None:
    """The page, where its files are there."""
    if (STUDIO / "index.html").is_file():
        app.mount("/studio", StaticFiles(directory=STUDIO))

        @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
        def page() -> Response:
            """The page."""
            return FileResponse(STUDIO / "index.html", headers={"Cache-Control": "no-cache"})


def _complete_document(app: FastAPI) -> None:
    """Add to the OpenAPI document what bodies refer to, and how keys are sent."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        document = make()
        parts = document.setdefault("components", {})
        parts.setdefault("schemas", {}).update(shared_schemas())
        parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}, {}]
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def _answer_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    service_of(request).metrics.refused.labels(error.code).inc()
    return JSONResponse(error.body(), error.status, headers=error.headers)


def _answer_vidgen_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, VidgenError)
    found = from_vidgen(error)
    found.message = without_folders(found.message, service_of(request).settings.data)
    return _answer_api_error(request, found)


def _answer_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    name = str(first["loc"][-1])
    given = repr(first.get("input"))[:60]
    return _answer_api_error(request, ApiError(
        400, "invalid_value", f"{name} is {given}: {first['msg']}", name))


def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    found = ApiError(error.status_code, _CODES.get(error.status_code, "invalid_request"),
                     str(error.detail), headers=error.headers)
    return _answer_api_error(request, found)
