"""What of a scene is heard to begin, and when: the truth behind its sound.

Whatever comes to a mark is heard there, by one syllable: a bounce at the floor, a swing at its
ends, a turn when it is whole. Who has no such mark calls now and then.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from train.toybox.world.motion import Clock, Track, actor_tracks, frame_sides
from train.toybox.world.scenes import Draws, Scene
from train.toybox.world.voices import VOICES, Call

SAMPLE_RATE = 16_000
FIRST_CALL, REST = (0.06, 0.45), (0.3, 0.7)  # seconds


class Cue(NamedTuple):
    """A sound that begins.

    kind: "impact" (a bounce meets the floor), "call" (a sprite's own sound) or "note" (a further
        syllable of it).
    sample: the first one that is heard of it; 0 is the clip's beginning.
    """

    kind: str
    sample: int
    actor: int

    @property
    def seconds(self) -> float:
        """When, counted from the clip's first frame."""
        return self.sample / SAMPLE_RATE


def num_samples(clock: Clock) -> int:
    """Return the samples of a clip's sound, which lasts as long as its frames are shown."""
    return round(clock.num_frames / clock.fps * SAMPLE_RATE)


def sound_cues(
    scene: Scene, num_frames: int = 33, height: int = 128, width: int = 128, fps: float = 12.0
) -> tuple[Cue, ...]:
    """Return the onsets of the sound that goes with the clip of these arguments, in order."""
    clock = Clock(num_frames, fps)
    return cues_of(scene, _tracks(scene, clock, height, width), clock)


def scene_marks(
    scene: Scene, num_frames: int = 33, height: int = 128, width: int = 128, fps: float = 12.0
) -> list[float]:
    """Return when, in seconds, any of a scene's actors comes to a mark, heard or not."""
    clock = Clock(num_frames, fps)
    return [at for track in _tracks(scene, clock, height, width) for at in _marks(track, clock)]


def cues_of(scene: Scene, tracks: list[Track], clock: Clock) -> tuple[Cue, ...]:
    """Return a scene's cues; `tracks` are its actors', at any clip times."""
    end, found = num_samples(clock), []
    for index, (actor, track) in enumerate(zip(scene.actors, tracks, strict=True)):
        marks = _marks(track, clock)
        times = [("impact", at * clock.duration_s) for at in track.contacts]
        voice = VOICES[actor.sprite]
        if isinstance(voice, Call) and marks:
            times += [("call", at) for at in marks]
        elif isinstance(voice, Call):
            draws = Draws(scene.seed, stream=20 + index)
            for at in _now_and_then(draws, voice.duration_s, end / SAMPLE_RATE):
                notes = [at + k * voice.gap_s for k in range(1, len(voice.notes))]
                times += [("call", at), *(("note", note) for note in notes)]
        found += [Cue(kind, round(at * SAMPLE_RATE), index) for kind, at in times]
    return tuple(sorted((cue for cue in found if cue.sample < end), key=lambda cue: cue.sample))


def _tracks(scene: Scene, clock: Clock, height: int, width: int) -> list[Track]:
    return actor_tracks(scene, frame_sides(height, width), clock, np.zeros(1))


def _marks(track: Track, clock: Clock) -> list[float]:
    return [at * clock.duration_s for at in (*track.contacts, *track.turns)]


def _now_and_then(draws: Draws, lasts_s: float, seconds: float) -> list[float]:
    """Draw when a voice calls; at least once, however short the clip is."""
    times = [draws.uniform(*FIRST_CALL) * min(1.0, seconds)]
    while (after := times[-1] + lasts_s + draws.uniform(*REST)) < seconds:
        times.append(after)
    return times
