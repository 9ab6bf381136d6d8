"""The film that `vidgen script` makes of its shots, and the files next to it."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidgen.cli.report import Report
from vidgen.core.errors import InputError

if TYPE_CHECKING:
    from vidgen.story.edit import Describe, Edit
    from vidgen.story.film import FilmPlan
    from vidgen.story.store import RenderedShot, ShotStore


def add_exports(parser: ArgumentParser) -> None:
    """Declare the options for files next to the film."""
    parser.add_argument("--storyboard", action="store_true",
                        help="write a page of all shots beside the film, FILM.html")
    parser.add_argument("--otio", action="store_true",
                        help="write the edit for editing programs beside the film, FILM.otio")
    parser.add_argument("--audio-model", metavar="FOLDER",
                        help="a text-to-audio model makes sound and music that stand in words")


@dataclass(frozen=True)
class Making:
    """A film to be made.

    Attributes:
        edit: how.
        is_done: whether this very film lies there already.
        overwrite: whether files beside it that are there and differ are replaced.
        outdated: files of texts that an earlier version of the film left, and this one has not.
        storyboard: where its page is wanted, or None.
        otio: where its edit is wanted, or None.
    """

    edit: Edit
    is_done: bool
    overwrite: bool
    outdated: tuple[Path, ...]
    storyboard: Path | None
    otio: Path | None


def describing(args: Namespace, store: ShotStore) -> Describe | None:
    """Return the function that plans sounds in words for the edit, or None."""
    if args.audio_model is None:
        return None
    from vidgen.story.sounds import describe_sounds

    offload = "none" if args.offload == "auto" else args.offload
    return partial(describe_sounds, store.film, model=args.audio_model, folder=store.folder,
                   offload=offload)


def settle(film: FilmPlan, store: ShotStore, output: Path, args: Namespace) -> Making:
    """Plan a film before its shots are rendered; write nothing.

    Raises:
        InputError: shots, sounds or texts that don't go together.
        ModelError: an audio model that is none.
        OutputError: a file in the way.
    """
    from vidgen.core.runtime import check_output
    from vidgen.story.assemble import TEXT_SUFFIXES, texts_beside
    from vidgen.story.edit import make_edit

    edit = make_edit(film, film.in_film, output, describe=describing(args, store))
    is_done, texts = _is_there(edit, store), texts_beside(edit)
    outdated = [path for suffix in TEXT_SUFFIXES if (path := output.with_suffix(suffix)).is_file()]
    if is_done or texts or not _had_texts(output):
        outdated = []
    making = Making(edit, is_done, args.overwrite, tuple(outdated),
                    output.with_suffix(".html") if args.storyboard else None,
                    output.with_suffix(".otio") if args.otio else None)
    beside = [each for each in (making.storyboard, making.otio) if each is not None]
    for path in (output, *texts, *beside):
        check_output(path, overwrite=args.overwrite or is_done)
    return making


def make_film(making: Making, shots: Sequence[RenderedShot], report: Report) -> list[Path]:
    """Put a film together, and write the files next to it; return those."""
    from vidgen.story.assemble import assemble, texts_beside
    from vidgen.story.storyboard import page_parts

    by_id = {each.shot.id: each for each in shots}
    edit = making.edit
    shown = [by_id[placed.shot.id] for placed in edit.timeline.shots]

    def on_frames(done: int, total: int) -> None:
        report({"event": "progress", "stage": "assemble", "done": done, "total": total})

    files: dict[Path, Iterable[str]] = {}
    if making.is_done:
        report.note(f"{edit.output} is done already")
        files |= {path: [text] for path, text in texts_beside(edit).items()}
    else:
        if edit.described:
            from vidgen.story.sounds import make_sounds

            make_sounds(edit.described, report)
        made = assemble(edit, shown, on_frames)
        for text in made.notes:
            report.note(text)
        for path in (made.path, *made.beside):
            report.written(path)
        for path in making.outdated:
            path.unlink(missing_ok=True)
            report.note(f"{path} is removed; the film has no texts any more")
    if making.otio is not None:
        from vidgen.story.otio import otio_text

        files[making.otio] = [otio_text(edit, shown, making.otio.parent)]
    if making.storyboard is not None:
        files[making.storyboard] = page_parts(edit, shown)
    for path, parts in files.items():
        _lay_beside(path, parts, making, report)
    return [*dict.fromkeys((*texts_beside(edit), *files))]


def _lay_beside(path: Path, parts: Iterable[str], making: Making, report: Report) -> None:
    """Write a file next to the film; that of a finished film stays if it differs."""
    from vidgen.core.runtime import atomic_write

    encoded = (part.encode() for part in parts)
    if making.is_done and not making.overwrite and path.exists():
        if not _holds(path, encoded):
            report({"event": "note", "text": f"{path} is there, differs from the film's own and "
                    "stays; --overwrite replaces it"})
        return
    atomic_write(path, lambda file: file.writelines(encoded))
    report.written(path)


def _holds(path: Path, parts: Iterable[bytes]) -> bool:
    with path.open("rb") as file:
        return all(file.read(len(part)) == part for part in parts) and not file.read(1)


def _had_texts(output: Path) -> bool:
    """Return whether an existing film had files of texts."""
    from vidgen.media.probe import read_recipe

    try:
        recipe: Any = read_recipe(output) if output.is_file() else None
        shots = recipe["film"]["script"]["shots"]
        return any(shot["caption"] or shot["narration"] for shot in shots)
    except (InputError, KeyError, TypeError):
        return False


def _is_there(edit: Edit, store: ShotStore) -> bool:
    """Return whether this very film exists already."""
    from vidgen.media.probe import read_recipe

    plans = edit.film.in_film
    there = all(store.is_done(plan) for plan in plans)
    there = there and all(each.path.is_file() for each in edit.described)
    if not edit.output.is_file() or not there:
        return False
    try:
        made: Any = (read_recipe(edit.output) or {})["film"]["key"]
    except (InputError, KeyError, TypeError):
        return False
    return bool(made == edit.key([store.take(plan).key for plan in plans]))
