"""A film and the files next to it: texts, storyboard and edit; those of a finished film stay."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vidgen.core.errors import InputError
from vidgen.core.protocols import OnEvent
from vidgen.core.runtime import atomic_write, check_output
from vidgen.media.probe import read_recipe
from vidgen.story.assemble import TEXT_SUFFIXES, assemble, texts_beside
from vidgen.story.edit import Edit
from vidgen.story.sounds import make_sounds
from vidgen.story.store import RenderedShot, ShotStore
from vidgen.story.storyboard import page_parts


class FilmExport:
    """A film to be made of planned shots, with the files next to it.

    Args:
        wanted: suffixes of files next to it: ".html", a storyboard, and ".otio", its edit.
        overwrite: replace what exists and differs.

    Raises:
        OutputError: a file in the way.
    """

    def __init__(
        self, edit: Edit, store: ShotStore, wanted: Sequence[str] = (), *, overwrite: bool = False
    ) -> None:
        self.edit, self.overwrite = edit, overwrite
        self.wanted = [edit.output.with_suffix(suffix) for suffix in wanted]
        plans = edit.film.in_film
        self.is_done = (
            all(store.is_done(plan) for plan in plans)
            and all(each.path.is_file() for each in edit.described)
            and _film_facts(edit.output).get("key") == edit.key(
                [store.take(plan).key for plan in plans]))
        for path in (edit.output, *texts_beside(edit), *self.wanted):
            check_output(path, overwrite=overwrite or self.is_done)

    def write(self, shots: Sequence[RenderedShot], tell: OnEvent) -> list[Path]:
        """Put the film of all rendered shots together; write and return the files next to it."""
        edit, by_id = self.edit, {each.shot.id: each for each in shots}
        shown = [by_id[placed.shot.id] for placed in edit.timeline.shots]
        files: dict[Path, Iterable[str]] = {}
        if self.is_done:
            tell({"event": "note", "text": f"{edit.output} is done already"})
            files |= {path: [text] for path, text in texts_beside(edit).items()}
        else:
            self._assemble(shown, tell)
        for path in self.wanted:
            if path.suffix == ".otio":
                from vidgen.story.otio import otio_text  # an optional package

                files[path] = [otio_text(edit, shown, path.parent)]
            else:
                files[path] = page_parts(edit, shown)
        for path, parts in files.items():
            self._write(path, parts, tell)
        return [*dict.fromkeys((*texts_beside(edit), *files))]

    def _assemble(self, shown: Sequence[RenderedShot], tell: OnEvent) -> None:
        edit, outdated = self.edit, list[Path]()
        shots = _film_facts(edit.output).get("script", {}).get("shots", ())
        if not edit.cues and any(shot["caption"] or shot["narration"] for shot in shots):
            texts = (edit.output.with_suffix(suffix) for suffix in TEXT_SUFFIXES)
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

    def _write(self, path: Path, parts: Iterable[str], tell: OnEvent) -> None:
        encoded = (part.encode() for part in parts)
        if self.is_done and not self.overwrite and path.exists():
            with path.open("rb") as file:
                same = all(file.read(len(part)) == part for part in encoded) and not file.read(1)
            if not same:
                tell({"event": "note", "text": f"{path} is there, differs from the film's own and "
                      "stays; --overwrite replaces it"})
            return
        atomic_write(path, lambda file: file.writelines(encoded))
        tell({"event": "written", "path": str(path)})


def _film_facts(output: Path) -> dict[str, Any]:
    try:
        recipe = read_recipe(output) if output.is_file() else None
    except InputError:
        return {}
    film: dict[str, Any] = (recipe or {}).get("film", {})
    return film
