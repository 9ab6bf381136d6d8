"""A film's edit for editing programs, by OpenTimelineIO, an optional package.

Shots are clips of one video track; a cut is in the middle of its transition. Narration, music and
sounds are audio tracks, captions markers.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import zip_longest
from pathlib import Path
from urllib.parse import quote

from opentimelineio import schema
from opentimelineio.core import Item
from opentimelineio.opentime import RationalTime, TimeRange
from opentimelineio.schema import Clip, Track

from vidgen.media.sound import RATE
from vidgen.story.edit import Edit
from vidgen.story.mixdown import music_spans
from vidgen.story.script import SILENCE
from vidgen.story.store import RenderedShot
from vidgen.story.timeline import Placed


def otio_text(edit: Edit, shots: Sequence[RenderedShot], folder: Path) -> str:
    """Return the text of an `.otio` file in `folder`; paths are relative where they can be."""
    script, fps = edit.film.script, edit.timeline.fps
    timeline = schema.Timeline(script.project.title or script.path.stem, metadata={
        "vidgen": {"script": script.path.name, "seed": script.project.seed}})
    timeline.tracks.append(_video(edit, shots, folder))
    for name, track in (("sounds", _sounds(edit, folder)), ("music", _music(edit, folder)),
                        ("narration", _narration(edit))):
        items = [*_with_gaps(track)]
        if items:
            timeline.tracks.append(Track(name, items, kind=schema.TrackKind.Audio))
    timeline.tracks.markers.extend(
        schema.Marker(cue.text, _range(cue.start_s * fps, (cue.end_s - cue.start_s) * fps, fps),
                      schema.MarkerColor.WHITE) for cue in edit.cues)
    text: str = timeline.to_json_string(indent=1)
    return text


def _video(edit: Edit, shots: Sequence[RenderedShot], folder: Path) -> Track:
    timeline, fps = edit.timeline, edit.timeline.fps
    track = Track("shots", kind=schema.TrackKind.Video)
    for (placed, cut, end), shot in zip(_cuts(edit), shots, strict=True):
        fade = 0 if track else timeline.opening
        if placed.overlap or fade:
            track.append(_transition(placed.transition.type, placed.overlap // 2,
                                     fade or placed.overlap - placed.overlap // 2, fps))
        track.append(Clip(
            placed.shot.id, _file(shot.path, folder, _range(0, placed.num_frames, fps)),
            _range(cut - placed.start, end - cut, fps),
            {"vidgen": {"prompt": [each.prompt for each in placed.shot.prompt], "seed": shot.seed,
                        "scene": placed.shot.scene, "address": shot.path.stem}}))
    if timeline.ending:
        track.append(_transition(timeline.ending_kind, timeline.ending, 0, fps))
    return track


def _cuts(edit: Edit) -> Iterator[tuple[Placed, int, int]]:
    """Yield each shot with the frames of the film from which and up to which it is a clip."""
    shots = edit.timeline.shots
    for placed, following in zip_longest(shots, shots[1:]):
        end = placed.end if following is None else following.start + following.overlap // 2
        yield placed, placed.start + placed.overlap // 2, end


def _with_gaps(clips: Iterable[tuple[int, Clip]]) -> Iterator[Item]:
    """Yield clips, each with its first sample, and the silence between them."""
    at = 0
    for first, clip in clips:
        if first > at:
            yield schema.Gap(source_range=_range(0, first - at, RATE))
        yield clip
        at = max(at, first + round(clip.source_range.duration.value))


def _sounds(edit: Edit, folder: Path) -> Iterator[tuple[int, Clip]]:
    for placed, *ends in _cuts(edit):
        sound = placed.shot.sound
        if sound is None or sound.file is None:
            continue
        path = edit.film.script.file(sound.file)
        begin, first, last = map(edit.timeline.sample, (placed.start, *ends))
        yield first, Clip(path.stem, _file(path, folder), _range(first - begin, last - first, RATE),
                          {"vidgen": {"gain_db": sound.gain_db, "loop": sound.loop}})


def _music(edit: Edit, folder: Path) -> Iterator[tuple[int, Clip]]:
    for placed, end in music_spans(edit.timeline):
        music = placed.shot.music
        if music is None or music.file is None or music.file == SILENCE:
            continue
        path = edit.film.script.file(music.file)
        first, last = map(edit.timeline.sample, (placed.start, end))
        yield first, Clip(path.stem, _file(path, folder), _range(0, last - first, RATE),
                          {"vidgen": {"gain_db": music.gain_db, "loop": music.loop}})


def _narration(edit: Edit) -> Iterator[tuple[int, Clip]]:
    for each in edit.narrated.sentences if edit.narrated else ():
        first, last = (round(time * RATE) for time in (each.start_s, each.end_s))
        yield first, Clip(each.text or "speech", schema.MissingReference(),
                          _range(0, last - first, RATE), {"vidgen": {}})


def _transition(kind: str, before: int, after: int, fps: Fraction) -> schema.Transition:
    kinds, rate = schema.TransitionTypes, float(fps)
    known = kinds.SMPTE_Dissolve if kind == "dissolve" else kinds.Custom
    return schema.Transition(kind, known, RationalTime(before, rate), RationalTime(after, rate),
                             {"vidgen": {"type": kind}})


def _file(path: Path, folder: Path, whole: TimeRange | None = None) -> schema.ExternalReference:
    try:
        url = quote(Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix())
    except ValueError:  # another drive
        url = path.resolve().as_uri()
    made = schema.ExternalReference(url, whole)
    made.name = path.name
    return made


def _range(start: float, count: float, rate: Fraction | float) -> TimeRange:
    return TimeRange(RationalTime(float(start), float(rate)),
                     RationalTime(float(count), float(rate)))
