"""Where actors and camera are at any moment of a clip.

World units: the frame's geometric mean side is 1, its centre is (0, 0) for a still camera, x grows
to the right and y down, angles turn clockwise. A motion is a function of the clip's own time u in
[0, 1]: a clip of 17 frames shows the whole way, as one of 33 does, only faster; so each keeps the
world identifiable (a quarter of the frame of displacement, one and a half periods). Beyond `LONG_S`
seconds periodic motions get more periods instead of slower ones.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from train.toybox.world.cast import SPRITES
from train.toybox.world.scenes import SIZES, Actor, Draws, Scene

Array = NDArray[np.float64]
ASSETS = Path(__file__).parent.parent / "assets" / "world"

LONG_S = 32 / 12
PAN = 0.30  # of the frame's side along the pan
ZOOM_WIDE, ZOOM_CLOSE = 0.89, 1.35
_WAY = {"slow": 0.31, "normal": 0.46, "fast": 0.66}  # of the frame's side
_CYCLES = {"slow": 1.5, "normal": 2.0, "fast": 2.75}
_BOUNCES = {"slow": 1.5, "normal": 2.25, "fast": 3.25}
_STEPS = {"slow": 3.0, "normal": 4.0, "fast": 6.0}
_SWING = math.radians(40)
_SHRUNK = 1 / 3.2


class Clock(NamedTuple):
    """A clip's length; ``moments`` are frame indices, whole or not."""

    num_frames: int
    fps: float

    @property
    def duration_s(self) -> float:
        """Seconds from the first frame to the last."""
        return (self.num_frames - 1) / self.fps

    def progress(self, moments: Array) -> Array:
        """Map frame indices to the clip's time in [0, 1]; a still stands in the middle."""
        if self.num_frames == 1:
            return np.full(moments.shape, 0.5)
        return moments / (self.num_frames - 1)


class Camera(NamedTuple):
    """Centre of the view in world units and magnification, each [T]."""

    x: Array
    y: Array
    zoom: Array


@dataclass(frozen=True)
class Track:
    """One actor's way: centre, extent along its own axes, angle in radians, each [T]."""

    x: Array
    y: Array
    width: Array
    height: Array
    angle: Array
    flipped: bool
    contacts: tuple[float, ...] = ()  # clip times u at which a bounce touches the floor
    turns: tuple[float, ...] = ()  # clip times u of whole turns, or of a swing's ends


class _Stage(NamedTuple):
    """The part of the world an actor is free to use: centre and half sides."""

    x: float
    y: float
    half_x: float
    half_y: float


@lru_cache(maxsize=1)
def sheet_description() -> dict[str, Any]:
    """Read sprites.json: tile size, margin, columns, and each sprite's extents (width, height)."""
    description: dict[str, Any] = json.loads((ASSETS / "sprites.json").read_text())
    return description


def frame_sides(height: int, width: int) -> tuple[float, float]:
    """Return the frame's (width, height) in world units; a unit is sqrt(height * width) pixels."""
    unit = math.sqrt(height * width)
    return width / unit, height / unit


def camera_track(scene: Scene, sides: tuple[float, float], progress: Array) -> Camera:
    """Return the camera's way; pans and zooms run evenly over the whole clip."""
    zero = np.zeros_like(progress)
    kind, _, way = scene.camera.partition(" ")
    if kind == "pan":
        sign = 1.0 if way in ("right", "down") else -1.0
        across = way in ("left", "right")
        shift = sign * PAN * sides[0 if across else 1] * (progress - 0.5)
        return Camera(shift, zero, zero + 1) if across else Camera(zero, shift, zero + 1)
    if kind == "zoom":
        first, last = (ZOOM_WIDE, ZOOM_CLOSE) if way == "in" else (ZOOM_CLOSE, ZOOM_WIDE)
        return Camera(zero, zero, first * (last / first) ** progress)
    return Camera(zero, zero, zero + 1)


