"""A film's sound: its shots' own, music, and narration over both.

Shots' sounds cross in transitions at equal power, and meet at cuts with a ramp of 5 ms. Music plays
from its shot's beginning until the next music or `none`, and fades out in a second. Narration ducks
all of it. Levels are those of the files and the script's `gain_db`; loudness is set when the film
is written.

Axes: N samples, c channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from vidgen.core.errors import InputError, located
from vidgen.core.request import OWN_FILE
from vidgen.core.runtime import sha256_file
from vidgen.media import mix
from vidgen.media.sound import RATE, SoundReader, read_sound, room
from vidgen.media.speech import PAUSE_S, Sentence, Voice, spoken
from vidgen.media.subtitles import Cue
from vidgen.media.types import Samples
from vidgen.story.elements import Music, Narration
from vidgen.story.film import FilmPlan
from vidgen.story.script import SILENCE, Script, Shot, files_of
from vidgen.story.timeline import Placed, Timeline

MUSIC_FADE_S = 1.0
"""Seconds in which music fades out, and the next one in."""
_STEP = 1 << 18


@dataclass(frozen=True)
class Narrated:
    """A film's speech."""

    samples: Samples  # float32 [N, 1], as long as the film
    sentences: tuple[Sentence, ...]
    speakers: tuple[str | None, ...]  # of each sentence, None for the narrator
    voices: tuple[dict[str, Any], ...]  # facts of each voice, for the recipe

    @property
    def cues(self) -> list[Cue]:
        """The sentences as texts; speech from a file has none."""
        return [Cue(each.text, each.start_s, each.end_s, speaker)
                for each, speaker in zip(self.sentences, self.speakers, strict=True) if each.text]

    @property
    def facts(self) -> dict[str, Any]:
        """The recipe's entries, as for a clip."""
        return {"voice": list(self.voices), "sentences": [asdict(s) for s in self.sentences],
                "duck_db": mix.DUCK_DB, "duck_down_s": mix.DUCK_DOWN_S, "duck_up_s": mix.DUCK_UP_S}


def _files_of(script: Script, shot: Shot) -> list[Path]:
    return [script.file(file) for key, file in files_of(script, shot)
            if key in ("sound", "music", "narration")]


def check_sounds(timeline: Timeline) -> None:
    """Open every sound file once, to check it.

    Raises:
        InputError: a file that can't be used, with its shot.
    """
    script, opened = timeline.script, set[Path]()
    for placed in timeline.shots:
        for path in _files_of(script, placed.shot):
            if path in opened:
                continue
            with located(script.where(placed.shot)):
                SoundReader(path)
            opened.add(path)


def not_made(film: FilmPlan, timeline: Timeline) -> list[str]:
    """Return notes on described sounds that no model makes."""
    notes = []
    for key, words in (("sound", "effects"), ("music", "prompt")):
        names = [each.shot.id for each in timeline.shots
                 if getattr(getattr(each.shot, key), words, None) is not None
                 and not (key == "sound" and film.makes_sound(each.shot))]
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            notes.append(f"the {key} of {', '.join(names[:3])}{more} is described in words, and "
                        "this model makes no sound; give files, or --audio-model FOLDER")
    return notes


def narrate(timeline: Timeline) -> Narrated | None:
    """Return a film's speech, None for a film without narration.

    A text without a time begins with its shot, or after the previous text.

    Raises:
        InputError: texts that overlap or outlast the film, voices that can't be used.
    """
    script = timeline.script
    lines = [(placed, each) for placed in timeline.shots for each in placed.shot.narration]
    if not lines:
        return None
    samples, voices = room(timeline.num_samples, 1), dict[str, Voice]()
    sentences, speakers, free = list[Sentence](), list[str | None](), 0.0
    for placed, each in lines:
        begin = _begin(timeline, placed, each, free if sentences else None)
        with located(script.where(placed.shot)):
            text, voice = _voiced(script, each, voices)
            for words, wave in spoken(text, voice):
                first = round(begin * RATE)
                samples[first : first + len(wave)] += wave[: max(0, len(samples) - first)]
                free = begin + len(wave) / RATE
                sentences.append(Sentence(words, round(begin, 3), round(free, 3)))
                speakers.append(each.speaker)
                begin = free + PAUSE_S
        late = free - timeline.seconds(timeline.num_frames)
        if late > 0.001:
            raise InputError(f"{script.where(placed.shot)}: narration {each.text!r} ends "
                             f"{late:.2f} s after the film; shorten it, place it earlier, or make "
                             "the last shots longer")
    facts = tuple(voice.facts for voice in voices.values()) or ({"engine": "file"},)
    return Narrated(samples, tuple(sentences), tuple(speakers), facts)


def _begin(timeline: Timeline, placed: Placed, line: Narration, free: float | None) -> float:
    """Return the time at which a text begins; `free` is the end of the previous one."""
    start = timeline.seconds(placed.start)
    if line.at is None:
        return start if free is None else max(start, free + PAUSE_S)
    begin = start + line.at
    if free is not None and begin < free - 1e-9:
        raise InputError(f"{timeline.script.where(placed.shot)}: narration {line.text!r} begins "
                         f"{free - begin:.2f} s before the previous one ends; place it at "
                         f"{free - start:.2f} s or later")
    return begin


