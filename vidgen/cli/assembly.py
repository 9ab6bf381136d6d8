"""The film that `vidgen script` makes of its shots, and the files beside it."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidgen.cli.report import Report
from vidgen.core.errors import InputError

if TYPE_CHECKING:
    from vidgen.story.edit import Describe, Edit
    from vidgen.story.film import FilmPlan
    from vidgen.story.render import RenderedShot, Store


def add_exports(parser: ArgumentParser) -> None:
    """Declare the options for files beside the film."""
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
        storyboard: where its page is wanted, or None.
        otio: where its edit is wanted, or None.
    """

    edit: Edit
    is_done: bool
    storyboard: Path | None
    otio: Path | None


def describing(args: Namespace, store: Store) -> Describe | None:
    """What tells the edit which sounds are to be made of words, if any are."""
    if args.audio_model is None:
        return None
    from vidgen.story.sounds import describe_sounds

    offload = "none" if args.offload == "auto" else args.offload
    return partial(describe_sounds, store.film, model=args.audio_model, folder=store.folder,
                   offload=offload)


def settle(film: FilmPlan, store: Store, output: Path, args: Namespace) -> Making:
    """Settle a film before its shots are rendered; nothing is written.

    Raises:
        InputError: shots, sounds or texts that don't go together.
        ModelError: an audio model that is none.
        OutputError: a file in the way.
    """
    from vidgen.core.runtime import check_output
    from vidgen.story.assemble import text_files
    from vidgen.story.edit import make_edit

    edit = make_edit(film, film.in_film, output, describe=describing(args, store))
    is_done = _is_there(edit, store)
    making = Making(edit, is_done, output.with_suffix(".html") if args.storyboard else None,
                    output.with_suffix(".otio") if args.otio else None)
    if not is_done:
        beside = [each for each in (making.storyboard, making.otio) if each is not None]
        for path in (output, *text_files(edit), *beside):
            check_output(path, overwrite=args.overwrite)
    return making


def make_film(making: Making, shots: Sequence[RenderedShot], report: Report) -> list[Path]:
    """Put a film together, and write what is wanted beside it; the latter files."""
    from vidgen.story.assemble import assemble, write_texts
    from vidgen.story.otio import write_otio
    from vidgen.story.storyboard import write_storyboard

    by_id = {each.shot.id: each for each in shots}
    edit = making.edit
    shown = [by_id[placed.shot.id] for placed in edit.timeline.shots]

    def on_frames(done: int, total: int) -> None:
        report({"event": "progress", "stage": "assemble", "done": done, "total": total})

    if making.is_done:
        report({"event": "note", "text": f"{edit.output} is done already"})
        beside = list(write_texts(edit))
    else:
        if edit.described:
            from vidgen.story.sounds import make_sounds

            make_sounds(edit.described, report)
        made = assemble(edit, shown, on_frames)
        for text in made.notes:
            report({"event": "note", "text": text})
        beside = list(made.beside)
        report({"event": "written", "path": str(made.path)})
    if making.otio is not None:
        beside.append(write_otio(edit, shown, making.otio))
    if making.storyboard is not None:
        beside.append(write_storyboard(edit, shown, making.storyboard))
    for path in beside:
        report({"event": "written", "path": str(path)})
    return beside


def _is_there(edit: Edit, store: Store) -> bool:
    """Whether this very film lies there already."""
    from vidgen.media.read import read_recipe

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