def actor_tracks(
    scene: Scene, sides: tuple[float, float], clock: Clock, progress: Array
) -> list[Track]:
    """Return each actor's way at the given clip times.

    Args:
        scene: the scene.
        sides: frame (width, height) in world units, see `frame_sides`.
        clock: the clip's length.
        progress: clip times u in [0, 1], [T].
    """
    draws = [Draws(scene.seed, stream=10 + index) for index in range(len(scene.actors))]
    unit = max(1.0, 0.85 * sides[1])  # upright frames show things larger: 20% of their height
    sizes = [
        SIZES[actor.size] * unit * draw.uniform(0.95, 1.05)
        for actor, draw in zip(scene.actors, draws, strict=True)
    ]
    stages = _stages(scene, sides, sizes)
    return [
        _Mover(actor, scene.relation, stage, sides, size, draw, clock).track(progress)
        for actor, stage, size, draw in zip(scene.actors, stages, sizes, draws, strict=True)
    ]


def _stages(scene: Scene, sides: tuple[float, float], sizes: list[float]) -> list[_Stage]:
    """Give each actor its part of what the camera shows from first to last frame."""
    half_x, half_y = sides[0] / 2, sides[1] / 2
    kind, _, way = scene.camera.partition(" ")
    if kind == "zoom":
        half_x, half_y = half_x / ZOOM_CLOSE, half_y / ZOOM_CLOSE
    elif kind == "pan" and way in ("left", "right"):
        half_x *= 1 - PAN
    elif kind == "pan":
        half_y *= 1 - PAN
    first = 1.0 if Draws(scene.seed, stream=9).chance(0.5) else -1.0
    if scene.relation == "next to":
        return [_Stage(s * half_x / 2, 0.0, half_x / 2, half_y) for s in (first, -first)]
    if scene.relation in ("above", "passes"):
        return [_Stage(0.0, s * half_y / 2, half_x, half_y / 2) for s in (-1.0, 1.0)]
    if scene.relation == "chases":
        gap = 0.53 * sum(sizes) * (1 if scene.actors[0].motion == "moves right" else -1)
        return [_Stage(s * gap / 2, 0.0, half_x - abs(gap) / 2, half_y) for s in (-1.0, 1.0)]
    return [_Stage(0.0, 0.0, half_x, half_y)] * len(scene.actors)


#: Where a kind of sprite likes to be, as a share of the frame's height below its middle.
_HEIGHTS = {"vehicle": 0.19, "animal": 0.17, "boat": 0.12, "swimmer": 0.06, "thing": 0.08,
            "flyer": -0.10, "aircraft": -0.13}  # fmt: skip


