"""What really happens in a clip: tracks in pixels, masks, optical flow, events with exact times.

Axes: A actors, T frames, H rows, W columns. Pixels count from the frame's top left corner; the
centre of the first pixel is (0.5, 0.5).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from train.toybox.world.cues import Cue, cues_of
from train.toybox.world.motion import (
    Array,
    Camera,
    Clock,
    Track,
    actor_tracks,
    camera_track,
    frame_sides,
    sheet_description,
)
from train.toybox.world.render import render, sprite_area
from train.toybox.world.scenes import Scene

_PROBES = 16  # looks a frame between which an event is searched


class Event(NamedTuple):
    """Something that happens at one moment.

    kind: "contact" (a bounce meets the floor), "enter" and "leave" (the first or last bit of an
    actor's outline crosses the frame's edge), "cross" (what drives past is in the frame's middle),
    "pass" (two actors are abreast).
    """

    kind: str
    seconds: float
    actor: int


@dataclass(frozen=True)
class ActorTruth:
    """One actor, frame by frame.

    position: centre in pixels, [T, 2] as (x, y).
    scale: sides of the sprite's outline in pixels before rotation, [T, 2] as (width, height).
    angle: radians, clockwise, [T].
    visible: share of the sprite that the frame shows uncovered, [T].
    """

    position: Array
    scale: Array
    angle: Array
    visible: Array


@dataclass(frozen=True)
class Truth:
    """The ground truth of one clip.

    camera: what the camera looks at and magnification, [T, 3] as (x, y, zoom) with x and y in
        pixels of an unmagnified frame, (0, 0) being the frame's middle.
    masks: what is seen of each actor, [A, T, H, W] in [0, 1].
    flow: where each point of frame t is in frame t + 1, [T - 1, 2, H, W] in pixels (x, y);
        moving water, clouds and particles of weather are not in it.
    tracked: 1 where that point is still seen in frame t + 1, [T - 1, H, W].
    cues: what begins to be heard, to the sample.
    """

    actors: tuple[ActorTruth, ...]
    camera: Array
    masks: Tensor
    flow: Tensor
    tracked: Tensor
    events: tuple[Event, ...]
    cues: tuple[Cue, ...]


def ground_truth(
    scene: Scene, num_frames: int = 33, height: int = 128, width: int = 128, fps: float = 12.0
) -> Truth:
    """Return all that is known of the clip that `render` makes with the same arguments."""
    view = _View(scene, Clock(num_frames, fps), height, width)
    progress = view.clock.progress(np.arange(num_frames, dtype=np.float64))
    camera, tracks = view.at(progress)
    masks = render([scene], num_frames, height, width, fps).masks[0, : len(tracks)]
    actors = tuple(
        ActorTruth(
            position=np.stack(view.to_pixels(camera, track), -1),
            scale=np.stack(view.outline(camera, track, index), -1),
            angle=track.angle,
            visible=_visible(view, camera, track, index, masks[index]),
        )
        for index, track in enumerate(tracks)
    )
    unit = math.sqrt(height * width)
    flow, tracked = _flow(view, camera, tracks, masks)
    return Truth(
        actors=actors,
        camera=np.stack([camera.x * unit, camera.y * unit, camera.zoom], -1),
        masks=masks,
        flow=flow,
        tracked=tracked,
        events=events(scene, num_frames, height, width, fps),
        cues=cues_of(scene, tracks, view.clock),
    )


def actor_centres(
    scene: Scene, frames: Sequence[float], num_frames: int, height: int, width: int, fps: float
) -> Array:
    """Where the actors' middles are at some moments of a clip, in pixels, [A, n, 2] as (x, y).

    Args:
        scene: the scene.
        frames: n of the clip's frames, or moments between two of them.
        num_frames: of the clip.
        height: of its frames.
        width: likewise.
        fps: its rate.
    """
    view = _View(scene, Clock(num_frames, fps), height, width)
    camera, tracks = view.at(view.clock.progress(np.asarray(frames, dtype=np.float64)))
    return np.stack([np.stack(view.to_pixels(camera, track), -1) for track in tracks])


class _View:
    """A scene seen through its camera: world to pixels at any clip time."""

    def __init__(self, scene: Scene, clock: Clock, height: int, width: int) -> None:
        self.scene, self.clock = scene, clock
        self.height, self.width = height, width
        self.sides, self.unit = frame_sides(height, width), math.sqrt(height * width)
        extents = sheet_description()["extents"]
        self.extents: list[list[float]] = [extents[a.sprite] for a in scene.actors]

    def at(self, progress: Array) -> tuple[Camera, list[Track]]:
        camera = camera_track(self.scene, self.sides, progress)
        return camera, actor_tracks(self.scene, self.sides, self.clock, progress)

    def to_pixels(self, camera: Camera, track: Track) -> tuple[Array, Array]:
        scale = camera.zoom * self.unit
        x = (track.x - camera.x) * scale + self.width / 2
        return x, (track.y - camera.y) * scale + self.height / 2

    def outline(self, camera: Camera, track: Track, index: int) -> tuple[Array, Array]:
        scale = camera.zoom * self.unit
        wide, tall = self.extents[index]
        return track.width * scale * wide, track.height * scale * tall

    def outside(self, progress: Array, index: int) -> Array:
        """Return how far an actor's upright outline is out of the frame, negative inside."""
        camera, tracks = self.at(progress)
        track = tracks[index]
        (x, y), (wide, tall) = self.to_pixels(camera, track), self.outline(camera, track, index)
        reach_x = (np.abs(np.cos(track.angle)) * wide + np.abs(np.sin(track.angle)) * tall) / 2
        reach_y = (np.abs(np.sin(track.angle)) * wide + np.abs(np.cos(track.angle)) * tall) / 2
        across = np.abs(x - self.width / 2) - self.width / 2 - reach_x
        return np.maximum(across, np.abs(y - self.height / 2) - self.height / 2 - reach_y)


def _visible(view: _View, camera: Camera, track: Track, index: int, mask: Tensor) -> Array:
    """Return the seen share of an actor: its mask's area over the area of the whole sprite."""
    whole = sprite_area(view.scene.actors[index].sprite) * track.width * track.height
    seen = mask.sum((1, 2)).double().numpy() / (camera.zoom * view.unit) ** 2
    return np.minimum(seen / whole, 1.0)


def _flow(view: _View, camera: Camera, tracks: list[Track], masks: Tensor) -> tuple[Tensor, Tensor]:
    """Carry every pixel along with what it shows: the front actor there, or else the place."""
    height, width, frames = view.height, view.width, len(camera.x)
    py, px = np.mgrid[:height, :width] + 0.5
    flow = np.zeros((frames - 1, 2, height, width))
    tracked = np.zeros((frames - 1, height, width))
    solid = masks.numpy() > 0.5
    owner = np.full(solid.shape[1:], -1)
    for index in reversed(range(len(tracks))):
        owner[solid[index]] = index
    maps = [_place_map(view, camera), *(_actor_map(view, camera, track) for track in tracks)]
    for t in range(frames - 1):
        for index, affine in enumerate(maps, start=-1):
            step = affine(t + 1) @ np.linalg.inv(affine(t))
            here = owner[t] == index
            x = step[0, 0] * px + step[0, 1] * py + step[0, 2]
            y = step[1, 0] * px + step[1, 1] * py + step[1, 2]
            flow[t, 0][here], flow[t, 1][here] = (x - px)[here], (y - py)[here]
            column, row = np.floor(x).astype(int), np.floor(y).astype(int)
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            there = owner[t + 1][row.clip(0, height - 1), column.clip(0, width - 1)]
            tracked[t][here] = (inside & (there == index))[here]
    return torch.from_numpy(flow).float(), torch.from_numpy(tracked).float()


def _place_map(view: _View, camera: Camera) -> Callable[[int], NDArray[np.float64]]:
    def affine(t: int) -> NDArray[np.float64]:
        scale = camera.zoom[t] * view.unit
        return np.array([
            [scale, 0, view.width / 2 - camera.x[t] * scale],
            [0, scale, view.height / 2 - camera.y[t] * scale],
            [0, 0, 1],
        ])  # fmt: skip

    return affine


def _actor_map(view: _View, camera: Camera, track: Track) -> Callable[[int], NDArray[np.float64]]:
    place = _place_map(view, camera)

    def affine(t: int) -> NDArray[np.float64]:
        cos, sin = math.cos(track.angle[t]), math.sin(track.angle[t])
        wide, tall = track.width[t], track.height[t]
        to_world = np.array(
            [[cos * wide, -sin * tall, track.x[t]], [sin * wide, cos * tall, track.y[t]], [0, 0, 1]]
        )
        mapped: NDArray[np.float64] = place(t) @ to_world
        return mapped

    return affine


def events(
    scene: Scene, num_frames: int = 33, height: int = 128, width: int = 128, fps: float = 12.0
) -> tuple[Event, ...]:
    """Return what happens in a clip, in order of time; times are exact to a microsecond."""
    view = _View(scene, Clock(num_frames, fps), height, width)
    if num_frames == 1:
        return ()
    duration = view.clock.duration_s
    _, tracks = view.at(np.zeros(1))
    found = []
    for index, track in enumerate(tracks):
        found += [Event("contact", float(at * duration), index) for at in track.contacts]
        for at, rising in _crossings(partial(view.outside, index=index), num_frames):
            found.append(Event("leave" if rising else "enter", float(at * duration), index))
        if scene.actors[index].motion == "drives past":
            for at, _ in _crossings(partial(_from_middle, view, index=index), num_frames):
                found.append(Event("cross", float(at * duration), index))
    if scene.relation == "passes":
        for at, _ in _crossings(lambda u: _apart(view, u), num_frames):
            found.append(Event("pass", float(at * duration), 0))
    return tuple(sorted(found, key=lambda event: event.seconds))


def _from_middle(view: _View, progress: Array, index: int) -> Array:
    camera, tracks = view.at(progress)
    return view.to_pixels(camera, tracks[index])[0] - view.width / 2


def _apart(view: _View, progress: Array) -> Array:
    _, (first, second) = view.at(progress)
    return first.x - second.x


def _crossings(distance: Callable[[Array], Array], num_frames: int) -> list[tuple[float, bool]]:
    """Find the clip times in [0, 1] where a distance changes sign, and whether it rises there."""
    probes = np.linspace(0, 1, (num_frames - 1) * _PROBES + 1)
    above = distance(probes) > 0
    found = []
    for k in np.flatnonzero(above[1:] != above[:-1]):
        low, high = probes[k], probes[k + 1]
        for _ in range(24):
            middle = (low + high) / 2
            if (distance(np.array([middle]))[0] > 0) == above[k]:
                low = middle
            else:
                high = middle
        found.append(((low + high) / 2, not bool(above[k])))
    return found
