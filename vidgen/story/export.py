"""A film and the files next to it: texts, storyboard and edit; those of a finished film stay.

The storyboard is a page: of every shot three frames, its prompts, seed, times, sound and warnings.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from vidgen import __version__
from vidgen.core import pages
from vidgen.core.errors import InputError
from vidgen.core.protocols import OnEvent
from vidgen.core.runtime import atomic_write, check_output
from vidgen.media.probe import read_recipe
from vidgen.media.video_reader import VideoReader
from vidgen.story.assemble import TEXT_SUFFIXES, assemble, text_files
from vidgen.story.edit import Edit
from vidgen.story.elements import ShotFrame
from vidgen.story.script import Shot
from vidgen.story.sounds import make_sounds
from vidgen.story.store import RenderedShot, ShotStore
from vidgen.story.timeline import Placed

_LONG_SIDE = 240  # of a thumbnail, in pixels


def check_export(
    edit: Edit, store: ShotStore, wanted: Sequence[str] = (), *, overwrite: bool = False
) -> bool:
    """Return whether this film exists already; `wanted` as in `export_film`.

    Raises:
        OutputError: the film, or a file next to it, exists or can't be written.
    """
    plans = edit.film.in_film
    is_done = (
        all(store.is_done(plan) for plan in plans)
        and all(each.path.is_file() for each in edit.described)
        and _film_facts(edit.output).get("key") == edit.key(
            [store.take(plan).key for plan in plans]))
    for path in (edit.output, *text_files(edit), *map(edit.output.with_suffix, wanted)):
        check_output(path, overwrite=overwrite or is_done)
    return is_done


def export_film(
    edit: Edit, shots: Sequence[RenderedShot], wanted: Sequence[str], on_event: OnEvent, *,
    is_done: bool = False, overwrite: bool = False,
) -> list[Path]:
    """Join all rendered shots to a film; write and return the files next to it.

    Args:
        wanted: suffixes of further files: ".html", a storyboard, and ".otio", the film's edit.
        is_done: whether the film exists; files next to it then stay.
        overwrite: replace files next to it all the same.
    """
    by_id = {each.shot.id: each for each in shots}
    shown = [by_id[placed.shot.id] for placed in edit.timeline.shots]
    files: dict[Path, Iterable[str]] = {}
    if is_done:
        on_event({"event": "note", "text": f"{edit.output} is done already"})
        files |= {path: [text] for path, text in text_files(edit).items()}
    else:
        _assemble(edit, shown, on_event)
    for path in map(edit.output.with_suffix, wanted):
        if path.suffix == ".otio":
            from vidgen.story.otio import otio_text  # an optional package

            files[path] = [otio_text(edit, shown, path.parent)]
        else:
            files[path] = page_parts(edit, shown)
    for path, parts in files.items():
        if not is_done or overwrite or not path.exists():
            atomic_write(path, partial(_put, parts))
            on_event({"event": "written", "path": str(path)})
        elif not _holds(path, parts):
            on_event({"event": "note", "text": f"{path} exists and differs from "
                  "the film's; --overwrite replaces it"})
    return [*dict.fromkeys((*text_files(edit), *files))]


def _assemble(edit: Edit, shown: Sequence[RenderedShot], on_event: OnEvent) -> None:
    outdated = list[Path]()
    shots = _film_facts(edit.output).get("script", {}).get("shots", ())
    if not edit.cues and any(shot["caption"] or shot["narration"] for shot in shots):
        texts = map(edit.output.with_suffix, TEXT_SUFFIXES)
        outdated = [path for path in texts if path.is_file()]
    if edit.described:
        make_sounds(edit.described, on_event)
    made = assemble(edit, shown, lambda done, total: on_event(
        {"event": "progress", "stage": "assemble", "done": done, "total": total}))
    for text in made.notes:
        on_event({"event": "note", "text": text})
    for path in (edit.output, *made.files):
        on_event({"event": "written", "path": str(path)})
    for path in outdated:
        path.unlink(missing_ok=True)
        on_event({"event": "note", "text": f"{path} was removed; the film has no texts any more"})


def _put(parts: Iterable[str], file: BinaryIO) -> None:
    file.writelines(part.encode() for part in parts)


def _holds(path: Path, parts: Iterable[str]) -> bool:
    encoded = (part.encode() for part in parts)
    with path.open("rb") as file:
        return all(file.read(len(part)) == part for part in encoded) and not file.read(1)


def _film_facts(output: Path) -> dict[str, Any]:
    try:
        recipe = read_recipe(output) if output.is_file() else None
    except InputError:
        return {}
    film: dict[str, Any] = (recipe or {}).get("film", {})
    return film


def page_parts(edit: Edit, shots: Sequence[RenderedShot]) -> Iterator[str]:
    """Yield the page's text, from its beginning to its end; read one shot at a time."""
    script, timeline, film = edit.film.script, edit.timeline, edit.film
    found = sum(len(shot.findings) for shot in shots)
    facts = (
        f"{len(shots)} shots, {timeline.seconds(timeline.num_frames):.2f} s, "
        f"{film.size[0]}x{film.size[1]} at {film.fps} fps, model {film.folder.name}, "
        f"vidgen {__version__}, {found} {'warning' if found == 1 else 'warnings'}")
    return pages.page_parts(
        "storyboard", title=script.project.title or script.path.stem, facts=facts,
        placings=timeline.shots, shots=_shots(edit, shots))


