"""ASGI middleware of the whole application: origin and size checks, headers, logs, metrics."""

from __future__ import annotations

import logging
import secrets
import time
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vidgen.server.service import Service
from vidgen.server.settings import LOOPBACK
from vidgen.server.types import ApiError

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
_CACHED = {"/v1/": "no-store", "/studio/": "no-cache"}
_PROBES = ("/health", "/ready", "/metrics")
MAX_REQUESTS = 500
"""Largest number of active requests; more are refused, except probes."""
log = logging.getLogger(__name__)


class Guard:
    """Wraps an application with checks by the service's settings, headers, logs and metrics."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service
        self._num_inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id, start_s, status, taken = secrets.token_hex(8), time.monotonic(), 0, 0
        scope.setdefault("state", {})["request_id"] = request_id

        async def take() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            self._check_size(taken)
            return message

        async def give(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self._complete(scope, MutableHeaders(scope=message), request_id)
            await send(message)

        async def refuse(error: ApiError) -> None:
            if status == 0:
                response = JSONResponse(error.body(), error.status, headers=error.headers)
                await response(scope, take, give)

        self._num_inside += 1
        try:
            self._check(scope)
            await self._app(scope, take, give)
        except ApiError as error:
            await refuse(error)
        except Exception:
            log.exception("answering a request failed", extra={"request": request_id})
            await refuse(ApiError(500, "server_error",
                                  "the service failed; see its log"))
        finally:
            self._num_inside -= 1
            self._end(scope, status, request_id, time.monotonic() - start_s)

    def _check(self, scope: Scope) -> None:
        """Refuse requests from other sites, to other hosts, or with too large a content length."""
        if self._num_inside > MAX_REQUESTS and scope["path"] not in _PROBES:
            raise ApiError(503, "overloaded", f"{MAX_REQUESTS} requests are active; retry in a "
                           "moment", headers={"Retry-After": "1"})
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self._service.settings.is_loopback and _name_of(host) not in LOOPBACK:
            raise ApiError(403, "wrong_host", "this service answers only to localhost")
        if scope["method"] not in _SAFE:
            origin = headers.get("origin")
            is_foreign = bool(origin) and urlsplit(origin).netloc != host
            if is_foreign or headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
                raise ApiError(403, "wrong_origin", "requests from other sites' pages are refused")
        try:
            self._check_size(int(headers.get("content-length", "0")))
        except ValueError:
            raise ApiError(400, "malformed_body", "the content length isn't a number") from None

    def _check_size(self, size: int) -> None:
        if size > (limit := self._service.settings.upload_bytes):
            raise ApiError(413, "too_large", f"the request has more than {limit} bytes; send a "
                           "smaller one", headers={"Connection": "close"})

    @staticmethod
    def _complete(scope: Scope, headers: MutableHeaders, request_id: str) -> None:
        for name, value in {**_HEADERS, "x-request-id": request_id}.items():
            headers.setdefault(name, value)
        for start, value in _CACHED.items():
            if scope["path"].startswith(start):
                headers.setdefault("cache-control", value)

    def _end(self, scope: Scope, status: int, request_id: str, elapsed_s: float) -> None:
        """End a request: release its owner's slot, count it and log it."""
        method, owner, route = scope["method"], scope["state"].get("owner"), _route(scope)
        if owner is not None:
            self._service.crowd.leave(owner)
        self._service.metrics.requests.labels(
            method if method in _METHODS else "other", route, str(status)).inc()
        if route not in _PROBES:
            log.info("answered", extra={
                "request": request_id, "method": method, "path": scope["path"],
                "status": status, "seconds": round(elapsed_s, 4), "owner": owner})


def _route(scope: Scope) -> str:
    """Return the route's pattern; paths with ids would make one metric per job."""
    return getattr(scope.get("route"), "path", "none")


def _name_of(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()
