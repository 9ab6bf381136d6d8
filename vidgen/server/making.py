"""Generate the files of one queued clip or film with an engine.

A job that is started again continues from the files that exist. A script may only name files in
its own folder. See `layout.py` for the folder's files.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import logging
import re
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from vidgen.core.config import build, dump
from vidgen.core.config_file import load_yaml
from vidgen.core.errors import Cancelled, InputError, ModelError, OutputError, VidgenError
from vidgen.core.protocols import OnEvent
from vidgen.core.request import OWN_FILE, Request, Saving
from vidgen.core.runtime import atomic_write, available_memory, link, reuse_freed_memory
from vidgen.media.checks import as_data
from vidgen.media.ending import read_ending
from vidgen.media.probe import read_recipe
from vidgen.media.video_reader import VideoReader
from vidgen.pipeline.engine import load_own
from vidgen.pipeline.journal.job import SUFFIX, job_folder, remove_job
from vidgen.pipeline.journal.journal import Journal
from vidgen.pipeline.preview import as_webp
from vidgen.pipeline.recorded import lengthened
from vidgen.pipeline.types import Clock
from vidgen.pipeline.workers.clip_work import write_request
from vidgen.server.layout import (
    FILM,
    FILM_SHOTS,
    RECIPE,
    STORYBOARD,
    THUMBNAIL,
    VIDEO,
    files_of,
    shot_file,
)
from vidgen.server.types import CANCELLED, OPEN, MemoryFull
from vidgen.story.edit import make_edit
from vidgen.story.export import export_film
from vidgen.story.plan import estimates, plan_film
from vidgen.story.render import ShotWork, render_film
from vidgen.story.script import Script
from vidgen.story.store import RenderedShot, ShotStore
from vidgen.weights.lora import parse_option

if TYPE_CHECKING:
    from vidgen.media.clip import Clip
    from vidgen.pipeline.engine import Engine
    from vidgen.pipeline.types import Estimate, Preview
    from vidgen.story.film import FilmPlan
    from vidgen.weights.folder import ModelFolder

THUMBNAIL_SIDE = 512
PROGRESS_PAUSE_S = 0.1
"""Least time between two progress events of writing, in seconds; other stages report all."""
_REPORTED = re.compile(r"shot [\w-]+(?:, \d+ of \d+|: kept take seed .*)")
"""Pattern of notes that repeat progress and shots."""
log = logging.getLogger(__name__)


class Runner:
    """The work of the worker process: it opens a model once, then generates clips and films.

    A payload is a dict with `kind`: "open", "video" or "film"; the last two also have `folder`, the
    job's folder, and `spec`. The result of a job is a dict of facts; a cancelled job fails with
    `Cancelled`. Events of a job, each a dict:
        progress    stage, done, total and, if known, fraction, eta_s, shot
        preview     step, fps, image: an animation as a data URL
        shot        shot: facts of a finished shot of a film
        note        text
    """

    _engine: Engine

    def __init__(self, model: str) -> None:
        self._model = model

    def __call__(self, payload: dict[str, Any], on_event: OnEvent) -> dict[str, Any] | None:
        """Open the model, or run a job and return its facts.

        Raises:
            ModelError: the model can't be opened.
            VidgenError: the job failed, or was cancelled.
        """
        if payload["kind"] == OPEN:
            self._open()
            return None
        make = make_film if payload["kind"] == "film" else make_clip
        folder, report = Path(payload["folder"]), JobReporter(on_event)
        try:
            return make(self._engine, folder, payload["spec"], report) | report.facts()
        except Cancelled as error:
            for path in folder.rglob(f"*{SUFFIX}") if str(error) == CANCELLED else ():
                with suppress(OSError):
                    remove_job(path)
            raise
        except (InputError, ModelError, OutputError):
            raise
        except Exception as error:
            log.error("the job failed", exc_info=error)
            raise _failure(error) from None

    def _open(self) -> None:
        logging.getLogger().setLevel(logging.INFO)
        reuse_freed_memory()
        self._engine = load_own(self._model, "the service runs only vidgen's own models")


def _failure(error: Exception) -> VidgenError:
    """Return the error for clients in place of an internal one."""
    if isinstance(error, MemoryError):
        return MemoryFull("out of memory; request a smaller or shorter clip")
    if "out of memory" in str(error).lower():
        return MemoryFull("out of device memory; request a smaller or shorter clip")
    return VidgenError("the job failed; see the service's log")


class JobReporter:
    """Forwards a job's events for clients to `on_event`, and measures the job.

    Once `clock` is set, progress also has its fraction and the time left. `on_event` raises
    `Cancelled` to stop the job.
    """

    def __init__(self, on_event: OnEvent) -> None:
        self.clock: Clock | None = None
        self._on_event, self._last_event_s = on_event, 0.0
        self._start_s = time.monotonic()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak, if allowed

    def __call__(self, event: dict[str, Any]) -> None:
        """Forward an event, but not every frame's progress."""
        if event["event"] == "progress":
            stage, done, total = event["stage"], event["done"], event["total"]
            if self.clock is not None and stage not in ("assemble", "finish"):
                event = event | self.clock(stage, done, total, event.get("clip", 1))
            too_early = time.monotonic() - self._last_event_s < PROGRESS_PAUSE_S
            if stage in ("write", "assemble") and too_early and done < total:
                return
        elif event["event"] not in ("note", "shot") or _REPORTED.fullmatch(event.get("text", "")):
            return
        self._last_event_s = time.monotonic()
        self._on_event(event)

    def preview(self, shown: Preview) -> None:
        """Send a preview of the forming clip."""
        image = base64.b64encode(as_webp(shown)).decode()
        self._on_event({"event": "preview", "step": shown.step, "fps": float(shown.fps),
                        "image": f"data:image/webp;base64,{image}"})

    def facts(self) -> dict[str, Any]:
        """Return the seconds of the job, and its peak memory."""
        return {"inference_time_s": round(time.monotonic() - self._start_s, 3),
                "peak_memory_mb": round(_peak_memory() / 1e6, 1)}


