"""What a Toybox scene is, and how scenes are drawn by seed.

A scene is a small frozen value; pictures (`render`), sentences (`captions`) and ground truth
(`truth`) are functions of it. Scene i of ``sample_scenes(seed, count)`` depends on ``seed + i``
alone, so a range of integers is a data set, and disjoint ranges are disjoint sets (`SEED_RANGES`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

from train.toybox.world.cast import RESERVED_SPRITES, SPRITE_NAMES, SPRITES  # noqa: F401 (re-export)
from vidgen.core.errors import InputError, nearest

WORLD_VERSION = 1
Split = Literal["train", "held_out", "any"]
T = TypeVar("T")

#: First and one-past-last scene seed of each use; training never meets a judge's or test scene.
SEED_RANGES: dict[str, tuple[int, int]] = {
    "train": (0, 1 << 40),
    "judge": (1 << 40, 2 << 40),
    "dev": (2 << 40, 3 << 40),
    "test": (3 << 40, 4 << 40),
}


TINTS = ("red", "orange", "yellow", "green", "blue", "purple", "pink")
#: Largest extent of a sprite in world units: a quarter, a third, nearly half of a square frame.
SIZES = {"small": 0.255, "medium": 0.34, "large": 0.47}
SPEEDS = ("slow", "normal", "fast")
MOTIONS = (
    "moves left", "moves right", "rises", "falls", "bounces", "spins",
    "grows", "shrinks", "swings", "circles", "drives past", "stays",
)  # fmt: skip
PLACES = (
    "desert", "meadow", "ocean", "city", "snow", "space", "beach", "forest",
    "mountains", "road", "underwater", "room", "farm", "volcano",
)  # fmt: skip
TIMES = ("day", "dawn", "sunset", "night")
WEATHERS = ("clear", "rain", "snow", "fog")
CAMERAS = (
    "still", "pan left", "pan right", "pan up", "pan down", "zoom in", "zoom out",
)  # fmt: skip
RELATIONS = ("next to", "above", "chases", "passes", "circles around")
DIRECTIONS = ("left", "right", "clockwise", "counterclockwise")
AMBIENCES = {
    "ocean": "waves", "beach": "waves", "city": "traffic", "road": "traffic", "forest": "birdsong",
    "meadow": "birdsong", "farm": "birdsong", "desert": "wind", "mountains": "wind",
    "snow": "wind", "underwater": "bubbles", "volcano": "rumble", "space": "hum",
}  # fmt: skip
EVENT_SOUNDS = {"bounces": "thuds", "drives past": "whoosh"}

_ACROSS, _UPRIGHT = ("pan left", "pan right"), ("pan up", "pan down")
_ZOOMS = ("zoom in", "zoom out")
#: Cameras under which each motion stays identifiable: never along its own axis, no zoom on growth.
_CAMERAS_FOR: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("moves left", "moves right"), ("still", *_UPRIGHT, *_ZOOMS)),
    **dict.fromkeys(("rises", "falls", "bounces"), ("still", *_ACROSS, *_ZOOMS)),
    **dict.fromkeys(("grows", "shrinks"), ("still", *_ACROSS, *_UPRIGHT)),
    **dict.fromkeys(("spins", "stays"), CAMERAS),
    "drives past": ("still", *_UPRIGHT),
    "swings": ("still", *_UPRIGHT, *_ZOOMS),
    "circles": ("still", *_ZOOMS),
}
#: Motions whose speed shows; the others are always "normal".
PACED_MOTIONS = tuple(m for m in MOTIONS if m not in ("grows", "shrinks", "drives past", "stays"))
#: Motions with a direction of their own.
DIRECTIONS_FOR: dict[str, tuple[str | None, ...]] = {
    "drives past": ("left", "right"),
    "bounces": (None, "left", "right"),
    "spins": ("clockwise", "counterclockwise"),
    "circles": ("clockwise", "counterclockwise"),
}
#: What the first actor may do under each relation.
_MOTIONS_IN: dict[str, tuple[str, ...]] = {
    "next to": ("stays", "spins", "bounces", "rises", "falls"),
    "above": ("moves left", "moves right", "drives past", "spins", "stays"),
    "chases": ("moves left", "moves right"),
    "passes": ("moves left", "moves right"),
    "circles around": ("circles",),
}
_OPPOSITE = {"moves left": "moves right", "moves right": "moves left"}
#: Places where not every time or weather makes sense.
_TIMES_IN = {"space": ("night",), "underwater": ("day", "night")}
_WEATHERS_IN = dict.fromkeys(("space", "underwater", "room"), ("clear",))


@dataclass(frozen=True)
class Actor:
    """A sprite and what it does; ``direction`` only where `DIRECTIONS_FOR` lists its motion."""

    sprite: str
    motion: str = "stays"
    tint: str | None = None
    size: str = "medium"
    speed: str = "normal"
    direction: str | None = None

    def __post_init__(self) -> None:
        _check("sprite", self.sprite, tuple(SPRITES))
        _check("motion", self.motion, MOTIONS)
        _check("tint", self.tint, (None, *TINTS))
        _check("size", self.size, tuple(SIZES))
        _check("speed", self.speed, SPEEDS)
        _check("direction", self.direction, DIRECTIONS_FOR.get(self.motion, (None,)))


@dataclass(frozen=True)
class Scene:
    """One scene; ``seed`` draws everything not named (positions, hills, clouds, phases).

    ``relation`` relates the first actor to the second ("chases"); ``sound`` names what the caption
    lets hear (some of `sounds_for`).
    """

    seed: int
    actors: tuple[Actor, ...]
    place: str = "meadow"
    time_of_day: str = "day"
    weather: str = "clear"
    camera: str = "still"
    relation: str | None = None
    sound: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check("number of actors", len(self.actors), (1,) if self.relation is None else (2,))
        _check("place", self.place, PLACES)
        _check("time of day", self.time_of_day, times_in(self.place))
        _check("weather", self.weather, weathers_in(self.place))
        _check("relation", self.relation, (None, *RELATIONS))
        _check("camera", self.camera, CAMERAS)
        for name in self.sound:
            _check("sound", name, sounds_for(self))

    def recast(self, sprite: str) -> Scene:
        """The same scene with another sprite for its first actor; the caption names no sound."""
        first, *others = self.actors
        return replace(self, actors=(replace(first, sprite=sprite), *others), sound=())


def _check(what: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        names = [str(name) for name in allowed]
        raise InputError(f"{what} {value!r} can't be here; {nearest(str(value), names)}")


@dataclass(frozen=True)
class SceneMix:
    """Probabilities with which `sample_scenes` departs from one untinted actor on a clear day.

    Raises:
        InputError: one that lies outside of 0..1.
    """

    two_actors: float = 0.15
    tint: float = 0.15
    other_time: float = 0.30
    other_weather: float = 0.25
    camera_moves: float = 0.50
    sound: float = 0.20
    sizes: Mapping[str, float] = field(
        default_factory=lambda: {"small": 0.25, "medium": 0.5, "large": 0.25}
    )
    speeds: Mapping[str, float] = field(
        default_factory=lambda: {"slow": 0.2, "normal": 0.6, "fast": 0.2}
    )

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, Mapping) and not 0 <= value <= 1:
                raise InputError(f"{name} is {value}; a probability lies in 0..1")


class Draws:
    """Random draws addressed by (seed, stream, counter): splitmix64 (Steele et al. 2014, Fig. 14).

    Pure integer arithmetic, so the same everywhere and for ever.
    """

    def __init__(self, seed: int, stream: int = 0) -> None:
        self._state = _mix((seed * 0x9E3779B97F4A7C15 + stream * 0xD1B54A32D192ED03) & _MASK)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """Return the next number in [low, high)."""
        self._state = (self._state + 0x9E3779B97F4A7C15) & _MASK
        return low + (high - low) * (_mix(self._state) >> 11) * 2.0**-53

    def chance(self, probability: float) -> bool:
        """Return True with the given probability."""
        return self.uniform() < probability

    def choice(self, options: Sequence[T]) -> T:
        """Return one of the options, each as likely as the others."""
        return options[int(self.uniform() * len(options))]

    def weighted(self, weights: Mapping[str, float]) -> str:
        """Return one of the keys, each as likely as its weight."""
        mark = self.uniform() * sum(weights.values())
        for name, weight in weights.items():
            mark -= weight
            if mark < 0:
                return name
        return list(weights)[-1]


_MASK = (1 << 64) - 1


def _mix(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def is_valid(sprite: str, motion: str) -> bool:
    """Tell whether the motion of this sprite can be seen: a round thing's spin can't."""
    return not (motion == "spins" and SPRITES[sprite].is_round)


def is_held_out(sprite: str, motion: str, place: str) -> bool:
    """Tell whether a (sprite, motion, place) triple belongs to the tenth never trained on."""
    digest = hashlib.sha256(f"{sprite}|{motion}|{place}".encode()).digest()
    return int.from_bytes(digest[:4], "big") < (1 << 32) // 10


def sample_scenes(
    seed: int, count: int, mix: SceneMix | None = None, split: Split = "any"
) -> list[Scene]:
    """Draw scenes ``seed .. seed + count - 1``; scene i depends on ``seed + i``, mix and split.

    Args:
        seed: scene seed of the first one (see `SEED_RANGES`).
        count: how many.
        mix: how often scenes are rich; None is the default mix.
        split: "train" gives no held-out triple, "held_out" gives scenes whose first actor's triple
            is held out, "any" ignores the split.

    Raises:
        InputError: an unknown split.
    """
    _check("split", split, ("train", "held_out", "any"))
    return [_sample(seed + i, mix or SceneMix(), split) for i in range(count)]


def _sample(seed: int, mix: SceneMix, split: Split) -> Scene:
    draws = Draws(seed, stream=1)
    relation = draws.choice(RELATIONS) if draws.chance(mix.two_actors) else None
    while True:
        place = draws.choice(PLACES)
        actors = _cast(draws, mix, relation)
        held_out = [is_held_out(a.sprite, a.motion, place) for a in actors]
        if split == "any" or (held_out[0] if split == "held_out" else not any(held_out)):
            return _furnish(draws, mix, Scene(seed, actors, place, times_in(place)[0],
                                              relation=relation))  # fmt: skip


def compose_scene(
    seed: int, sprite: str, motion: str, place: str, mix: SceneMix | None = None
) -> Scene:
    """Draw a scene of one actor whose sprite (reserved ones too), motion and place are given.

    Raises:
        InputError: an unknown name, or a motion that can't be seen of this sprite.
    """
    Actor(sprite, motion, direction=DIRECTIONS_FOR.get(motion, (None,))[0])
    if not is_valid(sprite, motion):
        raise InputError(f"the {sprite} is round: nobody sees whether it {motion}")
    _check("place", place, PLACES)
    draws, mix = Draws(seed, stream=1), mix or SceneMix()
    actor = _draw_actor(draws, mix, (motion,), sprite=sprite)
    return _furnish(draws, mix, Scene(seed, (actor,), place, times_in(place)[0]))


def _furnish(draws: Draws, mix: SceneMix, scene: Scene) -> Scene:
    """Draw time, weather, camera and sound for a scene that has none yet."""
    time, weather, camera = scene.time_of_day, "clear", "still"
    if draws.chance(mix.other_time):
        time = draws.choice(times_in(scene.place)[1:] or (time,))
    if draws.chance(mix.other_weather):
        weather = draws.choice(weathers_in(scene.place)[1:] or (weather,))
    if draws.chance(mix.camera_moves):
        camera = draws.choice(cameras_for(scene.actors, scene.relation)[1:])
    actors, place, relation = scene.actors, scene.place, scene.relation
    bare = Scene(scene.seed, actors, place, time, weather, camera, relation)
    sounds = sounds_for(bare)
    if not (draws.chance(mix.sound) and sounds):
        return bare
    sound = (draws.choice(sounds),)
    return Scene(scene.seed, actors, place, time, weather, camera, relation, sound)


def _cast(draws: Draws, mix: SceneMix, relation: str | None) -> tuple[Actor, ...]:
    """Draw one actor, or two different ones whose motions fit their relation."""
    if relation is None:
        return (_draw_actor(draws, mix, MOTIONS),)
    around = relation == "circles around"
    sizes = ("small",) if around else ("small", "medium")
    first = _draw_actor(draws, mix, _MOTIONS_IN[relation], pair=True, sizes=sizes)
    if relation == "passes":
        motion = _OPPOSITE[first.motion]
    elif relation == "chases":
        motion = first.motion
    else:
        motion = "stays" if around or draws.chance(0.5) else first.motion
    second = _draw_actor(draws, mix, (motion,), pair=True, speed=first.speed)
    return (first, second) if first.sprite != second.sprite else _cast(draws, mix, relation)


def _draw_actor(
    draws: Draws,
    mix: SceneMix,
    motions: Sequence[str],
    *,
    sprite: str | None = None,
    pair: bool = False,
    sizes: Sequence[str] = ("small", "medium"),
    speed: str | None = None,
) -> Actor:
    """Draw an actor; one of a pair is never large, and bounces in place (there is little room)."""
    motion = draws.choice(motions)
    sprite = sprite or draws.choice(SPRITE_NAMES)
    while not is_valid(sprite, motion):
        sprite = draws.choice(SPRITE_NAMES)
    size = draws.choice(sizes) if pair else draws.weighted(mix.sizes)
    pace = draws.weighted(mix.speeds)
    direction = draws.choice(DIRECTIONS_FOR.get(motion, (None,)))
    tints = [t for t in TINTS if t != SPRITES[sprite].color]
    tint = draws.choice(tints)
    return Actor(
        sprite=sprite,
        motion=motion,
        tint=tint if draws.chance(mix.tint) else None,
        size="medium" if motion in ("grows", "shrinks") else size,
        speed=(speed or pace) if motion in PACED_MOTIONS else "normal",
        direction=None if pair and motion == "bounces" else direction,
    )


def cameras_for(actors: Sequence[Actor], relation: str | None) -> tuple[str, ...]:
    """Return the cameras, "still" first, under which every actor's motion stays identifiable."""
    motions = [a.motion for a in actors]
    motions += {"circles around": ["circles"], "chases": ["drives past"]}.get(relation or "", [])
    barred = _ACROSS if any(a.motion == "bounces" and a.direction for a in actors) else ()
    return tuple(
        c for c in CAMERAS if c not in barred and all(c in _CAMERAS_FOR[m] for m in motions)
    )


def times_in(place: str) -> tuple[str, ...]:
    """Return the times of day that make sense in a place, the usual one first."""
    return _TIMES_IN.get(place, TIMES)


def weathers_in(place: str) -> tuple[str, ...]:
    """Return the weathers that make sense in a place, "clear" first."""
    return _WEATHERS_IN.get(place, WEATHERS)


def sounds_for(scene: Scene) -> tuple[str, ...]:
    """Return the sounds that belong to a scene: voices, events, weather and the place itself."""
    voices = [SPRITES[a.sprite].voice for a in scene.actors]
    events = [EVENT_SOUNDS.get(a.motion) for a in scene.actors]
    rain = "rain" if scene.weather == "rain" else None
    names = [*voices, *events, rain, AMBIENCES.get(scene.place)]
    return tuple(dict.fromkeys(name for name in names if name))
