"""A film and the files next to it: texts, storyboard and edit; those of a finished film stay."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from vidgen.core.errors import InputError
from vidgen.core.protocols import OnEvent
from vidgen.core.runtime import atomic_write, check_output
from vidgen.media.probe import read_recipe
from vidgen.story.assemble import TEXT_SUFFIXES, assemble, texts_beside
from vidgen.story.edit import Edit
from vidgen.story.sounds import make_sounds
from vidgen.story.store import RenderedShot, ShotStore
from vidgen.story.storyboard import page_parts


def check_export(
    edit: Edit, store: ShotStore, wanted: Sequence[str] = (), *, overwrite: bool = False
) -> bool:
    """Return whether the very film exists already; `wanted` as in `export_film`.

    Raises:
        OutputError: a file in the way of the film, or of a file next to it.
    """
    plans = edit.film.in_film
    is_done = (
        all(store.is_done(plan) for plan in plans)
        and all(each.path.is_file() for each in edit.described)
        and _film_facts(edit.output).get("key") == edit.key(
            [store.take(plan).key for plan in plans]))
    for path in (edit.output, *texts_beside(edit), *map(edit.output.with_suffix, wanted)):
        check_output(path, overwrite=overwrite or is_done)
    return is_done


def export_film(
    edit: Edit, shots: Sequence[RenderedShot], wanted: Sequence[str], tell: OnEvent, *,
    is_done: bool = False, overwrite: bool = False,
) -> list[Path]:
    """Put a film of all rendered shots together; write and return the files next to it.

    Args:
        wanted: suffixes of further files: ".html", a storyboard, and ".otio", the film's edit.
        is_done: whether the film exists; files next to it then stay.
        overwrite: replace files next to it all the same.
    """
    by_id = {each.shot.id: each for each in shots}
    shown = [by_id[placed.shot.id] for placed in edit.timeline.shots]
    files: dict[Path, Iterable[str]] = {}
    if is_done:
        tell({"event": "note", "text": f"{edit.output} is done already"})
        files |= {path: [text] for path, text in texts_beside(edit).items()}
    else:
        _assemble(edit, shown, tell)
    for path in map(edit.output.with_suffix, wanted):
        if path.suffix == ".otio":
            from vidgen.story.otio import otio_text  # an optional package

            files[path] = [otio_text(edit, shown, path.parent)]
        else:
            files[path] = page_parts(edit, shown)
    for path, parts in files.items():
        if not is_done or overwrite or not path.exists():
            atomic_write(path, partial(_put, parts))
            tell({"event": "written", "path": str(path)})
        elif not _holds(path, parts):
            tell({"event": "note", "text": f"{path} is there, differs from the film's own and "
                  "stays; --overwrite replaces it"})
    return [*dict.fromkeys((*texts_beside(edit), *files))]


def _assemble(edit: Edit, shown: Sequence[RenderedShot], tell: OnEvent) -> None:
    outdated = list[Path]()
    shots = _film_facts(edit.output).get("script", {}).get("shots", ())
    if not edit.cues and any(shot["caption"] or shot["narration"] for shot in shots):
        texts = map(edit.output.with_suffix, TEXT_SUFFIXES)
        outdated = [path for path in texts if path.is_file()]
    if edit.described:
        make_sounds(edit.described, tell)
    made = assemble(edit, shown, lambda done, total: tell(
        {"event": "progress", "stage": "assemble", "done": done, "total": total}))
    for text in made.notes:
        tell({"event": "note", "text": text})
    for path in (edit.output, *made.beside):
        tell({"event": "written", "path": str(path)})
    for path in outdated:
        path.unlink(missing_ok=True)
        tell({"event": "note", "text": f"{path} is removed; the film has no texts any more"})


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