def _peak_memory() -> int:
    """Return the peak memory in bytes since the last reset, or since the process began."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    with suppress(OSError, TypeError):
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])  # type: ignore[index]
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def make_clip(
    engine: Engine, folder: Path, spec: dict[str, Any], report: JobReporter
) -> dict[str, Any]:
    """Generate a clip, or continue an interrupted one, and return its facts.

    `spec` has `options`, fields of `Request` and `Saving` with paths relative to the job's folder,
    and `added_s` if it extends the clip in `prefix`.

    Raises:
        InputError: the request is invalid.
        Cancelled: `report` raised it.
    """
    output = folder / VIDEO
    request = request_of(folder, spec, engine.folder)
    clip = _written(engine, request, marks_of(spec), output, report)
    report({"event": "progress", "stage": "finish", "done": 0, "total": 1})
    write_thumbnail(output, folder / THUMBNAIL, clip.num_frames)
    recipe = read_recipe(output) or {}
    content = json.dumps(recipe, sort_keys=True).encode()
    atomic_write(folder / RECIPE, content)
    (width, height), plan = clip.size, recipe.get("plan", {})
    return {
        "width": width, "height": height, "num_frames": clip.num_frames, "fps": str(clip.fps),
        "seconds": float(clip.num_frames / clip.fps), "seed": plan.get("seed"),
        "sound": clip.sound is not None, "captions": clip.captions,
        "checks": as_data(clip.findings or []),
        "recipe_sha256": hashlib.sha256(content).hexdigest(),
    }


def _written(
    engine: Engine, request: Request, marks: Mapping[str, str], output: Path, report: JobReporter
) -> Clip:
    """Generate and write the clip; start again if the journal is of another version."""
    def on_estimate(made: Estimate) -> None:
        report.clock = Clock(made)

    write = partial(write_request, engine, request, output, report, {}, on_estimate=on_estimate,
                    on_preview=report.preview, marks=marks)
    continued = Journal(output, resume=True).unfinished
    try:
        return write()
    except InputError as error:
        if not continued:
            raise
        report({"event": "note", "text": f"the job starts again: {error}"})
        remove_job(job_folder(output))
        return write()


def make_film(
    engine: Engine, folder: Path, spec: dict[str, Any], report: JobReporter
) -> dict[str, Any]:
    """Generate a film, or continue an interrupted one, and return its facts.

    `spec` has `script`, its path relative to the job's folder, and `draft`. `report` also receives
    each finished shot.

    Raises:
        InputError: the script is invalid.
        Cancelled: `report` raised it.
    """
    film = plan_confined(folder / spec["script"], engine.folder, draft=spec["draft"],
                         dtype=engine.dtype)
    store = ShotStore(folder / FILM_SHOTS, film)
    report.clock = _clock(engine, store)
    work = ShotWork(lambda: engine, store, report.preview)
    shots = [_shown(each, store, folder, report)
             for each in render_film(work, [*film.shots.values()], report)]
    edit = make_edit(film, film.in_film, folder / FILM)
    files = export_film(edit, shots, [Path(STORYBOARD).suffix], report)
    facts = edit.facts()
    write_thumbnail(edit.output, folder / THUMBNAIL, facts["num_frames"])
    content = json.dumps(read_recipe(edit.output) or {}, sort_keys=True).encode()
    return {
        "width": film.size[0], "height": film.size[1], "num_frames": facts["num_frames"],
        "fps": facts["fps"], "seconds": facts["duration_s"], "timeline": facts["shots"],
        "shots": [shot_facts(each) for each in shots],
        "files": [path.name for path in files if path.name != STORYBOARD],
        "recipe_sha256": hashlib.sha256(content).hexdigest(),
    }


def _clock(engine: Engine, store: ShotStore) -> Clock | None:
    film, device = store.film, engine.device
    parts = store.left([*film.shots.values()])
    made = [*estimates(film, parts, device, available_memory(device), engine.offload)]
    return Clock(made) if made else None


def _shown(each: RenderedShot, store: ShotStore, folder: Path, report: JobReporter) -> RenderedShot:
    """Link a shot, and each of several takes, to its name for clients; add a thumbnail."""
    takes = store.film.shots[each.shot.id].takes
    paths = {shot_file(folder, each.shot.id): each.path}
    if len(takes) > 1:
        paths |= {shot_file(folder, each.shot.id, take.seed): store.path(take.key)
                  for take in takes}
    for shown, path in paths.items():
        thumbnail = shown.with_suffix(".webp")
        if each.made or not thumbnail.is_file():
            shown.parent.mkdir(exist_ok=True)
            link(path, shown)
            write_thumbnail(path, thumbnail, each.num_frames)
    report({"event": "shot", "shot": shot_facts(each)})
    return each


def plan_confined(path: Path, folder: ModelFolder, *, draft: bool, dtype: str | None) -> FilmPlan:
    """Plan a film whose script names no file outside its own folder, and no other model.

    Raises:
        InputError: the script names one, or has an invalid shot; with its line.
    """
    raw = load_yaml(path, "script")
    project, place = raw.get("project"), path.parent.resolve()
    model = project.get("model") if isinstance(project, dict) else None
    if model not in (None, folder.name):
        raise InputError(f"project: model is {model!r}, but this service has {folder.name!r}; "
                         "leave it out")
    for file in _named_files(build(Script, raw, "script")):  # before any is opened
        inside = (place / file).resolve().is_relative_to(place)
        if file.is_absolute() or not inside or str(file) in ("", "."):
            raise InputError(f"the script names the file {str(file)!r}; upload it and give only "
                             "its name")
    film = plan_film(Script.read(path), folder, draft=draft, dtype=dtype)
    if not film.in_film:
        raise InputError("every shot has in_film: false; a film needs at least one shot")
    make_edit(film, film.in_film, path.with_name(FILM))
    return film


def _named_files(value: Any) -> Iterator[Path]:
    """Yield every file that a script names."""
    if isinstance(value, Path):
        yield value
    elif is_dataclass(value) and not isinstance(value, type):
        for each in fields(value):
            inner = getattr(value, each.name)
            if each.name == "lora":
                yield from (parse_option(text).path for text in inner)
            elif each.name == "text" and isinstance(inner, str) and inner.startswith(OWN_FILE):
                yield Path(inner.removeprefix(OWN_FILE))
            else:
                yield from _named_files(inner)
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _named_files(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _named_files(inner)


def script_data(script: Script) -> dict[str, Any]:
    """Return a script as JSON data, without defaults filled in."""
    data = json.dumps(load_yaml(script.path, "script"))
    return dict(json.loads(data, parse_constant=str))


def marks_of(spec: Mapping[str, Any]) -> dict[str, str]:
    """Return the marks of origin that a spec requests."""
    marks = {name: value for name, value in spec["options"].items() if name in Saving.model_fields}
    return Saving(**marks).marks


def request_of(folder: Path, spec: dict[str, Any], model: ModelFolder) -> Request:
    """Return the request of a spec, with its files in the job's folder.

    Raises:
        InputError: a value is invalid, or the clip in `prefix` can't be continued.
    """
    options = spec["options"] | files_of(folder, spec["options"])
    options = {name: value for name, value in options.items() if name not in Saving.model_fields}
    added_s = spec.get("added_s")
    if added_s is None:
        return Request.of(options.pop("prompt"), options)
    clip = options.pop("prefix")
    request = lengthened(clip, read_ending(clip), options, added_s, model)
    return request.replace(lora=options.get("lora", ()))  # an uploaded recipe may name no files


def write_thumbnail(video: Path, thumbnail: Path, num_frames: int) -> None:
    """Write the frame at a third of a clip as WebP."""
    with VideoReader(video) as reader:
        frame = next(islice(reader, num_frames // 3, None))
    picture, file = Image.fromarray(frame), io.BytesIO()
    picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    picture.save(file, "WEBP", quality=85)
    atomic_write(thumbnail, file.getvalue())


def shot_facts(each: RenderedShot) -> dict[str, Any]:
    """Return the facts of a finished shot for clients."""
    data = each.as_data()
    return {name: data[name] for name in (
        "id", "num_frames", "duration_s", "seed", "made", "checks", "choice")}


def planned_shots(film: FilmPlan) -> list[dict[str, Any]]:
    """Return the facts of a film's planned shots."""
    return [
        {"id": plan.shot.id, "prompt": [dump(each) for each in plan.shot.prompt],
         "num_frames": plan.num_frames, "seconds": float(plan.num_frames / film.fps),
         "takes": len(plan.takes), "seed": plan.takes[0].seed, "in_film": plan.shot.in_film}
        for plan in film.shots.values()
    ]
