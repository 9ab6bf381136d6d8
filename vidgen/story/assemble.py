"""Rendered shots into one film: picture, sound, texts, chapters and recipe, in a stream.

A shot that is encoded as the film and shown unchanged is copied from key frame to key frame. The
rest is encoded in pieces of closed groups of pictures, which are next to the output until all are
joined. So memory is bounded, the same shots give the same file, and a film whose writing was killed
is written again from the start.

Axes: H W rows and columns.
"""

from __future__ import annotations

import glob
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from secrets import token_hex
from shutil import rmtree
from typing import Any

import numpy as np

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
from vidgen.media.types import ClipInfo, Frames
from vidgen.media.video_reader import VideoReader
from vidgen.media.write import CONTAINERS, SEGMENT, write_clip
from vidgen.pipeline.journal.job import SUFFIX, lock_job, sweep
from vidgen.story.captions import Burner
from vidgen.story.edit import Edit
from vidgen.story.mixdown import file_facts, mixed, not_made
from vidgen.story.store import RenderedShot, check_shots
from vidgen.story.timeline import Section, Timeline

TEXT_SUFFIXES = (".srt", ".vtt")
Tell = Callable[[int, int], None]
"""Called with the number of frames encoded so far, and the total."""
_COLOURS = {"fade-black": 0.0, "fade-white": 255.0}


@dataclass(frozen=True, slots=True)
class Piece:
    """Frames `first` up to `last` of the film."""

    first: int
    last: int
    # place in the timeline of the shot whose packets are copied; None: encoded
    shot: int | None = None


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
    with _workplace(output) as folder:
        pieces = pieces_of(edit.timeline, _burnt(edit), _parts(edit, shots, folder))
        stretches = _written(edit, shots, pieces, folder, on_frames)
        sound, sound_notes = _sound(edit, shots)
        recipe = _recipe(edit, shots, pieces, sound)
        texts = TextTrack(one_at_a_time(edit.tracked), output.suffix.lower()) if (
            edit.tracked) else None
        join_files(stretches, output, recipe, sound, texts, edit.chapters)
    files = text_files(edit)
    for path, text in files.items():
        atomic_write(path, text.encode())
    return Assembled(tuple(files), recipe, (*notes, *sound_notes))


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


def _parts(
    edit: Edit, shots: Sequence[RenderedShot], folder: Path
) -> list[list[int] | None]:
    """Return the places where each shot can be cut; None where it can't."""
    info = ClipInfo(edit.film.fps, edit.film.size, 1, picture=edit.picture)
    sample = write_sample(folder, edit.output.suffix.lower(), info)
    parts: list[list[int] | None] = []
    for shot in shots:
        places = parting_places(shot.path, sample)
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


def pieces_of(
    timeline: Timeline, burnt: Sequence[tuple[int, int]], parts: Sequence[Sequence[int] | None]
) -> list[Piece]:
    """Cut a film into pieces that are copied and pieces that are encoded.

    `burnt` holds the frames [first, last) that bear texts, in order; `parts` the frames at which
    each shot's packets can be cut, its end included, or None.
    """
    pieces: list[Piece] = []

    def add(piece: Piece) -> None:
        before = pieces[-1] if pieces else None
        if piece.first == piece.last:
            return
        if before is not None and before.shot is None and piece.shot is None:
            pieces[-1] = Piece(before.first, piece.last)
        else:
            pieces.append(piece)

    for section in timeline.sections():
        at, index = section.first, section.shots[0]
        places = parts[index] if section.kind == "cut" else None
        if places is not None:
            start = timeline.shots[index].start
            for first, last in _unmarked(section, burnt):
                inside = [start + place for place in places if first <= start + place <= last]
                if len(inside) > 1:
                    add(Piece(at, inside[0]))
                    add(Piece(inside[0], inside[-1], index))
                    at = inside[-1]
        add(Piece(at, section.last))
    return pieces


