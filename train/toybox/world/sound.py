"""Scenes to sound: what actors do and where they are, 16 kHz mono, to the sample.

Voices call or drone (`voices`), impacts thud by size, what moves rushes by speed, and the place
goes on behind them (`ambience`). When each sound begins is in `cues`.

Axes: B scenes, N samples, K points of control, one each `STEP` samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from train.toybox.world.ambience import ambient_sound
from train.toybox.world.cast import SPRITES
from train.toybox.world.cues import SAMPLE_RATE, Cue, cues_of, num_samples
from train.toybox.world.motion import Camera, Clock, Track, actor_tracks, camera_track, frame_sides
from train.toybox.world.noise import uniform_noise
from train.toybox.world.scenes import SIZES, Draws, Scene
from train.toybox.world.voices import (
    VOICES,
    Array,
    Drone,
    Spectrum,
    partials,
    ring_call,
    shape_noise,
    tremolo,
)
from vidgen.core.errors import InputError

STEP = 64
CALL, DRONE, IMPACT, RUSH = 0.38, 0.20, 0.50, 0.30
_FADE = 160  # samples in which a call gives way to the next one of the same voice
#: Of an impact by size: Hz after the drop, time constant in seconds, level.
_THUDS = {"small": (205.0, 0.035, 0.6), "medium": (132.0, 0.055, 0.8), "large": (82.0, 0.085, 1.0)}
#: Share of an impact that is a click: hard things and soft ones.
_HARD = {"thing": 0.40, "vehicle": 0.45, "aircraft": 0.45, "boat": 0.40}


class _Course(NamedTuple):
    """How one actor goes, at the points of control, [K].

    speed: of its fastest part, in frame sides a second.
    level: by its distance from the middle of the view and its apparent size.
    """

    speed: Array
    level: Array


def synthesize(
    scenes: Sequence[Scene],
    num_frames: int = 33,
    height: int = 128,
    width: int = 128,
    fps: float = 12.0,
) -> Tensor:
    """Make the sound of clips, to go with what `render` makes of the same arguments.

    Args:
        scenes: B scenes.
        num_frames: length of the clip; the sound lasts as long as its frames are shown.
        height: rows; with `width` the frame's aspect, from which ways and speeds follow.
        width: columns.
        fps: frames a second.

    Returns:
        [B, N] float32 within (-1, 1), at `SAMPLE_RATE`.

    Raises:
        InputError: no scenes, or a size, length or rate that is not positive.
    """
    if not scenes or min(num_frames, height, width) < 1 or fps <= 0:
        raise InputError("synthesize needs a scene, and positive num_frames, height, width and fps")
    clock, sides = Clock(num_frames, fps), frame_sides(height, width)
    mixed = np.stack([_mix(scene, sides, clock) for scene in scenes])
    return torch.from_numpy(np.tanh(mixed).astype(np.float32))


def _mix(scene: Scene, sides: tuple[float, float], clock: Clock) -> Array:
    count = num_samples(clock)
    total = ambient_sound(scene, count, SAMPLE_RATE)
    points = np.arange(0, count + STEP, STEP) / SAMPLE_RATE
    progress = clock.progress(points * clock.fps)
    camera = camera_track(scene, sides, progress)
    tracks = actor_tracks(scene, sides, clock, progress)
    cues = cues_of(scene, tracks, clock)
    for index, track in enumerate(tracks):
        course = _course(camera, track)
        own = [cue for cue in cues if cue.actor == index]
        total += _actor_sound(scene, index, course, own, count)
    return total


def _course(camera: Camera, track: Track) -> _Course:
    rate = SAMPLE_RATE / STEP
    ways = [np.gradient(way) * rate for way in (track.x, track.y, track.angle, track.width)]
    speed = np.sqrt(sum(np.square(w) for w in (*ways[:2], ways[2] * track.width / 2, ways[3] / 2)))
    off = 2 * np.hypot(track.x - camera.x, track.y - camera.y)
    apparent = track.width * camera.zoom / SIZES["medium"]
    return _Course(speed, apparent**0.6 / (1 + 0.5 * off**4))


def _actor_sound(
    scene: Scene, index: int, course: _Course, cues: Sequence[Cue], count: int
) -> Array:
    """Return one actor's voice, impacts and rush of air, [N]."""
    actor, draws = scene.actors[index], Draws(scene.seed, stream=25 + index)
    factor = draws.uniform(0.97, 1.03)
    spectrum = np.fft.rfft(uniform_noise([scene.seed], 60 + index, count)[0].astype(float) - 0.5)
    voice, total = VOICES[actor.sprite], np.zeros(count)
    points = np.arange(0, count + STEP, STEP)
    speed, level = (np.interp(np.arange(count), points, way) for way in course)
    if isinstance(voice, Drone):
        total += DRONE * level * _drone(voice, factor, speed, spectrum)
    else:
        called = [cue.sample for cue in cues if cue.kind == "call"]
        if all(cue.kind != "note" for cue in cues):
            voice = replace(voice, notes=voice.notes[:1])
        _lay(total, CALL * ring_call(voice, scene.seed, factor, SAMPLE_RATE), called, level)
    thud = IMPACT * impact_sound(actor.size, SPRITES[actor.sprite].kind, scene.seed)
    _lay(total, thud, [cue.sample for cue in cues if cue.kind == "impact"], np.ones(count))
    strength = 1.0 if actor.motion == "drives past" else 0.12
    return total + strength * RUSH * level * _rush(speed, spectrum)