def _voiced(script: Script, line: Narration, voices: dict[str, Voice]) -> tuple[str, Voice | None]:
    """Return a text as `spoken` takes it, and its voice, which is opened once."""
    if line.text.startswith(OWN_FILE):
        return f"{OWN_FILE}{script.file(Path(line.text.removeprefix(OWN_FILE)))}", None
    speaker = script.characters.get(line.speaker or "")
    name = line.voice or (speaker.voice if speaker else None)
    if (name or "") not in voices:
        voices[name or ""] = Voice(name)
    return line.text, voices[name or ""]


def mixed(
    timeline: Timeline, paths: Sequence[Path], narrated: Narrated | None
) -> tuple[Samples | None, list[str]]:
    """Mix a film's sound; a shot's own sound is used where the script names no file.

    Returns:
        (float32 [N, 2] at `RATE`, or None for a silent film; notes for people).

    Raises:
        InputError: a file that can't be used.
    """
    script, bed = timeline.script, room(timeline.num_samples, 2)
    notes, has_sound = list[str](), False
    for index, (placed, path) in enumerate(zip(timeline.shots, paths, strict=True)):
        with located(script.where(placed.shot)):
            sound, own_notes = _of_shot(timeline, placed, path)
        notes += own_notes
        if sound is not None:
            has_sound = True
            _shape(sound, timeline, index)
            _add(bed, sound, timeline.sample(placed.start))
    for placed, end in music_spans(timeline):
        music = placed.shot.music
        if music is not None and music.file not in (None, SILENCE):
            with located(script.where(placed.shot)):
                notes += _add_music(bed, script, music, *map(timeline.sample, (placed.start, end)))
            has_sound = True
    if narrated is None:
        return (bed if has_sound else None), notes
    spans = [(each.start_s, each.end_s) for each in narrated.sentences]
    return mix.lay_over(bed if has_sound else None, narrated.samples, spans), notes


def _of_shot(timeline: Timeline, placed: Placed, path: Path) -> tuple[Samples | None, list[str]]:
    """Return a shot's sound [n, c], as long as the shot, and notes."""
    count = timeline.sample(placed.end) - timeline.sample(placed.start)
    asked = placed.shot.sound
    if asked is not None and asked.file is not None:
        sound, notes = mix.fit_sound(timeline.script.file(asked.file), count, loop=asked.loop,
                                     repeating="loop: true")
    elif (own := read_sound(path)) is not None:
        sound, notes = mix.at_length(*own, count), []
    else:
        return None, []
    _amplify(sound, 0.0 if asked is None else asked.gain_db)
    return sound, notes


def _shape(sound: Samples, timeline: Timeline, index: int) -> None:
    """Fade a shot's sound in and out with its picture, in place."""
    before, after = timeline.faded(index)
    seam = min(round(mix.SEAM_S * RATE), len(sound) // 4)
    coming, going = (min(timeline.sample(frames), len(sound)) for frames in (before, after))
    if coming:
        sound[:coming] *= _equal_power(coming)[::-1, None]
    elif index:
        mix.rise(sound, 0, seam)
    if going:
        sound[len(sound) - going :] *= _equal_power(going)[:, None]
    elif index < len(timeline.shots) - 1:
        mix.fade(sound, len(sound) - seam, len(sound))


def music_spans(timeline: Timeline) -> Iterator[tuple[Placed, int]]:
    """Yield each shot with which music changes, and the frame of the next change."""
    changes = [placed for placed in timeline.shots if placed.shot.music is not None]
    for placed, following in zip_longest(changes, changes[1:]):
        yield placed, timeline.num_frames if following is None else following.start


def _add_music(bed: Samples, script: Script, music: Music, first: int, last: int) -> list[str]:
    """Add music from sample `first` up to `last`, after which it fades out; return notes."""
    going = min(round(MUSIC_FADE_S * RATE), len(bed) - last)
    count = last - first + going
    assert music.file is not None
    sound, notes = mix.fit_sound(script.file(music.file), count, loop=music.loop,
                                 repeating="loop: true")
    _amplify(sound, music.gain_db)
    if not going:  # the film ends with it
        going = min(round(MUSIC_FADE_S * RATE), count // 4)
    sound[count - going :] *= _equal_power(going)[:, None]
    if first:
        coming = min(round(MUSIC_FADE_S * RATE), count // 4)
        sound[:coming] *= _equal_power(coming)[::-1, None]
    _add(bed, sound, first)
    return notes


def _add(bed: Samples, sound: Samples, first: int) -> None:
    """Add a sound [n, c] to the bed [N, 2], in place, block by block."""
    count = min(len(sound), len(bed) - first)
    for start, stop in pairwise([*range(0, count, _STEP), count]):
        bed[first + start : first + stop] += sound[start:stop]


def _amplify(sound: Samples, gain_db: float) -> None:
    if gain_db:
        sound *= np.float32(10 ** (gain_db / 20))


def _equal_power(length: int) -> Samples:
    """Return a ramp from 1 to 0 whose square and its mirror image's sum to 1."""
    return np.cos(np.pi / 2 * (np.arange(length) + 0.5) / max(1, length)).astype(np.float32)


def file_facts(timeline: Timeline) -> list[dict[str, str]]:
    """Return name and SHA-256 of every sound file, for the recipe."""
    files = dict.fromkeys(file for placed in timeline.shots
                          for file in _files_of(timeline.script, placed.shot))
    return [{"path": path.name, "sha256": sha256_file(path)} for path in files]
