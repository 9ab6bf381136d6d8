"""A film's edit for editing programs, as OpenTimelineIO's JSON.

Shots are clips of one video track, with their transitions between them: a cut lies in the middle of
what the shots share, and the transition reaches over it to both sides. Narration, music and sounds
are audio tracks, captions markers. Names and versions of the schemas are OpenTimelineIO 0.18's.
"""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Iterator, Sequence
from fractions import Fraction
from html import escape
from itertools import zip_longest
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

from PIL import Image

from vidgen import __version__
from vidgen.core.runtime import atomic_write
from vidgen.media.sound import RATE
from vidgen.media.types import Frames
from vidgen.media.video_reader import VideoReader
from vidgen.story.edit import Edit
from vidgen.story.elements import ShotFrame
from vidgen.story.mixdown import playings
from vidgen.story.script import Shot
from vidgen.story.store import RenderedShot
from vidgen.story.timeline import Placed, Timeline

Item = dict[str, Any]


def otio_text(edit: Edit, shots: Sequence[RenderedShot], folder: Path) -> str:
    """A film's edit as the text of an `.otio` file.

    Args:
        edit: of the film.
        shots: rendered, in order.
        folder: where the file is to lie; paths are relative to it where they can be.
    """
    timeline = edit.timeline
    script = edit.film.script
    tracks = [_video(edit, shots, folder)]
    tracks += [_track(kind, "Audio", items) for kind, items in (
        ("sounds", _sounds(edit, folder)), ("music", _music(edit, folder)),
        ("narration", _narration(edit)),
    ) if items]
    data: Item = {
        "OTIO_SCHEMA": "Timeline.1", "name": script.project.title or script.path.stem,
        "global_start_time": None,
        "metadata": {"vidgen": {"script": str(script.path.name), "seed": script.project.seed}},
        "tracks": {
            "OTIO_SCHEMA": "Stack.1", "name": "tracks", "source_range": None, "effects": [],
            "enabled": True, "color": None, "metadata": {}, "children": tracks,
            "markers": [
                _marker(cue.text, _range(cue.start_s * timeline.fps,
                                         (cue.end_s - cue.start_s) * timeline.fps, timeline.fps))
                for cue in edit.cues
            ],
        },
    }
    return json.dumps(data, indent=1)


