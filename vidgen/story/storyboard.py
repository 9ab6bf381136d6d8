"""A film as a page: of every shot three frames, its prompts, seed, times, sound and warnings.

The page is one file without a script or anything from elsewhere; it opens offline and prints.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from vidgen import __version__
from vidgen.core.runtime import atomic_write
from vidgen.media.types import Frames
from vidgen.media.video_reader import VideoReader
from vidgen.story.edit import Edit
from vidgen.story.elements import ShotFrame
from vidgen.story.script import Shot
from vidgen.story.store import RenderedShot
from vidgen.story.timeline import Placed

_LONG_SIDE = 240  # of a thumbnail, in pixels
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #777; --warn: #b45309; --fault: #c0262d }
* { box-sizing: border-box }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 1080px; padding: 24px }
h1 { font-size: 26px; margin: 0 } h2 { font-size: 19px; margin: 32px 0 8px }
h3 { font-size: 16px; margin: 0 } p { margin: 4px 0 } .soft { color: var(--soft) }
.shot { border-top: 1px solid var(--line); display: grid; gap: 4px 20px; padding: 14px 0;
  grid-template-columns: minmax(0, 3fr) minmax(0, 2fr); break-inside: avoid }
.frames { align-items: flex-start; display: flex; gap: 4px }
.frames img { border-radius: 3px; height: auto; min-width: 0; width: 33.3% }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 1px 12px; margin: 6px 0 }
dt { color: var(--soft) } dd { margin: 0; overflow-wrap: anywhere }
.bar { display: flex; gap: 1px; height: 22px; margin: 14px 0 4px } .bar a { background: #2f5d8c;
  min-width: 1px; overflow: hidden; color: #fff; font-size: 11px; line-height: 22px;
  padding: 0 3px; text-decoration: none; white-space: nowrap }
.bar a:nth-child(even) { background: #4a739c } .warning { color: var(--warn) }
.fault { color: var(--fault); font-weight: 600 }
@media (max-width: 640px) { .shot { grid-template-columns: 1fr } }
"""


def write_storyboard(edit: Edit, shots: Sequence[RenderedShot], path: str | Path) -> Path:
    """Write the page of a film's rendered shots; an existing file is replaced.

    Raises:
        InputError: a shot's file that can't be read.
        OutputError: it can't be written.
    """
    def write(file: BinaryIO) -> None:
        for part in page_parts(edit, shots):
            file.write(part.encode())

    atomic_write(path, write)
    return Path(path)


def page_parts(edit: Edit, shots: Sequence[RenderedShot]) -> Iterator[str]:
    """Yield the page's text, from its beginning to its end."""
    script, timeline, film = edit.film.script, edit.timeline, edit.film
    title = escape(script.project.title or script.path.stem)
    seconds = timeline.seconds(timeline.num_frames)
    found = sum(len(shot.findings) for shot in shots)
    yield (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head>\n<body><h1>{title}</h1>\n"
        f'<p class="soft">{len(shots)} shots, {seconds:.2f} s, {film.size[0]}x{film.size[1]} at '
        f"{film.fps} fps, model {escape(film.folder.name)}, vidgen {__version__}, "
        f"{found} {'warning' if found == 1 else 'warnings'}</p>\n"
    )
    yield '<nav class="bar" aria-label="Timeline">'
    for placed in timeline.shots:
        share = placed.num_frames - placed.overlap
        name = escape(placed.shot.id)
        yield f'<a href="#{name}" style="flex: {share} 1 0" title="{name}">{name}</a>'
    yield "</nav>\n"
    scene = None
    for placed, shot in zip(timeline.shots, shots, strict=True):
        if placed.shot.scene is not None and placed.shot.scene != scene:
            about = script.scenes[placed.shot.scene]
            yield f"<h2>{escape(about.title or placed.shot.scene)}</h2>\n"
        scene = placed.shot.scene
        yield from _shot(edit, placed, shot)
    yield "</body></html>\n"


def _shot(edit: Edit, placed: Placed, shot: RenderedShot) -> Iterator[str]:
    name = escape(placed.shot.id)
    yield f'<section class="shot" id="{name}"><div class="frames">'
    for label, frame in _thumbnails(shot):
        yield f'<img src="{_data_uri(frame)}" alt="{name}, {label}">'
    yield f"</div><div><h3>{name}</h3>"
    for index, each in enumerate(placed.shot.prompt):
        when = f'<span class="soft">{each.at:g} s</span> ' if len(placed.shot.prompt) > 1 else ""
        told = edit.film.words(placed.shot, index)
        yield f"<p>{when}{escape(told)}</p>"
        own = edit.film.script.words(placed.shot, each.prompt)
        if told != own:
            yield f'<p class="soft">rewritten from: {escape(own)}</p>'
    yield "<dl>"
    for term, text in _facts(edit, placed, shot):
        yield f"<dt>{term}</dt><dd>{escape(text)}</dd>"
    yield "</dl>"
    for finding in shot.findings:
        yield f'<p class="{escape(finding.severity)}">{escape(finding.text)}</p>'
    yield "</div></section>\n"


def _facts(edit: Edit, placed: Placed, shot: RenderedShot) -> Iterator[tuple[str, str]]:
    begin, end = (edit.timeline.seconds(frame) for frame in (placed.start, placed.end))
    yield "time", f"{begin:.2f} to {end:.2f} s, {placed.num_frames} frames"
    yield "seed", str(shot.seed)
    if placed.overlap:
        yield "from before", (f"{placed.transition.type}, "
                              f"{edit.timeline.seconds(placed.overlap):.2f} s")
    if shot.choice is not None:
        yield "take", f"{len(shot.choice['takes'])} made; {shot.choice['why']}"
    yield from _texts(shot.shot)
    yield "file", shot.path.name


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


def _thumbnails(shot: RenderedShot) -> Iterator[tuple[str, Frames]]:
    """Yield the first, middle and last frame; fewer of a shot that has fewer."""
    wanted = {0: "first frame", shot.num_frames // 2: "middle", shot.num_frames - 1: "last frame"}
    with VideoReader(shot.path) as reader:
        for number, frame in enumerate(reader):
            if number in wanted:
                yield wanted[number], frame


def _data_uri(frame: Frames) -> str:
    image, file = Image.fromarray(frame), io.BytesIO()
    image.thumbnail((_LONG_SIDE, _LONG_SIDE), Image.Resampling.LANCZOS)
    image.save(file, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
