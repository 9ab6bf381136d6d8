"""An ASGI layer around the whole application: checks of origin and size, headers, logs, counts."""

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
_PROBES = ("/health", "/ready", "/metrics")
MAX_REQUESTS = 500
"""Under way at a time; more are refused. Probes are always answered."""
log = logging.getLogger(__name__)


class Guard:
    """Wraps an application; the service's settings count."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service
        self._num_inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        passage = _Passage(self._service, scope, receive, send)
        self._num_inside += 1
        try:
            if self._num_inside > MAX_REQUESTS and scope["path"] not in _PROBES:
                raise ApiError(503, "overloaded", f"{MAX_REQUESTS} requests are under way; ask "
                               "again in a moment", headers={"Retry-After": "1"})
            passage.check()
            await self._app(scope, passage.receive, passage.send)
        except ApiError as error:
            await passage.answer(error)
        except Exception:
            log.exception("a request could not be answered", extra={"request": passage.id})
            await passage.answer(ApiError(500, "server_error",
                                          "the service failed for a reason of its own"))
        finally:
            self._num_inside -= 1
            passage.end()


class _Passage:
    def __init__(self, service: Service, scope: Scope, receive: Receive, send: Send) -> None:
        self._service, self._scope, self._receive, self._send = service, scope, receive, send
        self.id = secrets.token_hex(8)
        self._limit, self._taken = service.settings.upload_bytes, 0
        self._status, self._start = 0, time.monotonic()
        scope.setdefault("state", {})["request_id"] = self.id

    def check(self) -> None:
        """Refuse requests of other pages or to other names, and those that announce too much."""
        headers = Headers(scope=self._scope)
        host = headers.get("host", "")
        if self._service.settings.is_loopback and _name_of(host) not in LOOPBACK:
            raise ApiError(403, "wrong_host", "this service answers to localhost alone")
        if self._scope["method"] not in _SAFE:
            origin = headers.get("origin")
            is_foreign = bool(origin) and urlsplit(origin).netloc != host
            if is_foreign or headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
                raise ApiError(403, "wrong_origin", "another site's page may not ask this")
        try:
            announced = int(headers.get("content-length", "0"))
        except ValueError:
            raise ApiError(400, "malformed_body", "the content length is no number") from None
        self._check_size(announced)

    async def receive(self) -> Message:
        """Pass on the body's next piece, as long as the body isn't too large."""
        message = await self._receive()
        if message["type"] == "http.request":
            self._taken += len(message.get("body", b""))
            self._check_size(self._taken)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            headers = MutableHeaders(scope=message)
            for name, value in {**_HEADERS, "x-request-id": self.id}.items():
                headers.setdefault(name, value)
            if self._scope["path"].startswith("/v1/"):
                headers.setdefault("cache-control", "no-store")
            elif self._scope["path"].startswith("/studio/"):
                headers.setdefault("cache-control", "no-cache")
            self._service.metrics.latency.labels(self._route()).observe(self._elapsed_s)
        await self._send(message)

    async def answer(self, error: ApiError) -> None:
        """Answer with an error, unless an answer was begun."""
        self._service.metrics.refused.labels(error.code).inc()
        if self._status == 0:
            response = JSONResponse(error.body(), error.status, headers=error.headers)
            await response(self._scope, self.receive, self.send)

    def end(self) -> None:
        """Let its owner's next request in; count and log this one."""
        method, owner = self._scope["method"], self._scope["state"].get("owner")
        if owner is not None:
            self._service.crowd.leave(owner)
        self._service.metrics.requests.labels(
            method if method in _METHODS else "other", self._route(), str(self._status)).inc()
        if self._route() not in _PROBES:
            log.info("answered", extra={
                "request": self.id, "method": method, "path": self._scope["path"],
                "status": self._status, "seconds": round(self._elapsed_s, 4), "owner": owner})

    def _check_size(self, size: int) -> None:
        if size > self._limit:
            raise ApiError(413, "too_large", f"the request has more than {self._limit} bytes; send "
                                             "a smaller one", headers={"Connection": "close"})

    def _route(self) -> str:
        """Return the route's pattern, so that ids don't make a series each."""
        return getattr(self._scope.get("route"), "path", "none")

    @property
    def _elapsed_s(self) -> float:
        return time.monotonic() - self._start


def _name_of(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()