def _video(edit: Edit, shots: Sequence[RenderedShot], folder: Path) -> Item:
    """Clips and transitions; each clip ends where the next one's begins."""
    timeline, fps, items = edit.timeline, edit.timeline.fps, list[Item]()
    for (placed, cut, end), shot in zip(_cuts(timeline), shots, strict=True):
        fade = timeline.opening if not items else 0
        if placed.overlap or fade:
            items.append(_transition(placed.transition.type, placed.overlap // 2,
                                     fade or placed.overlap - placed.overlap // 2, fps))
        whole = _range(0, placed.num_frames, fps)
        items.append(_clip(
            placed.shot.id, _range(cut - placed.start, end - cut, fps),
            _file(shot.path, folder, whole),
            {"prompt": [each.prompt for each in placed.shot.prompt], "seed": shot.seed,
             "scene": placed.shot.scene, "address": shot.path.stem},
        ))
    if timeline.ending:
        items.append(_transition(timeline.ending_kind, timeline.ending, 0, fps))
    return _track("shots", "Video", items)


def _cuts(timeline: Timeline) -> Iterator[tuple[Placed, int, int]]:
    """Each shot with the frames of the film from which and up to which it is a clip."""
    for placed, following in zip_longest(timeline.shots, timeline.shots[1:]):
        end = placed.end if following is None else following.start + following.overlap // 2
        yield placed, placed.start + placed.overlap // 2, end


def _sounds(edit: Edit, folder: Path) -> list[Item]:
    """Files that shots name; cut where the shots are."""
    items, at = list[Item](), 0
    for placed, *ends in _cuts(edit.timeline):
        sound = placed.shot.sound
        if sound is None or sound.file is None:
            continue
        path = edit.film.script.file(sound.file)
        begin, first, last = (round(frame / edit.timeline.fps * RATE)
                              for frame in (placed.start, *ends))
        items += [_gap(first - at)] if first > at else []
        items.append(_clip(path.stem, _range(first - begin, last - first, Fraction(RATE)),
                           _file(path, folder, None),
                           {"gain_db": sound.gain_db, "loop": sound.loop}))
        at = last
    return items


def _music(edit: Edit, folder: Path) -> list[Item]:
    items, at = list[Item](), 0
    for playing in playings(edit.timeline):
        assert playing.music.file is not None
        path = edit.film.script.file(playing.music.file)
        length = playing.last - playing.first
        items += [_gap(playing.first - at)] if playing.first > at else []
        items.append(_clip(path.stem, _samples(length), _file(path, folder, None),
                           {"gain_db": playing.music.gain_db, "loop": playing.music.loop}))
        at = playing.last
    return items


def _narration(edit: Edit) -> list[Item]:
    items, at = list[Item](), 0
    for each in edit.narrated.sentences if edit.narrated else ():
        first, last = (round(time * RATE) for time in (each.start_s, each.end_s))
        items += [_gap(first - at)] if first > at else []
        missing: Item = {"OTIO_SCHEMA": "MissingReference.1", "name": "", "available_range": None,
                   "available_image_bounds": None, "metadata": {}}
        items.append(_clip(each.text or "speech", _samples(last - first), missing, {}))
        at = max(at, last)
    return items


def _track(name: str, kind: str, items: list[Item]) -> Item:
    return {"OTIO_SCHEMA": "Track.1", "name": name, "kind": kind, "source_range": None,
            "effects": [], "markers": [], "enabled": True, "color": None, "metadata": {},
            "children": items}


def _clip(name: str, source_range: Item, media: Item, facts: Item) -> Item:
    return {
        "OTIO_SCHEMA": "Clip.2", "name": name, "source_range": source_range, "effects": [],
        "markers": [], "enabled": True, "color": None, "metadata": {"vidgen": facts},
        "media_references": {"DEFAULT_MEDIA": media},
        "active_media_reference_key": "DEFAULT_MEDIA",
    }


def _gap(num_samples: int) -> Item:
    return {"OTIO_SCHEMA": "Gap.1", "name": "", "source_range": _samples(num_samples),
            "effects": [], "markers": [], "enabled": True, "color": None, "metadata": {}}


def _transition(kind: str, before: int, behind: int, fps: Fraction) -> Item:
    known = "SMPTE_Dissolve" if kind == "dissolve" else "Custom_Transition"
    return {"OTIO_SCHEMA": "Transition.1", "name": kind, "transition_type": known,
            "in_offset": _time(before, fps), "out_offset": _time(behind, fps),
            "metadata": {"vidgen": {"type": kind}}}


def _marker(text: str, marked: Item) -> Item:
    return {"OTIO_SCHEMA": "Marker.2", "name": text, "color": "WHITE", "comment": "",
            "marked_range": marked, "metadata": {}}


def _file(path: Path, folder: Path, whole: Item | None) -> Item:
    try:
        url = quote(Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix())
    except ValueError:  # another drive
        url = path.resolve().as_uri()
    return {"OTIO_SCHEMA": "ExternalReference.1", "name": path.name, "target_url": url,
            "available_range": whole, "available_image_bounds": None, "metadata": {}}


def _samples(count: int) -> Item:
    return _range(0, count, Fraction(RATE))


def _range(start: float, count: float, rate: Fraction) -> Item:
    return {"OTIO_SCHEMA": "TimeRange.1", "start_time": _time(start, rate),
            "duration": _time(count, rate)}


def _time(value: float, rate: Fraction) -> Item:
    return {"OTIO_SCHEMA": "RationalTime.1", "rate": float(rate), "value": float(value)}


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
    """Write a film's page.

    Args:
        edit: of the film.
        shots: rendered, in order.
        path: `.html`; replaced if it exists.

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
    """What `write_storyboard` writes, from its beginning to its end."""
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
    """What a shot asks for beside its picture."""
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
    """First, middle and last frame; fewer of a shot that has fewer."""
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
