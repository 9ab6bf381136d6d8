"""A film's edit for editing programs, as OpenTimelineIO's JSON.

Shots are clips of one video track, with their transitions between them: a cut lies in the middle of
what the shots share, and the transition reaches over it to both sides. Narration, music and sounds
are audio tracks, captions markers. Names and versions of the schemas are OpenTimelineIO 0.18's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import zip_longest
from pathlib import Path
from typing import Any
from urllib.parse import quote

from vidgen.media.sound import RATE
from vidgen.story.edit import Edit
from vidgen.story.mixdown import playings
from vidgen.story.render import RenderedShot
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