def _unmarked(section: Section, burnt: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    at = section.first
    for first, last in burnt[bisect_right(burnt, at, key=lambda each: each[1]) :]:
        if first >= section.last:
            break
        if first > at:
            yield at, first
        at = last
    if at < section.last:
        yield at, section.last


def _written(
    edit: Edit, shots: Sequence[RenderedShot], pieces: Sequence[Piece], folder: Path,
    on_frames: Tell,
) -> list[Stretch]:
    """Encode the pieces that can't be copied; return the film's stretches of files, in order."""
    stretches, timeline, suffix = list[Stretch](), edit.timeline, edit.output.suffix.lower()
    with closing(film_frames(timeline, shots, edit.burner, pieces, on_frames)) as frames:
        for number, piece in enumerate(pieces):
            if piece.shot is not None:
                start = timeline.shots[piece.shot].start
                path, first, last = shots[piece.shot].path, piece.first - start, piece.last - start
            else:
                path, first, last = folder / f"{number}{suffix}", 0, piece.last - piece.first
                info = ClipInfo(edit.film.fps, edit.film.size, last, picture=edit.picture)
                made: Iterator[Frames] = islice(frames, last)
                if edit.film.script.project.finish.label == "visible":
                    made = labelled(made, info.size, info.fps, start=piece.first)
                write_clip(path, made, info)
            stretches.append(Stretch(path, first, last))
    return stretches


def film_frames(
    timeline: Timeline, shots: Sequence[RenderedShot], burner: Burner, pieces: Sequence[Piece],
    on_frames: Tell,
) -> Generator[Frames]:
    """Yield the frames of a film's encoded pieces, uint8 [1, H, W, 3] each, with their texts.

    At most two shots are open at a time. At frame n of a transition over N frames the second shot's
    share is (n + 1) / (N + 1): neither the first nor the last frame is one shot alone, as those are
    its neighbours.

    Raises:
        InputError: a shot's file that was changed.
    """
    numbers = [n for each in pieces if each.shot is None for n in range(each.first, each.last)]
    opened: dict[int, Generator[tuple[int, Frames]]] = {}
    sections = timeline.sections()
    section = next(sections)
    try:
        for done, number in enumerate(numbers, 1):
            while section.last <= number:
                section = next(sections)
            for index in [each for each in opened if each < section.shots[0]]:
                opened.pop(index).close()
            shown = []
            for index in section.shots:
                if index not in opened:
                    opened[index] = _shot_frames(shots[index], timeline.shots[index].start)
                shown.append(next(frame for at, frame in opened[index] if at == number))
            share = (number - section.first + 1) / (section.last - section.first + 1)
            kind, _, way = section.kind.rpartition("-")
            frame = shown[0]
            if len(shown) == 2:
                frame = blended(section.kind, shown[0], shown[1], share)
            elif way in ("in", "out"):
                frame = faded(kind, frame, share if way == "in" else 1 - share)
            yield burner.burn(frame, number)[None]
            on_frames(done, len(numbers))
    finally:
        for frames in opened.values():
            frames.close()


def _shot_frames(shot: RenderedShot, start: int) -> Generator[tuple[int, Frames]]:
    """Yield each frame of a shot after its number in the film, which shows the first at `start`."""
    with VideoReader(shot.path) as reader:
        for number, frame in enumerate(reader, start):
            yield number, frame
    raise InputError(f"{shot.path} ends after frame {number - start + 1} of {shot.num_frames}: it "
                     "was changed or damaged; remove it and render it again")


def blended(kind: str, first: Frames, second: Frames, share: float) -> Frames:
    """Return a frame of a transition between two shots, uint8 [H, W, 3].

    Args:
        kind: "dissolve", "fade-black" or "fade-white" (through the colour), "wipe-left" or
            "wipe-right" (the edge moves that way), "slide-left" or "slide-right" (both shots do).
        first: uint8 [H, W, 3] of the first shot.
        second: uint8 [H, W, 3] of the second shot.
        share: of the second, above 0 and below 1.
    """
    if kind == "dissolve":
        return np.asarray(np.rint(first + share * (second.astype(np.float32) - first)), np.uint8)
    if kind in _COLOURS:
        return faded(kind, first if share < 0.5 else second, abs(1 - 2 * share))
    columns = round(share * first.shape[1])  # of the second
    left = first.shape[1] - columns
    sides = {
        "wipe-left": (first[:, :left], second[:, left:]),
        "wipe-right": (second[:, :columns], first[:, columns:]),
        "slide-left": (first[:, columns:], second[:, :columns]),
        "slide-right": (second[:, left:], first[:, :left])}
    return np.concatenate(sides[kind], axis=1)


def faded(kind: str, frame: Frames, share: float) -> Frames:
    """Return a frame uint8 [H, W, 3] mixed with black or white, of which `share` is left."""
    mixed = share * frame.astype(np.float32) + (1 - share) * _COLOURS[kind]
    return np.asarray(np.rint(mixed), np.uint8)


def _sound(edit: Edit, shots: Sequence[RenderedShot]) -> tuple[SoundTrack | None, list[str]]:
    film, timeline = edit.film, edit.timeline
    samples, notes = mixed(timeline, [each.path for each in shots], edit.narrated)
    if samples is None:
        return None, notes
    info = ClipInfo(film.fps, film.size, timeline.num_frames, samples, RATE,
                    loudness=film.script.project.finish.loudness)
    return SoundTrack(info, CONTAINERS[edit.output.suffix.lower()].sound), notes


def _recipe(
    edit: Edit, shots: Sequence[RenderedShot], pieces: Sequence[Piece], sound: SoundTrack | None
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
            "timeline": edit.facts(), "copied_frames": copied,
            "sounds": file_facts(edit.timeline),
            **({"described": [each.facts() for each in edit.described]} if edit.described else {})},
        "encoder": encoder}
    return recipe if sound is None else recipe | {"sound": facts}
