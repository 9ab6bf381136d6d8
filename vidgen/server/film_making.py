"""One film of the queue: its script read and confined, its shots rendered, put together.

A script names files in its own folder alone. `layout.py` says where files lie.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidgen.core.config import build, dump
from vidgen.core.config_file import load_yaml
from vidgen.core.errors import InputError
from vidgen.core.protocols import OnEvent
from vidgen.core.request import OWN_FILE
from vidgen.core.runtime import available_memory, link
from vidgen.media.probe import read_recipe
from vidgen.pipeline.eta import Clock
from vidgen.server.layout import FILM, FILM_SHOTS, SHOTS, STORYBOARD, THUMBNAIL, shot_file
from vidgen.server.making import Stopwatch, write_stills
from vidgen.story.assemble import assemble
from vidgen.story.edit import make_edit
from vidgen.story.plan import estimates, plan_film
from vidgen.story.render import ShotWork, render_film
from vidgen.story.script import Script
from vidgen.story.store import RenderedShot, ShotStore
from vidgen.story.storyboard import write_storyboard
from vidgen.weights.lora import parse_option

if TYPE_CHECKING:
    from vidgen.pipeline.engine import Engine
    from vidgen.pipeline.types import OnPreview
    from vidgen.story.film import FilmPlan
    from vidgen.weights.folder import ModelFolder

LISTS = (".txt",)
_TOLD = re.compile(r"shot [\w-]+(?:, \d+ of \d+|: of \d+ takes .*)")
"""Notes that repeat progress and shots."""


def read_confined(path: Path, model: str) -> Script:
    """Read a script that names no file outside its own folder, and no other model.

    Raises:
        InputError: it names one, or is no script.
    """
    if path.suffix not in LISTS:  # before the files are looked for: whether they exist is told
        raw = load_yaml(path, "script")
        project = raw.get("project")
        asked = project.get("model") if isinstance(project, dict) else None
        if asked not in (None, model):
            raise InputError(f"project: model is {asked!r}; this service has {model!r}: leave it "
                             "out")
        for file in _named_files(build(Script, raw, "script")):
            _require_inside(path.parent, file)
    return Script.read(path)


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


def _require_inside(folder: Path, file: Path) -> None:
    inside = (folder / file).resolve().is_relative_to(folder.resolve())
    if file.is_absolute() or not inside or str(file) in ("", "."):
        raise InputError(f"the script names the file {str(file)!r}; send it along and give its "
                         "name alone")


def plan_confined(path: Path, folder: ModelFolder, *, draft: bool, dtype: str | None) -> FilmPlan:
    """Plan a film by its confined script.

    Raises:
        InputError: a shot that can't be made, with its line.
    """
    film = plan_film(read_confined(path, folder.name), folder, draft=draft, dtype=dtype)
    if not film.in_film:
        raise InputError("every shot has in_film: false; a film needs one")
    make_edit(film, film.in_film, path.with_name(FILM))
    return film


def script_data(script: Script) -> dict[str, Any]:
    """Return a script as it was written, as JSON data that makes the same film."""
    if script.path.suffix in LISTS:
        return {"shots": [{"id": shot.id, "prompt": shot.prompt[0].prompt}
                          for shot in script.shots]}
    data = json.dumps(load_yaml(script.path, "script"))
    return dict(json.loads(data, parse_constant=str))


class FilmMaker:
    """Makes the films of one engine; `tell` as of `Maker` gets each finished shot, too."""

    def __init__(self, engine: Engine, tell: OnEvent) -> None:
        self.engine, self._tell = engine, tell
        self._watch, self._clock = Stopwatch(), list[Clock]()

    def make(self, folder: Path, spec: dict[str, Any], on_preview: OnPreview) -> dict[str, Any]:
        """Make a film, or go on with it, and return its facts.

        `spec` has `script`, its path from the job's folder, and `draft`.

        Raises:
            InputError: a film that can't be made.
            Cancelled: by `tell`.
        """
        self._watch = Stopwatch()
        film = plan_confined(folder / spec["script"], self.engine.folder, draft=spec["draft"],
                             dtype=self.engine.dtype)
        output = folder / FILM
        store = ShotStore(folder / FILM_SHOTS, film)
        self._expect(store)
        shots = list(self._shots(store, folder, on_preview))
        edit = make_edit(film, film.in_film, output)
        by_id = {each.shot.id: each for each in shots}
        shown = [by_id[placed.shot.id] for placed in edit.timeline.shots]
        made = assemble(edit, shown, lambda done, total: self._report("assemble", done, total))
        write_storyboard(edit, shown, folder / STORYBOARD)
        facts = edit.facts()
        write_stills(output, folder / THUMBNAIL, None, facts["num_frames"])
        content = json.dumps(read_recipe(output) or {}, sort_keys=True).encode()
        return {
            "width": film.size[0], "height": film.size[1], "num_frames": facts["num_frames"],
            "fps": facts["fps"], "seconds": facts["duration_s"], "timeline": facts["shots"],
            "shots": [shot_facts(each) for each in shots], "notes": list(made.notes),
            "files": [path.name for path in made.beside],
            "recipe_sha256": hashlib.sha256(content).hexdigest(), **self._watch.facts(),
        }

    def _shots(
        self, store: ShotStore, folder: Path, on_preview: OnPreview
    ) -> Iterator[RenderedShot]:
        """Render missing shots, and link each under its id with a thumbnail."""
        work = ShotWork(lambda: self.engine, store, on_preview)
        (folder / SHOTS).mkdir(exist_ok=True)
        for each in render_film(work, list(store.film.shots.values()), self._on_event):
            name, plan = each.shot.id, store.film.shots[each.shot.id]
            self._show(each.path, shot_file(folder, name), each)
            for take in plan.takes if len(plan.takes) > 1 else ():
                self._show(store.path(take.key), shot_file(folder, name, take.seed), each)
            self._tell({"event": "shot", "shot": shot_facts(each)})
            yield each

    @staticmethod
    def _show(path: Path, shown: Path, shot: RenderedShot) -> None:
        """Link a shot, or a take of it, under a name that clients know, with a thumbnail."""
        thumbnail = shown.with_suffix(".webp")
        if shot.made or not thumbnail.is_file():
            link(path, shown)
            write_stills(path, thumbnail, None, shot.num_frames)

    def _expect(self, store: ShotStore) -> None:
        film, device = store.film, self.engine.device
        parts = store.left([*film.shots.values()])
        made = [*estimates(film, parts, device, available_memory(device), self.engine.offload)]
        self._clock = [Clock(made, len(parts), one_by_one=True)] if made else []

    def _on_event(self, event: dict[str, Any]) -> None:
        if event["event"] == "progress":
            self._report(event["stage"], event["done"], event["total"], event["clip"],
                         event["shot"])
        elif event["event"] == "note" and not _TOLD.fullmatch(event["text"]):
            self._tell(event)

    def _report(
        self, stage: str, done: int, total: int, clip: int = 1, shot: str | None = None
    ) -> None:
        self._watch(stage)
        told = self._clock[-1](stage, done, total, clip) if self._clock and shot else {}
        self._tell({"event": "progress", "stage": stage, "done": done, "total": total,
                    "shot": shot, **told})


def shot_facts(each: RenderedShot) -> dict[str, Any]:
    """Return the facts of a finished shot for clients."""
    data = each.as_data()
    return {name: data[name] for name in (
        "id", "num_frames", "duration_s", "seed", "made", "checks", "choice")}


def planned_shots(film: FilmPlan) -> list[dict[str, Any]]:
    """Return the facts of a film's shots before they are made."""
    return [
        {"id": plan.shot.id, "prompt": [dump(each) for each in plan.shot.prompt],
         "num_frames": plan.num_frames, "seconds": float(plan.num_frames / film.fps),
         "takes": len(plan.takes), "seed": plan.takes[0].seed, "in_film": plan.shot.in_film}
        for plan in film.shots.values()
    ]