def _shots(edit: Edit, shots: Sequence[RenderedShot]) -> Iterator[dict[str, Any]]:
    film, scene = edit.film, None
    for placed, rendered in zip(edit.timeline.shots, shots, strict=True):
        shot, title = placed.shot, ""
        if shot.scene is not None and shot.scene != scene:
            title = film.script.scenes[shot.scene].title or shot.scene
        scene = shot.scene
        yield {
            "id": shot.id, "scene": title, "thumbnails": _thumbnails(rendered),
            "prompts": [(each.at, film.words(shot, index))
                        for index, each in enumerate(shot.prompt)],
            "facts": _facts(edit, placed, rendered), "findings": rendered.findings}


def _facts(edit: Edit, placed: Placed, rendered: RenderedShot) -> Iterator[tuple[str, str]]:
    seconds = edit.timeline.seconds
    yield "time", (f"{seconds(placed.start):.2f} to {seconds(placed.end):.2f} s, "
                   f"{placed.num_frames} frames")
    yield "seed", str(rendered.seed)
    if placed.overlap:
        yield "from before", f"{placed.transition.type}, {seconds(placed.overlap):.2f} s"
    if rendered.choice is not None:
        yield "take", f"{len(rendered.choice['takes'])} made; {rendered.choice['why']}"
    yield from _texts(rendered.shot)
    yield "file", rendered.path.name


def _texts(shot: Shot) -> Iterator[tuple[str, str]]:
    if shot.negative:
        yield "without", shot.negative
    if shot.continue_from:
        yield "continues", shot.continue_from
    for term, frame in (("begins with", shot.first_frame), ("ends with", shot.last_frame)):
        if frame is not None:
            if isinstance(frame, ShotFrame):
                yield term, f"the {frame.frame} frame of {frame.shot}"
            else:
                yield term, str(frame)
    if shot.sound is not None:
        yield "sound", shot.sound.effects or str(shot.sound.file)
    if shot.music is not None:
        yield "music", shot.music.prompt or str(shot.music.file)
    for line in shot.narration:
        yield "narration", f"{line.speaker}: {line.text}" if line.speaker else line.text
    for caption in shot.caption:
        yield "caption", caption.text


def _thumbnails(shot: RenderedShot) -> Iterator[tuple[str, str]]:
    wanted = {0: "first frame", shot.num_frames // 2: "middle", shot.num_frames - 1: "last frame"}
    with VideoReader(shot.path) as reader:
        for number, frame in enumerate(reader):
            if number in wanted:
                image, file = Image.fromarray(frame), io.BytesIO()
                image.thumbnail((_LONG_SIDE, _LONG_SIDE), Image.Resampling.LANCZOS)
                image.save(file, "JPEG", quality=82)
                yield wanted[number], base64.b64encode(file.getvalue()).decode()
