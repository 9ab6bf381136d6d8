"""Routes besides clips and films: models, limits, sessions, the audit log, health, metrics."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from fastapi import Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from vidgen.server.access import COOKIE, Owner, Router, key_required, owner_of, service_of
from vidgen.server.errors import ApiError
from vidgen.server.responses import (
    ERRORS,
    AuditPage,
    Health,
    Model,
    ModelPage,
    Readiness,
    Session,
)
from vidgen.server.routes import event_stream
from vidgen.server.service import Service

router = Router(tags=["service"], responses=ERRORS)
_STARTED = int(time.time())


@router.get("/v1/models", response_model=ModelPage)
def list_models(request: Request, owner: Owner) -> Any:  # noqa: ARG001
    """The model that is served."""
    return {"data": [_model(service_of(request))]}


@router.get("/v1/models/{model_id:path}", response_model=Model)
def retrieve_model(request: Request, model_id: str, owner: Owner) -> Any:  # noqa: ARG001
    """The model that is served, by its id."""
    found = _model(service_of(request))
    if model_id != found["id"]:
        raise ApiError(404, "model_not_found", f"there is no model {model_id[:80]!r}", "model")
    return found


@router.get("/v1/limits", response_model=dict[str, float])
def limits(request: Request, owner: Owner) -> Any:  # noqa: ARG001
    """What one request and one key may take."""
    return asdict(service_of(request).settings.limits)


@router.get("/v1/audit", response_model=AuditPage)
def audit(request: Request, owner: Owner, limit: int = Query(100, ge=1, le=1000)) -> Any:
    """What was done under this key, the latest first."""
    return {"data": service_of(request).jobs.audit(owner, limit)}


@router.get("/v1/events", response_class=StreamingResponse, responses={
    200: {"content": {"text/event-stream": {}}}})
async def events(request: Request, owner: Owner) -> Response:
    """What happens to all jobs of this key, as it happens."""
    return event_stream(service_of(request), owner, None)


@router.get("/v1/session", response_model=Session)
def session(request: Request) -> Any:
    """Whether a key is needed, and whether there is one."""
    owner = owner_of(request)
    return {"key_required": key_required(service_of(request)), "owner": owner,
            "authenticated": owner is not None}


@router.post("/v1/session", response_model=Session)
def open_session(request: Request, response: Response, owner: Owner) -> Any:
    """Have the browser send the key by itself from now on."""
    key = request.headers.get("authorization", "").partition(" ")[2].strip()
    if key:
        response.set_cookie(COOKIE, key, httponly=True, samesite="strict",
                            secure=request.url.scheme == "https")
    return {"key_required": key_required(service_of(request)), "owner": owner,
            "authenticated": True}


@router.delete("/v1/session", response_model=Session)
def close_session(request: Request, response: Response) -> Any:
    """Have the browser forget the key."""
    response.delete_cookie(COOKIE, httponly=True, samesite="strict")
    return {"key_required": key_required(service_of(request)), "owner": None,
            "authenticated": False}


@router.get("/health", response_model=Health)
async def health() -> Any:
    """Whether the process answers; without a thread, of which there may be none left."""
    return {}


@router.get("/ready", response_model=Readiness, responses={503: {"model": Readiness}})
def ready(request: Request) -> Any:
    """Whether jobs are taken and made."""
    scheduler = service_of(request).scheduler
    state = scheduler.state
    counts = service_of(request).jobs.counts()
    body = {"ready": state in ("ready", "busy"), "runner": state.partition(":")[0],
            "queue": counts.get("queued", 0) + counts.get("in_progress", 0)}
    return JSONResponse(body, 200 if body["ready"] else 503)


@router.get("/metrics", response_class=Response, responses={
    200: {"content": {"text/plain": {}}}})
def metrics(request: Request, owner: Owner) -> Response:  # noqa: ARG001
    """Counters for Prometheus."""
    return Response(service_of(request).metrics.text(),
                    media_type="text/plain; version=0.0.4; charset=utf-8")


def _model(service: Service) -> dict[str, Any]:
    known = service.model
    return {
        "id": known["name"], "created": _STARTED, "license": known["license"],
        "tasks": known["tasks"], "defaults": known["defaults"], "loras": service.asks.loras,
        "limits": asdict(service.settings.limits), "makes_sound": known["makes_sound"],
    }
