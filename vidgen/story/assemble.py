"""Rendered shots into one film: picture, sound, texts, chapters and recipe, in a stream.

Shots are copied where they can be; the rest is encoded in pieces of closed groups of pictures,
which lie next to the output until all are joined. So memory is bounded, the same shots give the
same file, and a film whose writing was killed is written again from the start.
"""

from __future__ import annotations

import glob
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from secrets import token_hex
from shutil import rmtree
from typing import Any

from vidgen import __version__
from vidgen.core.config import dump
from vidgen.core.errors import InputError, OutputError
from vidgen.core.request import Saving
from vidgen.core.runtime import atomic_write, check_output
from vidgen.media.join import Stretch, join_files, parting_places, write_sample
from vidgen.media.label import label_end, labelled
from vidgen.media.mastering import SoundTrack
from vidgen.media.sound import RATE
from vidgen.media.subtitles import TextTrack, as_srt, as_webvtt, one_at_a_time
from vidgen.media.types import ClipInfo
from vidgen.media.write import CONTAINERS, SEGMENT, write_clip
from vidgen.pipeline.journal.job import SUFFIX, lock_job, sweep
from vidgen.story.colours import Colours, ShotFrames, matching, measured, spread
from vidgen.story.edit import Edit
from vidgen.story.mixdown import file_facts, mixed, not_made
from vidgen.story.pieces import Piece, Reels, pieces_of
from vidgen.story.store import RenderedShot, check_shots

TEXT_SUFFIXES = (".srt", ".vtt")
Tell = Callable[[int, int], None]
"""Called with the number of frames encoded so far, and the total."""


@dataclass(frozen=True)
class Assembled:
    """A film that was written."""

    files: tuple[Path, ...]  # its texts
    recipe: Mapping[str, Any]
    notes: tuple[str, ...]  # remarks for people


def assemble(
    edit: Edit, shots: Sequence[RenderedShot], on_frames: Tell = lambda _done, _total: None
) -> Assembled:
    """Write the film of these shots, in order; replace an existing file when it is complete.

    Raises:
        InputError: a shot's file that is missing or was changed, a sound that can't be used.
        OutputError: the file can't be written, or the disk is full.
    """
    check_shots(shots)
    output, notes = edit.output, not_made(edit.film, edit.timeline)
    check_output(output, overwrite=True, num_bytes=sum(each.path.stat().st_size for each in shots))
    sources = [ShotFrames(each.path, each.num_frames) for each in shots]
    with _workplace(output) as folder:
        sources, scenes = _matched(edit, sources)
        pieces = pieces_of(edit.timeline, _burnt(edit), _parts(edit, shots, sources, folder))
        total = sum(piece.last - piece.first for piece in pieces if piece.shot is None)
        reels = Reels(edit.timeline, sources, edit.burner, lambda done: on_frames(done, total))
        stretches = _written(edit, reels, pieces, folder)
        sound, heard = _sound(edit, shots)
        changed = {index: seen for index, seen in reels.seen.items()
                   if sources[index].table is not None}
        recipe = _recipe(edit, shots, pieces, sound, _colour_facts(scenes, changed))
        texts = TextTrack(one_at_a_time(edit.tracked), output.suffix.lower()) if (
            edit.tracked) else None
        join_files(stretches, output, recipe, sound, texts, edit.chapters)
    files = text_files(edit)
    for path, text in files.items():
        atomic_write(path, text.encode())
    return Assembled(tuple(files), recipe, (*notes, *heard))


@contextmanager
def _workplace(output: Path) -> Iterator[Path]:
    """Make a folder for pieces next to the output, after removing those that a kill left."""
    for left in output.parent.glob(f".{glob.escape(output.name)}.{'[0-9a-f]' * 8}.tmp/"):
        try:
            lock = lock_job(left)
        except BlockingIOError:
            raise OutputError(f"{output} is being written by another process; wait for it, or give "
                              "another name") from None
        if lock is not None:
            lock.close()
    sweep(output.with_name(output.name + SUFFIX))
    folder = output.with_name(f".{output.name}.{token_hex(4)}.tmp")
    folder.mkdir()
    lock = lock_job(folder)
    try:
        yield folder
    finally:
        if lock is not None:
            lock.close()
        rmtree(folder, ignore_errors=True)


def text_files(edit: Edit) -> dict[Path, str]:
    """Return the files with a film's texts and their contents; none for a film without texts."""
    if not edit.cues:
        return {}
    srt, vtt = (edit.output.with_suffix(suffix) for suffix in TEXT_SUFFIXES)
    return {srt: as_srt(edit.cues), vtt: as_webvtt(edit.cues)}