def _lay(total: Array, sound: Array, starts: Sequence[int], level: Array) -> None:
    """Add a sound at each start, as loud as the level there; each gives way to the next one."""
    for start, after in pairwise((*starts, len(total))):
        part = sound[: after - start].copy()
        if len(part) < len(sound):
            fade = min(_FADE, len(part))
            part[len(part) - fade :] *= np.linspace(1, 0, fade)
        total[start : start + len(part)] += part * level[start]


def _drone(drone: Drone, factor: float, speed: Array, spectrum: Spectrum) -> Array:
    pitch = factor * drone.pitch * (1 + drone.reach * np.minimum(speed, 1.5))
    tone = partials(drone.timbre, pitch, drone.formants, SAMPLE_RATE)
    tone = tone / max(np.abs(tone).max(), 1e-9)
    hiss = shape_noise(spectrum, drone.band, len(speed), SAMPLE_RATE) / 3
    beat = np.cumsum(pitch / drone.pitch) / SAMPLE_RATE
    mixed: Array = (1 - drone.noise) * tone + drone.noise * hiss
    mixed *= tremolo(drone.flutter, beat)
    return mixed


def _rush(speed: Array, spectrum: Spectrum) -> Array:
    """Return the rush of air at a speed [N]: louder and brighter the faster, [N]."""
    force = np.minimum(speed / 0.6, 1.4) ** 1.5
    bright = np.clip(speed / 1.2, 0, 1)
    low, high = (
        shape_noise(spectrum, band, len(speed), SAMPLE_RATE) for band in ((250, 900), (900, 3500))
    )
    return force * ((1 - bright) * low + bright * high) / 3


def impact_sound(size: str, kind: str, seed: int) -> Array:
    """Return the thud of a sprite that meets the floor, [N]; deeper and longer the larger it is.

    Args:
        size: of `SIZES`.
        kind: of the sprite; hard ones click more.
        seed: of the click's noise.
    """
    pitch, decay_s, level = _THUDS[size]
    seconds = np.arange(round(6 * decay_s * SAMPLE_RATE)) / SAMPLE_RATE
    falling = pitch * (1 + 0.8 * np.exp(-seconds / 0.012))
    body = np.sin(math.tau * np.cumsum(falling) / SAMPLE_RATE) * np.exp(-seconds / decay_s)
    grain = uniform_noise([seed], 45, len(seconds))[0] * 2.0 - 1
    click = grain * np.exp(-seconds / 0.006)
    share = _HARD.get(kind, 0.28)
    struck: Array = level * ((1 - share) * body + share * click)
    return struck
