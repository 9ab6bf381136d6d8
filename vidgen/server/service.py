"""The service without HTTP: from a body's fields to a job in the queue."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio

from vidgen.core.errors import OutputError
from vidgen.core.request import OWN_AUDIO
from vidgen.core.runtime import link
from vidgen.server.checker import Checker
from vidgen.server.errors import ApiError
from vidgen.server.hub import Hub
from vidgen.server.jobs import Jobs
from vidgen.server.keys import Crowd, Keys, Pace
from vidgen.server.layout import INPUTS, lay_down, take_over
from vidgen.server.metrics import Metrics
from vidgen.server.requests import Place, Translator, parse
from vidgen.server.scheduler import Scheduler
from vidgen.server.schema import EditAsk, ExtensionAsk, FilmAsk, RemixAsk, VideoAsk
from vidgen.server.settings import Settings
from vidgen.server.types import Job, Kind, NewJob, Upload, new_id

EDIT_STRENGTH = 0.7
CHECKED_AT_ONCE = 16
"""Requests in threads that are checked or wait for an address; others wait for a thread."""
_RIVALS = (("seconds", "frames"), ("image", "video"))


@dataclass(frozen=True)
class Call:
    """The caller of a request.

    Attributes:
        owner: the key's name.
        idempotency_key: the client's own.
        is_retry: whether the client says that it retries.
        arrived_at: when the request began to come in, by the queue's clock.
    """

    owner: str
    idempotency_key: str | None = None
    is_retry: bool = False
    arrived_at: float = 0.0


class Service:
    """The parts of one service."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        for name in ("videos", "films", "uploads"):
            (settings.data / name).mkdir(parents=True, exist_ok=True)
        self.jobs, self.keys = Jobs(settings.database), Keys(settings.keys)
        self.hub, self.metrics = Hub(), Metrics()
        self.metrics.watch_queue(self.jobs.counts)
        self.pace, self.crowd = Pace(settings.limits.per_minute), Crowd(settings.limits.at_once)
        self.scheduler = Scheduler(settings, self.jobs, self.hub, self.metrics)
        self.checked_at_once = anyio.CapacityLimiter(CHECKED_AT_ONCE)
        self.model: dict[str, Any] = {}
        self.asks = Translator(settings, self.jobs, "")

    def start(self) -> None:
        """Open the model, clean up after an earlier run, begin.

        Raises:
            ModelError: the model can't be opened.
        """
        self.checker = Checker(self.settings.model, self.settings.limits)
        self.model = self.checker.model()
        self.asks.model = self.model["name"]
        self._clear_up()
        self.scheduler.start()

    def stop(self, patience_s: float) -> None:
        """Finish or pause the running job, and end."""
        self.scheduler.drain(patience_s)
        self.hub.close()
        self.jobs.close()

    def video(self, fields: dict[str, Any], call: Call) -> Job:
        """POST /v1/videos."""
        ask = parse(VideoAsk, fields)
        with self._new("video") as place:
            options = self.asks.options(ask) | self.asks.inputs(ask, call.owner, place)
            return self._submit(place, call, fields, "create", options)

    def remix(self, source: Job, fields: dict[str, Any], call: Call) -> Job:
        """POST /v1/videos/{id}/remix: the source's own request, some of it changed."""
        ask = parse(RemixAsk, fields)
        return self._again(source, fields, call, "remix", ask)

    def replay(self, source: Job, call: Call) -> Job:
        """POST /v1/videos/{id}/replay: the very same request."""
        return self._again(source, {}, call, "replay", None)

    def edit(self, fields: dict[str, Any], call: Call) -> Job:
        """POST /v1/videos/edits: a clip re-imagined."""
        ask = parse(EditAsk, fields)
        with self._new("video") as place:
            options = self.asks.options(ask) | self.asks.inputs(ask, call.owner, place)
            options["video"] = self.asks.lay_down(ask.video, "video", call.owner, place, "video")
            options.setdefault("strength", EDIT_STRENGTH)
            return self._submit(place, call, fields, "edit", options, source=_id_of(ask.video))

    def extend(self, fields: dict[str, Any], call: Call) -> Job:
        """POST /v1/videos/extensions: a clip that goes on."""
        ask = parse(ExtensionAsk, fields)
        with self._new("video") as place:
            options = self.asks.options(ask) | self.asks.inputs(ask, call.owner, place)
            options.pop("seconds")
            if ask.seed is None:
                options.pop("seed")  # the clip's own goes on
            options["prefix"] = self.asks.lay_down(ask.video, "video", call.owner, place, "video")
            source = _id_of(ask.video)
            if source is not None and (found := self.jobs.get(source, call.owner)):
                options |= {k: found.spec["options"][k] for k in ("lora",)
                            if k in found.spec["options"]}
            return self._submit(place, call, fields, "extension", options, source=source,
                                added_s=ask.seconds)

    def film(self, fields: dict[str, Any], call: Call) -> Job:
        """POST /v1/films."""
        ask = parse(FilmAsk, fields)
        with self._new("film") as place:
            plan, script = self._film_plan(ask, call, place)
            echo = {
                **{name: plan[name] for name in ("shots", "width", "height", "fps", "seconds",
                                                 "title", "script")},
                "model": self.model["name"], "draft": ask.draft, "previous": ask.previous_film_id,
            }
            spec = {"script": f"{INPUTS}/{script.name}", "draft": ask.draft}
            new = self._new_job(place, call, fields, "film", echo, spec, plan["expected_s"])
            return self._queue(new, place)

    def check_film(self, fields: dict[str, Any], call: Call) -> dict[str, Any]:
        """POST /v1/films/check: what a script would make; nothing is kept."""
        ask = parse(FilmAsk, fields)
        with self._new("film") as place:
            plan, _ = self._film_plan(ask, call, place)
        return {
            "title": plan["title"], "shots": plan["shots"], "seconds": plan["seconds"],
            "size": f"{plan['width']}x{plan['height']}", "fps": plan["fps"],
            "expected_s": round(plan["expected_s"], 1), "notes": plan["notes"],
            "script": plan["script"],
        }

    def check_room(self) -> None:
        """Refuse new work while the disk is nearly full.

        Raises:
            OutputError: it is.
        """
        free = shutil.disk_usage(self.settings.data).free
        if free < self.settings.reserve_bytes:
            raise OutputError(f"{free >> 20} MB are free, {self.settings.reserve_bytes >> 20} MB "
                              "stay in reserve; delete clips, or make room on the disk")

    def _film_plan(self, ask: FilmAsk, call: Call, place: Place) -> (
        tuple[dict[str, Any], Path]
    ):
        """Return a film's plan, and its script in the job's folder."""
        self.asks.check_model(ask.model)
        path = lay_down(ask, place.folder)
        if ask.previous_film_id is not None:
            before = self.jobs.get(ask.previous_film_id, call.owner)
            if before is None or before.kind != "film":
                raise ApiError(404, "not_found", f"there is no film {ask.previous_film_id!r}",
                               "previous_film_id")
            take_over(self.settings.job_folder(before.id), place.folder)
        return self.checker.film(path, ask.draft), path

    def _again(
        self, source: Job, fields: dict[str, Any], call: Call, kind: str, ask: Any
    ) -> Job:
        """Queue a clip with another one's request, some of it changed."""
        with self._new("video") as place:
            options = dict(source.spec["options"])
            before = self.settings.job_folder(source.id) / INPUTS
            if before.is_dir():
                for path in before.iterdir():
                    link(path, place.inputs / path.name)
            if ask is not None:
                changes = self.asks.options(ask) | self.asks.inputs(ask, call.owner, place)
                if ask.seed is None:
                    changes.pop("seed")
                if not changes:
                    raise ApiError(400, "missing_parameter", "nothing is changed; give a prompt or "
                                   "another field, or ask for a replay", "prompt")
                for pair in _RIVALS:
                    if not changes.keys().isdisjoint(pair):
                        options = {k: v for k, v in options.items() if k not in pair}
                options |= changes
            added_s = source.spec.get("added_s")
            if added_s is not None and ask is not None and ask.seconds is not None:
                added_s = ask.seconds
            return self._submit(place, call, fields, kind, options, source=source.id,
                                added_s=added_s)

    def _submit(
        self, place: Place, call: Call, fields: dict[str, Any], kind: str,
        options: dict[str, Any], *, source: str | None = None, added_s: float | None = None,
    ) -> Job:
        """Have a clip checked, and queue it."""
        if "video" in options and "strength" not in options:
            raise ApiError(400, "missing_parameter", "a clip to start from needs the field "
                           "strength; give 0, which keeps it, to 1, or leave the clip out",
                           "strength")
        if options.get("audio") == OWN_AUDIO and not self.model["makes_sound"]:
            raise ApiError(400, "invalid_request", f"generate_sound is true, but the model "
                           f"{self.model['name']!r} makes no sound; leave it out",
                           "generate_sound")
        spec: dict[str, Any] = {"options": options}
        if added_s is not None:
            spec["added_s"] = added_s
        plan = self.checker.clip(place.folder, spec)
        options["seed"] = plan["seed"]
        echo = {
            **{name: plan[name] for name in ("prompt", "width", "height", "num_frames", "fps",
                                             "num_steps", "seconds", "seed", "guidance",
                                             "negative")},
            "kind": kind, "model": self.model["name"], "source": source,
            "remixed_from": source if kind == "remix" else None,
        }
        known = {"kind": kind, "source": source, **fields}
        new = self._new_job(place, call, known, "video", echo, spec, plan["expected_s"])
        return self._queue(new, place)

    def _new_job(
        self, place: Place, call: Call, fields: dict[str, Any], kind: Kind,
        echo: dict[str, Any], spec: dict[str, Any], expected_s: float,
    ) -> NewJob:
        return NewJob(
            kind, call.owner, echo, spec, fingerprint(fields), expected_s, call.idempotency_key,
            call.is_retry, call.arrived_at, id=place.id,
        )

    def _queue(self, new: NewJob, place: Place) -> Job:
        limits = self.settings.limits
        job, is_new = self.jobs.add(new, most=limits.queued, most_of_owner=limits.pending)
        if is_new:
            place.is_kept = True
            self.scheduler.wake()
        return job

    @contextmanager
    def _new(self, kind: Kind) -> Iterator[Place]:
        """Make a folder for a new job; it is removed unless the job is queued."""
        job_id = new_id(kind)
        place = Place(job_id, self.settings.job_folder(job_id))
        try:
            place.inputs.mkdir(parents=True)
            yield place
        except OSError as error:
            raise OutputError(f"a job can't be kept: {error.strerror}") from error
        finally:
            if not place.is_kept:
                shutil.rmtree(place.folder, ignore_errors=True)

    def _clear_up(self) -> None:
        """Remove leftovers of a kill: uploads, and folders of jobs that were never queued."""
        for path in self.settings.uploads.iterdir():
            with suppress(OSError):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name in ("videos", "films"):
            for folder in (self.settings.data / name).iterdir():
                if self.jobs.get(folder.name) is None:
                    shutil.rmtree(folder, ignore_errors=True)


def fingerprint(fields: dict[str, Any]) -> str:
    """Return a hash of a request; files count by their content."""
    def plain(value: Any) -> Any:
        if isinstance(value, Upload):
            return {"sha256": value.sha256}
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        return [plain(inner) for inner in value] if isinstance(value, list) else value

    text = json.dumps(plain(fields), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _id_of(reference: Any) -> str | None:
    return reference["id"] if isinstance(reference, dict) else None