class _Mover:
    """One actor's motion over the clip; the draws fix all that the description leaves open."""

    def __init__(
        self,
        actor: Actor,
        relation: str | None,
        stage: _Stage,
        sides: tuple[float, float],
        size: float,
        draws: Draws,
        clock: Clock,
    ) -> None:
        self.actor, self.relation, self.stage, self.sides = actor, relation, stage, sides
        self.size, self.clock = size, clock
        self.at_x, self.at_y = draws.uniform(-0.8, 0.8), draws.uniform(-0.06, 0.06)
        self.phase, self.vigour = draws.uniform(), draws.uniform(0.96, 1.06)
        self.tall = sheet_description()["extents"][actor.sprite][1]
        self.kind = SPRITES[actor.sprite].kind
        self.more = max(1.0, clock.duration_s / LONG_S)

    def track(self, u: Array) -> Track:
        """Return the way at clip times u [T]."""
        zero = np.zeros_like(u)
        motion = self.actor.motion
        turns: tuple[float, ...] = ()
        if motion in ("moves left", "moves right"):
            x, y, angle = self._crossing(u, motion == "moves right")
        elif motion == "drives past":
            x, y, angle = self._passing(u, self.actor.direction == "right")
        elif motion in ("rises", "falls"):
            x, y = self._climbing(u, motion == "rises")
            angle = zero
        elif motion == "bounces":
            return self._bouncing(u)
        elif motion == "swings":
            x, y, angle = self._swinging(u)
            turns = self._marks(2 * self._cycles(_CYCLES), 2 * self.phase - 0.5)
        elif motion == "circles":
            x, y = self._circling(u)
            angle, turns = zero, self._marks(self._cycles(_CYCLES), self._turn() * self.phase)
        elif motion in ("grows", "shrinks"):
            return self._growing(u, motion == "grows")
        else:
            x0, y0 = self._base(0.0, 0.0)
            x, y, angle = zero + x0, zero + y0, zero
            if motion == "spins":
                angle = self._turn() * math.tau * self._cycles(_CYCLES) * u
                turns = self._marks(self._cycles(_CYCLES), 0.0)
        size = np.full_like(x, self.size)
        return Track(x, y, size, size, angle, self._flipped(), turns=turns)

    def _marks(self, cycles: float, phase: float) -> tuple[float, ...]:
        """Return the clip times in [0, 1] at which `cycles * u + phase` is whole."""
        first, last = math.ceil(phase), math.floor(cycles + phase)
        return tuple((k - phase) / cycles for k in range(first, last + 1))

    def _cycles(self, table: dict[str, float]) -> float:
        return table[self.actor.speed] * self.more

    def _turn(self) -> float:
        return -1.0 if self.actor.direction == "counterclockwise" else 1.0

    def _flipped(self) -> bool:
        motion, faces = self.actor.motion, SPRITES[self.actor.sprite].faces
        heading = motion.split()[-1] if motion.startswith("moves") else self.actor.direction
        return (faces, heading) in (("left", "right"), ("right", "left"))

    def _base(self, reach_x: float, reach_y: float) -> tuple[float, float]:
        """Draw the middle of the way so that it stays on the stage where it can."""
        stage, half = self.stage, self.size / 2
        if self.relation == "circles around":
            return stage.x, stage.y
        free_x = max(0.0, stage.half_x - half - reach_x)
        free_y = max(0.0, stage.half_y - half * self.tall - reach_y)
        wish = (_HEIGHTS[self.kind] + self.at_y) * self.sides[1]
        if stage.y:
            wish = self.at_y * self.sides[1]
        return stage.x + self.at_x * free_x, stage.y + min(max(wish, -free_y), free_y)

    def _way(self, axis: int) -> float:
        """Length of a straight way: its nominal share of the frame, centre never leaving it."""
        nominal = _WAY[self.actor.speed] * self.vigour * self.sides[axis]
        room = 2 * (self.stage.half_x if axis == 0 else self.stage.half_y)
        return max(min(nominal, room), 0.3 * self.sides[axis])

    def _crossing(self, u: Array, right: bool) -> tuple[Array, Array, Array]:
        way = self._way(0)
        x0, y0 = self._base(way / 2, 0.02)
        if self.relation == "chases":  # both on one line
            x0, y0 = self.stage.x, 0.1 * self.sides[1]
        sign = 1.0 if right else -1.0
        lift, rock = self._gait(u)
        return x0 + sign * way * (u - 0.5), y0 + lift, rock

    def _passing(self, u: Array, right: bool) -> tuple[Array, Array, Array]:
        outside = self.sides[0] / 2 + min(self.size / 2 + 0.03, 0.27 * self.sides[0])
        _, y0 = self._base(0.0, 0.02)
        sign = 1.0 if right else -1.0
        lift, rock = self._gait(u)
        return sign * outside * (2 * u - 1), y0 + lift, rock

    def _gait(self, u: Array) -> tuple[Array, Array]:
        """Return the small lift and rocking of going along: hops, waves or a smooth ride."""
        swing = math.tau * (_STEPS[self.actor.speed] / 2 * self.more * u + self.phase)
        if self.kind in ("animal", "thing"):
            return -0.03 * np.abs(np.sin(swing)), 0.09 * np.sin(swing)
        if self.kind in ("flyer", "swimmer", "boat"):
            return 0.015 * np.sin(swing), 0.05 * np.cos(swing)
        return np.zeros_like(u), np.zeros_like(u)

    def _climbing(self, u: Array, up: bool) -> tuple[Array, Array]:
        way = self._way(1)
        x0, _ = self._base(0.0, way / 2)
        free = max(0.0, self.stage.half_y - self.size / 2 * self.tall - way / 2)
        y0 = self.stage.y + free * self.at_y * 10
        done = u if up else u * (0.45 + 0.55 * u)  # a fall gathers speed
        return np.full_like(u, x0), y0 + way * (done - 0.5) * (-1.0 if up else 1.0)

    def _bouncing(self, u: Array) -> Track:
        stage, tall = self.stage, self.size * self.tall
        cycles = self._cycles(_BOUNCES)
        room = 2 * stage.half_y - tall
        top = min(max(0.38 * self.vigour * self.sides[1], 0.0), max(room, 0.28 * self.sides[1]))
        floor = stage.y + min(stage.half_y, tall + top - stage.half_y + 0.8 * max(0.0, room - top))
        beat = cycles * u + self.phase
        ahead = beat - np.floor(beat)
        lift = 4 * top * ahead * (1 - ahead)
        squash = np.maximum(0.0, 1 - lift / (0.25 * top)) ** 2
        height = self.size * (1 - 0.22 * squash)
        way = 0.0 if self.actor.direction is None else 0.36 * self.sides[0]
        x0, _ = self._base(way / 2, 0.0)
        sign = -1.0 if self.actor.direction == "left" else 1.0
        return Track(
            x=x0 + sign * way * (u - 0.5),
            y=floor - lift - height * self.tall / 2,
            width=self.size * (1 + 0.16 * squash),
            height=height,
            angle=np.zeros_like(u),
            flipped=self._flipped(),
            contacts=self._marks(cycles, self.phase),
        )

    def _swinging(self, u: Array) -> tuple[Array, Array, Array]:
        rope = 0.42 * min(self.sides)
        x0, y0 = self._base(rope * math.sin(_SWING), 0.05)
        angle = _SWING * np.sin(math.tau * (self._cycles(_CYCLES) * u + self.phase))
        return x0 + rope * np.sin(angle), y0 + rope * (np.cos(angle) - 0.9), -angle

    def _circling(self, u: Array) -> tuple[Array, Array]:
        side = min(self.sides)
        half = min(self.stage.half_x, self.stage.half_y)
        radius = min(max(0.29 * side, 0.0), max(half - 0.4 * self.size, 0.2 * side))
        x0, y0 = self._base(radius, radius)
        if self.relation == "circles around":
            radius = 0.66 * half
        turn = math.tau * (self._turn() * self._cycles(_CYCLES) * u + self.phase)
        return x0 + radius * np.cos(turn), y0 + radius * np.sin(turn)

    def _growing(self, u: Array, grows: bool) -> Track:
        room = 1.7 * min(self.stage.half_x, self.stage.half_y)
        peak = min(1.55 * self.size, room)
        done = u if grows else 1 - u
        size = peak * (_SHRUNK + (1 - _SHRUNK) * done)
        x0, y0 = self._base(0.0, 0.0)
        free_x, free_y = (max(0.0, h - peak / 2) for h in (self.stage.half_x, self.stage.half_y))
        x = self.stage.x + min(max(x0 - self.stage.x, -free_x), free_x)
        y = self.stage.y + min(max(y0 - self.stage.y, -free_y), free_y)
        zero = np.zeros_like(u)
        return Track(zero + x, zero + y, size, size, zero, self._flipped())
