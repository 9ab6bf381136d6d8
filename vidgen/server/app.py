"""The service as a process, from its start to its end, and the application that it serves.

The application combines the routes, returns errors in the API's envelope, and serves the studio at
`/`. Logs are JSON lines with time, level, text and job.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vidgen import __version__
from vidgen.core.errors import InputError, OutputError, VidgenError
from vidgen.core.runtime import lock_file
from vidgen.server import routes
from vidgen.server.access import service_of
from vidgen.server.body import check_size
from vidgen.server.keys import Keys
from vidgen.server.layout import without_folders
from vidgen.server.schema import shared_schemas
from vidgen.server.service import Service
from vidgen.server.settings import KEYS, LOOPBACK, Settings
from vidgen.server.types import ApiError, from_vidgen

STUDIO = Path(__file__).parent / "studio"
_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "content-security-policy": (
        "default-src 'self'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
        "media-src 'self' blob:; object-src 'none'; base-uri 'none'; form-action 'self'; "
        "frame-ancestors 'none'"),
}
_METHODS = ("GET", "POST", "DELETE", "HEAD", "OPTIONS", "PUT", "PATCH")
_SAFE = ("GET", "HEAD", "OPTIONS")
_LOCAL = re.compile("(?:{})(?::[0-9]+)?".format("|".join(
    re.escape(f"[{host}]" if ":" in host else host) for host in LOOPBACK)), re.IGNORECASE)
_CACHED = {"/v1/": "no-store", "/studio/": "no-cache"}
_PROBES = ("/health", "/ready", "/metrics")
MAX_REQUESTS = 500
"""Largest number of active requests; more are refused, except probes."""
_CODES = {404: "not_found", 405: "method_not_allowed", 416: "range_not_satisfiable"}
SPARE_CONNECTIONS = 100
"""Connections in addition to active requests: idle ones, and those to be refused."""
_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName",
                                                     "color_message"}
log = logging.getLogger(__name__)


def serve(settings: Settings, on_ready: Callable[[str], None]) -> None:
    """Serve until a signal: the first one lets the running job finish, the second one doesn't wait.

    `on_ready` is called with the address once requests are answered.

    Raises:
        InputError: the address can't be bound, or needs a key and none exists; or all keys are
            revoked.
        ModelError: the model can't be opened.
        OutputError: another service uses the folder, or it can't be written.
    """
    log_as_json()
    _require_keys(settings)
    with _hold(settings.data), _bound(settings) as listener:
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        service = Service(settings)
        service.start()
        server = _Server(service, f"http://{host}:{listener.getsockname()[1]}", on_ready)
        try:
            server.run(sockets=[listener])
        finally:
            service.stop(0.0 if server.is_hurried else settings.drain_seconds)


def _require_keys(settings: Settings) -> None:
    keys = Keys(settings.data / KEYS)
    if keys.all():
        return
    if not settings.is_loopback:
        raise InputError(f"host {settings.host} is open to others and needs an API key; create one "
                         "with --new-key NAME, or leave --host out")
    if keys.are_used:
        raise InputError(f"all keys in {keys.path} are revoked; create one with --new-key NAME, or "
                         "remove the file to serve this machine without keys")


class _Server(uvicorn.Server):
    """Uvicorn that finishes or pauses the running job on the first signal before it closes."""

    def __init__(self, service: Service, url: str, on_ready: Callable[[str], None]) -> None:
        super().__init__(uvicorn.Config(
            make_app(service), log_config=None, access_log=False, lifespan="off",
            limit_concurrency=MAX_REQUESTS + SPARE_CONNECTIONS, server_header=False,
            timeout_graceful_shutdown=5, timeout_keep_alive=30))
        self._service, self._url, self._on_ready = service, url, on_ready
        self.is_draining = self.is_hurried = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self._on_ready(self._url)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self.is_draining:
            self.is_hurried = self.should_exit = True
            return
        self.is_draining = True
        log.info("stopping: waiting for the running job, which is saved if it takes too long")
        threading.Thread(target=self._drain, daemon=True).start()

    def _drain(self) -> None:
        try:
            self._service.scheduler.drain(self._service.settings.drain_seconds)
            self._service.hub.publish(None)
        finally:
            self.should_exit = True


def _hold(data: Path) -> AbstractContextManager[object]:
    """Lock a folder against other services inside the block."""
    try:
        data.mkdir(parents=True, exist_ok=True, mode=0o700)
        return lock_file(data / "lock") or nullcontext()
    except BlockingIOError:
        raise OutputError(f"another service uses {data}; stop it, or give another folder "
                          "with --data") from None
    except OSError as error:
        raise OutputError(f"{data} can't be written: {error.strerror}") from error


def _bound(settings: Settings) -> socket.socket:
    host, port = settings.host, settings.port
    try:
        # not socket.create_server: asyncio sets TCP_NODELAY only if the protocol is given
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, proto)
    except OSError as error:
        raise InputError(f"host {host!r} isn't an address: {error.strerror}") from None
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise InputError(f"can't listen on {host}:{port}: {error.strerror}; give another --port"
                         ) from None
    return listener


def make_app(service: Service) -> ASGIApp:
    """Return the ASGI application of a service."""
    app = _App(title="vidgen", version=__version__, docs_url=None, redoc_url=None)
    app.state.service = service
    for kind in (VidgenError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _answer)
    for router in (routes.videos, routes.films, routes.others):
        app.include_router(router)
    app.mount("/studio", StaticFiles(directory=STUDIO))

    @app.get("/", include_in_schema=False)
    def page() -> Response:
        return FileResponse(STUDIO / "index.html", headers={"Cache-Control": "no-cache"})

    return Guard(app, service)


class _App(FastAPI):
    """An application whose OpenAPI document has the bodies' schemas and the key's scheme."""

    def openapi(self) -> dict[str, Any]:
        document = super().openapi()
        parts = document.setdefault("components", {})
        parts.setdefault("schemas", {}).update(shared_schemas())
        parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}, {}]
        return document


def _answer(request: Request, error: Exception) -> Response:
    match error:
        case RequestValidationError():
            first = error.errors()[0]
            name, given = str(first["loc"][-1]), repr(first.get("input"))[:60]
            found = ApiError(400, "invalid_value", f"{name} is {given}: {first['msg']}", name)
        case HTTPException():
            code = _CODES.get(error.status_code, "invalid_request")
            found = ApiError(error.status_code, code, str(error.detail), headers=error.headers)
        case _:
            found = from_vidgen(error)
            found.message = without_folders(found.message, service_of(request).settings.data)
    return _in_envelope(found)


def _in_envelope(error: ApiError) -> Response:
    return JSONResponse(error.body(), error.status, headers=error.headers)


class Guard:
    """Wraps an application with checks of each request's origin, headers, logs and metrics."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service
        self._num_inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id, start_s, status = secrets.token_hex(8), time.monotonic(), 0
        state = scope.setdefault("state", {})
        state["request_id"] = request_id

        async def give(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status, headers = message["status"], MutableHeaders(scope=message)
                for name, value in {**_HEADERS, "x-request-id": request_id}.items():
                    headers.setdefault(name, value)
                for start, value in _CACHED.items():
                    if scope["path"].startswith(start):
                        headers.setdefault("cache-control", value)
            await send(message)

        self._num_inside += 1
        try:
            self._check(scope)
            await self._app(scope, receive, give)
        except Exception as error:
            if not isinstance(error, ApiError):
                log.exception("answering a request failed", extra={"request": request_id})
            if status == 0:
                await _in_envelope(from_vidgen(error))(scope, receive, give)
        finally:
            self._num_inside -= 1
            # the route's pattern: paths with ids would make one metric per job
            method, route = scope["method"], getattr(scope.get("route"), "path", "none")
            self._service.metrics.requests.labels(
                method if method in _METHODS else "other", route, str(status)).inc()
            if route not in _PROBES:
                log.info("answered", extra={
                    "request": request_id, "method": method, "path": scope["path"],
                    "status": status, "seconds": round(time.monotonic() - start_s, 4),
                    "owner": state.get("owner")})

    def _check(self, scope: Scope) -> None:
        """Refuse requests from other sites, to other hosts, too large ones, and too many."""
        if self._num_inside > MAX_REQUESTS and scope["path"] not in _PROBES:
            raise ApiError(503, "overloaded", f"{MAX_REQUESTS} requests are active; retry in a "
                           "moment", headers={"Retry-After": "1"})
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self._service.settings.is_loopback and not _LOCAL.fullmatch(host):
            raise ApiError(403, "wrong_host", "this service answers only to localhost")
        if scope["method"] not in _SAFE:
            origin = headers.get("origin", "")
            is_foreign = origin != "" and origin.partition("://")[2] != host
            if is_foreign or headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
                raise ApiError(403, "wrong_origin", "requests from other sites' pages are refused")
        check_size(int(headers.get("content-length", "0")), self._service.settings.upload_bytes)


class JsonFormatter(logging.Formatter):
    """Formats a log record as a JSON object, with a field for each `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as one line of JSON."""
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03}Z",
            "level": record.levelname.lower(), "logger": record.name, "text": record.getMessage(),
        }
        line |= {name: value for name, value in vars(record).items()
                 if name not in _OWN and value is not None}
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


def log_as_json(level: int = logging.INFO) -> None:
    """Write all logs of this process to stderr as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers, root.level = [handler], level
    logging.getLogger("uvicorn.access").disabled = True  # the service writes its own, with ids
    logging.getLogger("python_multipart").setLevel(logging.WARNING)
