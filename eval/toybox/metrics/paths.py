"""Whether a sprite goes the way its motion goes: tracks against the world's own families of paths.

A motion's family are the paths that the world itself draws for it, in all speeds, directions and
phases. A track is laid on each of them, free in place and, within bounds, in reach; what is left is
how far it is off. The asked camera is taken out first, so a pan that isn't made counts against the
path, too.

Axes: T frames, N members of a family.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from eval.toybox.metrics.tracking import Array, Sighting, asked_camera
from train.toybox.world.motion import Clock, actor_tracks, frame_sides
from train.toybox.world.scenes import DIRECTIONS_FOR, MOTIONS, PACED_MOTIONS, SPEEDS, Actor, Scene

#: Motions by their paths: what spins stays where it is, as far as a path tells.
PATHS = tuple(motion for motion in MOTIONS if motion != "spins")
REACH = (0.75, 1.35)  # by which a member's displacements may be stretched
FEWEST_FRAMES = 5  # in which the sprite has to be seen
_MEMBERS = 96  # of each motion, its speeds and directions together
_GROWTH = 0.15  # of the frame's side that an octave in size counts for
_STAND_IN = "doughnut"  # round, and it goes without hops or waves: its path serves for all


@dataclass(frozen=True)
class PathFit:
    """How a clip's path fits.

    Attributes:
        path: the motion of the nearest family; None where the sprite is hardly seen.
        off: root mean square distance to the family of the truth, in shares of the frame's side;
            None likewise.
    """

    path: str | None
    off: float | None


def path_of(motion: str) -> str:
    """The path of a motion."""
    return "stays" if motion == "spins" else motion


def fit_path(
    sighting: Sighting, scene: Scene, height: int = 128, width: int = 128, fps: float = 12.0
) -> PathFit:
    """Lay a clip's track on the families of all motions.

    Args:
        sighting: of the clip's sprite.
        scene: the truth; of two actors the first one's motion counts.
        height: of the frame, in pixels; with `width` it is the frame's aspect.
        width: likewise.
        fps: frames a second.
    """
    frames, seen = len(sighting.seen), _usable(sighting)
    if seen.sum() < FEWEST_FRAMES:
        return PathFit(None, None)
    track = world_track(sighting, scene, height, width, fps)[seen]
    families = _families(frames, height, width, fps)
    misfits = {path: _misfit(track, members[:, seen]) for path, members in families.items()}
    nearest = min(misfits, key=misfits.__getitem__)
    return PathFit(nearest, misfits[path_of(scene.actors[0].motion)])


def world_track(
    sighting: Sighting, scene: Scene, height: int, width: int, fps: float
) -> Array:
    """A clip's track in world units, its asked camera taken out: [T, 3] of (x, y, growth)."""
    camera, sides = asked_camera(scene, len(sighting.seen), height, width, fps)
    x = (sighting.x - 0.5) * sides[0] / camera.zoom + camera.x
    y = (sighting.y - 0.5) * sides[1] / camera.zoom + camera.y
    return np.stack([x, y, _growth(sighting.extent / camera.zoom)], axis=-1)


def _growth(size: Array) -> Array:
    growth: Array = _GROWTH * np.log2(np.maximum(size, 1e-3))
    return growth


def _usable(sighting: Sighting) -> NDArray[np.bool_]:
    """Frames in which the sprite is seen as a whole: cut by an edge, its middle can't be told."""
    half = sighting.extent / 2
    inside = (np.abs(sighting.x - 0.5) + half < 0.5) & (np.abs(sighting.y - 0.5) + half < 0.5)
    usable: NDArray[np.bool_] = sighting.seen & inside
    return usable if usable.sum() >= FEWEST_FRAMES else sighting.seen


def _misfit(track: Array, members: Array) -> float:
    """Root mean square distance of a track [T, 3] to the nearest of members [N, T, 3]."""
    moved = track - track.mean(0)
    theirs = members - members.mean(1, keepdims=True)
    way, wanted = theirs[..., :2], moved[:, :2]
    power = np.square(way).sum((1, 2)).clip(min=1e-12)
    reach = ((way * wanted).sum((1, 2)) / power).clip(*REACH)
    off = np.square(way * reach[:, None, None] - wanted).sum((1, 2))
    off += np.square(theirs[..., 2] - moved[:, 2]).sum(1)
    return float(np.sqrt(off.min() / len(track)))


@lru_cache(maxsize=4)
def _families(num_frames: int, height: int, width: int, fps: float) -> dict[str, Array]:
    """The paths of every motion in `PATHS`, [N, T, 3] each, for a still camera."""
    clock, sides = Clock(num_frames, fps), frame_sides(height, width)
    progress = clock.progress(np.arange(num_frames, dtype=float))
    found = {}
    for motion in PATHS:
        kinds = [
            (speed, direction)
            for speed in (SPEEDS if motion in PACED_MOTIONS else ("normal",))
            for direction in DIRECTIONS_FOR.get(motion, (None,))
        ]
        members = []
        for seed in range(1 if motion == "stays" else _MEMBERS):
            speed, direction = kinds[seed % len(kinds)]
            actor = Actor(_STAND_IN, motion, speed=speed, direction=direction)
            (track,) = actor_tracks(Scene(seed, (actor,)), sides, clock, progress)
            size = np.sqrt(track.width * track.height)
            members.append(np.stack([track.x, track.y, _growth(size)], axis=-1))
        found[motion] = np.stack(members)
    return found