def _matched(
    edit: Edit, sources: list[ShotFrames]
) -> tuple[list[ShotFrames], dict[str, dict[int, Colours]]]:
    """Return sources with their tables, and the earlier colours of each scene's shots."""
    script, scenes = edit.film.script, defaultdict[str, list[int]](list)
    for index, placed in enumerate(edit.timeline.shots):
        name = placed.shot.scene
        if name is not None and script.scenes[name].match_colour:
            scenes[name].append(index)
    before: dict[str, dict[int, Colours]] = {}
    if not script.project.finish.match_colour:
        return sources, before
    made = list(sources)
    for name, together in scenes.items():
        if len(together) < 2:
            continue
        before[name] = {index: measured(sources[index].frames()) for index in together}
        for index, table in zip(together, matching([*before[name].values()]), strict=True):
            made[index] = replace(made[index], table=table)
    return made, before


def _parts(
    edit: Edit, shots: Sequence[RenderedShot], sources: Sequence[ShotFrames], folder: Path
) -> list[list[int] | None]:
    """Return the places where each shot can be cut; None where it can't."""
    info = ClipInfo(edit.film.fps, edit.film.size, 1, picture=edit.picture)
    sample = write_sample(folder, edit.output.suffix.lower(), info)
    parts: list[list[int] | None] = []
    for shot, source in zip(shots, sources, strict=True):
        places = "" if source.table is not None else parting_places(shot.path, sample)
        if isinstance(places, str):
            parts.append(None)
            continue
        if places[-1] != shot.num_frames:
            raise InputError(f"shot {shot.shot.id!r}: {shot.path} has {places[-1]} frames instead "
                             f"of {shot.num_frames}; remove it and render it again")
        parts.append(places)
    return parts


def _burnt(edit: Edit) -> list[tuple[int, int]]:
    """Return the frames [first, last) that bear texts or the film's label, in order."""
    if edit.film.script.project.finish.label == "none":
        return edit.burner.ranges
    end = min(label_end(edit.film.fps), edit.timeline.num_frames)
    later = [(max(first, end), last) for first, last in edit.burner.ranges if last > end]
    return [(0, end), *later]


def _written(edit: Edit, reels: Reels, pieces: Sequence[Piece], folder: Path) -> list[Stretch]:
    """Encode the pieces that can't be copied; return the film's stretches of files, in order."""
    stretches: list[Stretch] = []
    try:
        for number, piece in enumerate(pieces):
            count = piece.last - piece.first
            if piece.shot is not None:
                start = edit.timeline.shots[piece.shot].start
                stretches.append(Stretch(reels.sources[piece.shot].path, piece.first - start,
                                         piece.last - start))
                continue
            path = folder / f"{number}{edit.output.suffix.lower()}"
            info = ClipInfo(edit.film.fps, edit.film.size, count, picture=edit.picture)
            frames = reels.frames(piece.first, piece.last)
            if edit.film.script.project.finish.label == "visible":
                frames = labelled(frames, info.size, info.fps, start=piece.first)
            write_clip(path, frames, info)
            stretches.append(Stretch(path, 0, count))
    finally:
        reels.close()
    return stretches


def _sound(edit: Edit, shots: Sequence[RenderedShot]) -> tuple[SoundTrack | None, list[str]]:
    film, timeline = edit.film, edit.timeline
    samples, notes = mixed(timeline, [each.path for each in shots], edit.narrated)
    if samples is None:
        return None, notes
    info = ClipInfo(film.fps, film.size, timeline.num_frames, samples, RATE,
                    loudness=film.script.project.finish.loudness)
    return SoundTrack(info, CONTAINERS[edit.output.suffix.lower()].sound), notes


def _colour_facts(
    scenes: Mapping[str, Mapping[int, Colours]], changed: Mapping[int, Colours]
) -> list[dict[str, Any]]:
    """Return how far each scene's shots differed before and differ now, in levels of 0 to 255."""
    return [
        {"scene": name, "before": round(spread([*before.values()]), 3),
         "after": round(spread([changed.get(i, colours) for i, colours in before.items()]), 3)}
        for name, before in scenes.items()]


def _recipe(
    edit: Edit, shots: Sequence[RenderedShot], pieces: Sequence[Piece], sound: SoundTrack | None,
    colours: list[dict[str, Any]],
) -> dict[str, Any]:
    film = edit.film
    copied = sum(piece.last - piece.first for piece in pieces if piece.shot is not None)
    encoder: dict[str, Any] = {**asdict(edit.picture.fitting(film.size)), "segment": SEGMENT}
    if sound is not None:
        encoder["sound"] = sound.facts()
    facts: dict[str, Any] = {"source": "film"}
    if edit.narrated is not None:
        facts["speech"] = edit.narrated.facts
    finish = film.script.project.finish
    recipe: dict[str, Any] = {
        "vidgen": __version__, **Saving(label=finish.label, aigc=finish.aigc).marks,
        "model": {"name": film.folder.name, "sha256": film.folder.content_hash},
        "film": {
            "key": edit.key([each.path.stem for each in shots]),
            "script": dump(film.script),
            "shots": [{"id": each.shot.id, "address": each.path.stem, "seed": each.seed}
                      for each in shots],
            "timeline": edit.facts(), "copied_frames": copied, "colours": colours,
            "sounds": file_facts(edit.timeline),
            **({"described": [each.facts() for each in edit.described]} if edit.described else {})},
        "encoder": encoder}
    return recipe if sound is None else recipe | {"sound": facts}
