"""The service without HTTP: turn a body's fields into a queued job."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import anyio

from vidgen.core.errors import OutputError
from vidgen.core.request import OWN_AUDIO
from vidgen.core.runtime import link
from vidgen.server.hub import Hub, Metrics
from vidgen.server.jobs import Jobs
from vidgen.server.keys import Keys, Pace
from vidgen.server.layout import INPUTS, lay_down, take_over
from vidgen.server.requests import Draft, options_of, parse
from vidgen.server.scheduler import Scheduler
from vidgen.server.schema import (
    EditRequest,
    ExtensionRequest,
    FilmRequest,
    RemixRequest,
    VideoRequest,
)
from vidgen.server.settings import DATABASE, KEYS, UPLOADS, Settings
from vidgen.server.types import ApiError, Call, Kind, QueuedJob, Upload, new_id

EDIT_STRENGTH = 0.7
CHECKED_AT_ONCE = 16
"""Number of threads that check requests and fetch their URLs; more requests wait."""
BODIES = {"create": VideoRequest, "remix": RemixRequest, "edit": EditRequest,
          "extension": ExtensionRequest}
"""Body of each kind of request for a clip; a replay has none."""
_RIVALS = (("seconds", "frames"), ("image", "video"))


class Service:
    """Queue, scheduler, keys, checks and metrics of one service."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        for name in ("videos", "films", UPLOADS):
            (settings.data / name).mkdir(parents=True, exist_ok=True)
        self.jobs, self.keys = Jobs(settings.data / DATABASE), Keys(settings.data / KEYS)
        self.hub, self.metrics = Hub(), Metrics()
        self.pace, self.num_active = Pace(settings.per_minute), Counter[str]()
        self.scheduler = Scheduler(settings, self.jobs, self.hub, self.metrics)
        self.checked_at_once = anyio.CapacityLimiter(CHECKED_AT_ONCE)

    def start(self) -> None:
        """Open the model, clean up after an earlier run, and start the scheduler.

        Raises:
            ModelError: the model can't be opened.
        """
        from vidgen.server.checker import Checker  # loads torch: after all that may fail before

        self.checker = Checker(self.settings.model, self.settings.limits)
        self.model = self.checker.model()
        self._clear_up()
        self.scheduler.start()

    def stop(self, patience_s: float) -> None:
        """Wait up to `patience_s` seconds for the running job, or pause it; then stop."""
        self.scheduler.drain(patience_s)
        self.hub.publish(None)
        self.jobs.close()

    def clip(
        self, kind: str, fields: dict[str, Any], call: Call, source: QueuedJob | None = None
    ) -> QueuedJob:
        """Queue a clip.

        `kind` is create, edit or extension, or remix or replay of a `source`.

        Raises:
            ApiError: the request is invalid.
            OutputError: the disk is full.
        """
        body: Any = parse(BODIES[kind], fields) if kind in BODIES else None
        with self._draft("video", call) as draft:
            given: dict[str, Any] = {}
            if body is not None:
                self._check_model(body.model)
                given = options_of(body, self.settings.loras) | draft.put_inputs(body)
            spec: dict[str, Any] = {"options": given}
            if source is not None:
                spec = self._changed(source, given, kind, draft)
            elif kind == "edit":
                given.setdefault("strength", EDIT_STRENGTH)
            elif kind == "extension":
                spec["added_s"] = given.pop("seconds")
            if kind in ("edit", "extension") and isinstance(body.video, dict):
                source = self.jobs.get(body.video["id"], call.owner)
                if kind == "extension" and source and "lora" in source.spec["options"]:
                    given["lora"] = source.spec["options"]["lora"]
            self._require_whole(spec["options"])
            plan = self.checker.clip(draft.folder, spec)
            spec["options"]["seed"] = plan["seed"]
            source_id = source and source.id
            facts = {"kind": kind, "source_video_id": source_id,
                     "remixed_from_video_id": source_id if kind == "remix" else None}
            asked = {"kind": kind, "source": source_id, **fields}
            return self._queue(draft, asked, plan | facts, spec)

    def film(self, fields: dict[str, Any], call: Call) -> QueuedJob:
        """Queue a film; ApiError if the request is invalid, OutputError if the disk is full."""
        body = parse(FilmRequest, fields)
        with self._draft("film", call) as draft:
            plan, script = self._film_plan(body, draft)
            del plan["notes"]
            facts = {"draft": body.draft, "previous_film_id": body.previous_film_id}
            spec = {"script": f"{INPUTS}/{script.name}", "draft": body.draft}
            return self._queue(draft, fields, plan | facts, spec)

    def check_film(self, fields: dict[str, Any], call: Call) -> dict[str, Any]:
        """Return the plan of a script's film without queueing it; ApiError as in `film`."""
        body = parse(FilmRequest, fields)
        with self._draft("film", call) as draft:
            plan, _ = self._film_plan(body, draft)
        return {**plan, "size": f"{plan['width']}x{plan['height']}",
                "expected_s": round(plan["expected_s"], 1)}

    @property
    def limits(self) -> dict[str, float]:
        """Limits of one request and of one key."""
        own = {name: getattr(self.settings, name)
               for name in ("upload_bytes", "pending", "per_minute", "at_once")}
        return asdict(self.settings.limits) | own

    def check_room(self) -> None:
        """Raise OutputError if the free disk space is below the reserve."""
        free_mb = shutil.disk_usage(self.settings.data).free / (1 << 20)
        if free_mb < self.settings.reserve_mb:
            raise OutputError(f"{int(free_mb)} MB are free, {int(self.settings.reserve_mb)} MB "
                              "are reserved; delete clips, or free space on the disk")

    def _check_model(self, name: str | None) -> None:
        if name not in (None, self.model["id"]):
            raise ApiError(404, "model_not_found", f"model {name!r} doesn't exist; this service "
                           f"has {self.model['id']!r}", "model")

    def _film_plan(self, body: FilmRequest, draft: Draft) -> tuple[dict[str, Any], Path]:
        self._check_model(body.model)
        path = lay_down(body, draft.folder)
        if body.previous_film_id is not None:
            before = self.jobs.get(body.previous_film_id, draft.call.owner)
            if before is None or before.kind != "film":
                raise ApiError(404, "not_found", f"film {body.previous_film_id!r} doesn't exist",
                               "previous_film_id")
            take_over(self.settings.job_folder(before.id), draft.folder)
        return self.checker.film(path, body.draft), path

    def _changed(
        self, source: QueuedJob, changes: dict[str, Any], kind: str, draft: Draft
    ) -> dict[str, Any]:
        """Return another clip's spec with some options changed; link its input files."""
        options, spec = dict(source.spec["options"]), dict(source.spec)
        before = self.settings.job_folder(source.id) / INPUTS
        for path in before.iterdir() if before.is_dir() else ():
            if not (draft.folder / INPUTS / path.name).exists():
                link(path, draft.folder / INPUTS / path.name)
        if kind == "remix" and not changes:
            raise ApiError(400, "missing_parameter", "no field is changed; give a prompt or "
                           "another field, or request a replay", "prompt")
        if "added_s" in spec and "seconds" in changes:
            spec["added_s"] = changes["seconds"]
        for pair in _RIVALS:
            if not changes.keys().isdisjoint(pair):
                options = {name: value for name, value in options.items() if name not in pair}
        return spec | {"options": options | changes}

    def _require_whole(self, options: dict[str, Any]) -> None:
        if "video" in options and "strength" not in options:
            raise ApiError(400, "missing_parameter", "a video to start from needs the field "
                           "strength; give 0, which keeps it, to 1, or leave the video out",
                           "strength")
        if options.get("audio") == OWN_AUDIO and not self.model["makes_sound"]:
            raise ApiError(400, "invalid_request", f"generate_sound is true, but the model "
                           f"{self.model['id']!r} makes no sound; leave it out",
                           "generate_sound")

    def _queue(
        self, draft: Draft, asked: dict[str, Any], request: dict[str, Any], spec: dict[str, Any]
    ) -> QueuedJob:
        expected_s = request.pop("expected_s")
        job, is_new = self.jobs.add(
            draft.call, draft.kind, request | {"model": self.model["id"]}, spec,
            fingerprint(asked), job_id=draft.id, expected_s=expected_s,
            most=self.settings.limits.queued, most_of_owner=self.settings.pending)
        if is_new:
            draft.is_kept = True
            self.scheduler.wake()
        return job

    @contextmanager
    def _draft(self, kind: Kind, call: Call) -> Iterator[Draft]:
        """Make a folder for a new job; it is removed unless the job is queued."""
        draft = Draft(new_id(kind), kind, call, self.settings, self.jobs)
        try:
            (draft.folder / INPUTS).mkdir(parents=True)
            yield draft
        except OSError as error:
            raise OutputError(f"the job's files can't be written: {error.strerror}") from error
        finally:
            if not draft.is_kept:
                shutil.rmtree(draft.folder, ignore_errors=True)

    def _clear_up(self) -> None:
        """Remove files that a kill left: uploads, and folders of jobs that were never queued."""
        for path in (self.settings.data / UPLOADS).iterdir():
            with suppress(OSError):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name in ("videos", "films"):
            for folder in (self.settings.data / name).iterdir():
                if self.jobs.get(folder.name) is None:
                    shutil.rmtree(folder, ignore_errors=True)


def fingerprint(fields: dict[str, Any]) -> str:
    """Return a hash of a request's fields; files count by their content."""
    def content(upload: Upload) -> dict[str, str]:
        return {"sha256": upload.sha256}

    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=content).encode()).hexdigest()
