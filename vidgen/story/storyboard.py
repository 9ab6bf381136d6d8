"""A film as a page: of every shot three frames, its prompts, seed, times, sound and warnings."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vidgen import __version__
from vidgen.core import pages
from vidgen.core.runtime import atomic_write
from vidgen.media.video_reader import VideoReader
from vidgen.story.edit import Edit
from vidgen.story.elements import ShotFrame
from vidgen.story.script import Shot
from vidgen.story.store import RenderedShot
from vidgen.story.timeline import Placed

_LONG_SIDE = 240  # of a thumbnail, in pixels


def write_storyboard(edit: Edit, shots: Sequence[RenderedShot], path: str | Path) -> Path:
    """Write the page of a film's rendered shots; replace an existing file.

    Raises:
        InputError: a shot's file that can't be read.
        OutputError: it can't be written.
    """
    parts = (part.encode() for part in page_parts(edit, shots))
    atomic_write(path, lambda file: file.writelines(parts))
    return Path(path)


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
        yield "goes on from", shot.continue_from
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
    for said in shot.narration:
        yield "narration", f"{said.speaker}: {said.text}" if said.speaker else said.text
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
