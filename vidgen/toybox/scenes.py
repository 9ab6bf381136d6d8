"""What a Toybox scene is: names, the scene description, and how scenes are drawn by seed.

A scene is a small frozen value; pictures (`render`), sentences (`captions`) and ground truth (`truth`)
are all functions of it. Scene ``i`` of ``sample_scenes(seed, count)`` depends on ``seed + i`` alone, so
a range of integers is a data set, and disjoint ranges are disjoint data sets (`SEED_RANGES`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeVar

from vidgen.core.errors import InputError

WORLD_VERSION = 1
Split = Literal["train", "held_out", "any"]
T = TypeVar("T")

#: First and one-past-last scene seed of each use; training never sees a judge's, dev or test scene.
SEED_RANGES: dict[str, tuple[int, int]] = {
    "train": (0, 1 << 40),
    "judge": (1 << 40, 2 << 40),
    "dev": (2 << 40, 3 << 40),
    "test": (3 << 40, 4 << 40),
}


class Sprite(NamedTuple):
    """One drawable thing: its emoji, how it gets about, where the font lets it look."""

    name: str
    codepoint: int
    kind: Literal["vehicle", "aircraft", "boat", "animal", "flyer", "swimmer", "food", "object"]
    faces: Literal["left", "right", "front"] = "front"
    color: str | None = None
    is_round: bool = False
    reserved: bool = False


_SPRITES = (
    Sprite("car", 0x1F697, "vehicle", "left", "red"),
    Sprite("bus", 0x1F68C, "vehicle", "left"),
    Sprite("tractor", 0x1F69C, "vehicle", "left", "green"),
    Sprite("bicycle", 0x1F6B2, "vehicle", "left"),
    Sprite("airplane", 0x2708, "aircraft", "right", "blue"),
    Sprite("helicopter", 0x1F681, "aircraft", "left", "yellow"),
    Sprite("rocket", 0x1F680, "aircraft", "right"),
    Sprite("sailboat", 0x26F5, "boat", "left", "orange"),
    Sprite("train", 0x1F682, "vehicle", "left"),
    Sprite("flying saucer", 0x1F6F8, "aircraft"),
    Sprite("cat", 0x1F408, "animal", "left", "orange"),
    Sprite("dog", 0x1F415, "animal"),
    Sprite("horse", 0x1F40E, "animal", "left"),
    Sprite("cow", 0x1F404, "animal", "left"),
    Sprite("pig", 0x1F416, "animal", "left", "pink"),
    Sprite("elephant", 0x1F418, "animal", "left"),
    Sprite("penguin", 0x1F427, "animal", "left"),
    Sprite("fish", 0x1F41F, "swimmer", "left", "blue"),
    Sprite("whale", 0x1F433, "swimmer", "left", "blue"),
    Sprite("octopus", 0x1F419, "swimmer", "front", "pink"),
    Sprite("turtle", 0x1F422, "animal", "left", "green"),
    Sprite("crab", 0x1F980, "animal", "front", "orange"),
    Sprite("frog", 0x1F438, "animal", "front", "green"),
    Sprite("rabbit", 0x1F407, "animal", "left"),
    Sprite("owl", 0x1F989, "flyer"),
    Sprite("butterfly", 0x1F98B, "flyer", "front", "orange"),
    Sprite("bee", 0x1F41D, "flyer", "left", "yellow"),
    Sprite("snail", 0x1F40C, "animal", "left"),
    Sprite("giraffe", 0x1F992, "animal", "left"),
    Sprite("dinosaur", 0x1F995, "animal", "left", "green"),
    Sprite("duck", 0x1F986, "animal", "left"),
    Sprite("lion", 0x1F981, "animal"),
    Sprite("flamingo", 0x1F9A9, "animal", "left", "pink"),
    Sprite("apple", 0x1F34E, "food", "front", "red"),
    Sprite("banana", 0x1F34C, "food", "front", "yellow"),
    Sprite("pizza", 0x1F355, "food"),
    Sprite("hamburger", 0x1F354, "food"),
    Sprite("watermelon", 0x1F349, "food"),
    Sprite("strawberry", 0x1F353, "food", "front", "red"),
    Sprite("ice cream", 0x1F366, "food"),
    Sprite("doughnut", 0x1F369, "food", is_round=True),
    Sprite("cake", 0x1F382, "food"),
    Sprite("carrot", 0x1F955, "food", "front", "orange"),
    Sprite("pineapple", 0x1F34D, "food"),
    Sprite("mushroom", 0x1F344, "food"),
    Sprite("soccer ball", 0x26BD, "object", is_round=True),
    Sprite("balloon", 0x1F388, "object", "front", "red"),
    Sprite("guitar", 0x1F3B8, "object", "front", "red"),
    Sprite("umbrella", 0x2602, "object", "front", "purple"),
    Sprite("alarm clock", 0x23F0, "object", is_round=True),
    Sprite("gift", 0x1F381, "object"),
    Sprite("crown", 0x1F451, "object", "front", "yellow"),
    Sprite("teddy bear", 0x1F9F8, "object"),
    Sprite("robot", 0x1F916, "object"),
    Sprite("ghost", 0x1F47B, "object"),
    Sprite("snowman", 0x26C4, "object"),
    Sprite("star", 0x2B50, "object", "front", "yellow"),
    Sprite("heart", 0x2764, "object", "front", "red"),
    Sprite("sunflower", 0x1F33B, "object", "front", "yellow"),
    Sprite("cactus", 0x1F335, "object", "front", "green"),
    # Reserved: never in a sampled scene; kept for fine-tuning and reference-image tests.
    Sprite("unicorn", 0x1F984, "animal", "left", reserved=True),
    Sprite("scooter", 0x1F6F5, "vehicle", "left", "yellow", reserved=True),
    Sprite("trumpet", 0x1F3BA, "object", "front", "yellow", reserved=True),
)
SPRITES: dict[str, Sprite] = {sprite.name: sprite for sprite in _SPRITES}
SPRITE_NAMES = tuple(s.name for s in _SPRITES if not s.reserved)
RESERVED_SPRITES = tuple(s.name for s in _SPRITES if s.reserved)

TINTS = ("red", "orange", "yellow", "green", "blue", "purple", "pink")
#: Largest extent of a sprite in frame units (see `motion`): 24%, 34% and 47% of a square frame.
SIZES = {"small": 0.24, "medium": 0.34, "large": 0.47}
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

_PANS_ACROSS, _PANS_UP = ("pan left", "pan right"), ("pan up", "pan down")
_ZOOMS = ("zoom in", "zoom out")
#: Cameras under which each motion stays identifiable: never along its own axis, no zoom on growth.
CAMERAS_FOR: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("moves left", "moves right", "drives past"), ("still", *_PANS_UP, *_ZOOMS)),
    **dict.fromkeys(("rises", "falls", "bounces"), ("still", *_PANS_ACROSS, *_ZOOMS)),
    **dict.fromkeys(("grows", "shrinks"), ("still", *_PANS_ACROSS, *_PANS_UP)),
    **dict.fromkeys(("spins", "stays"), CAMERAS),
    "swings": ("still", *_PANS_UP, *_ZOOMS),
    "circles": ("still", *_ZOOMS),
}
#: Motions whose speed shows; the others are always "normal".
PACED_MOTIONS = frozenset(MOTIONS) - {"grows", "shrinks", "drives past", "stays"}
#: Motions with a direction of their own.
DIRECTIONS_FOR: dict[str, tuple[str | None, ...]] = {
    "drives past": ("left", "right"),
    "bounces": (None, "left", "right"),
    "spins": ("clockwise", "counterclockwise"),
    "circles": ("clockwise", "counterclockwise"),
}
#: Motions of (first, second) actor under each relation.
_IN_PLACE = ("stays", "spins", "bounces", "grows", "shrinks", "rises", "falls")
_ACROSS = ("moves left", "moves right", "drives past", "spins", "stays")
#: Places without sky: time and weather that still make sense there.
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


@dataclass(frozen=True)
class Scene:
    """One scene; ``seed`` draws everything not named (positions, hills, clouds, phases).

    ``relation`` relates the first actor to the second ("chases"); ``sound`` names the sounds that the
    caption mentions (see `captions.sounds_for`).
    """

    seed: int
    actors: tuple[Actor, ...]
    place: str = "meadow"
    time_of_day: str = "day"
    weather: str = "clear"
    camera: str = "still"
    relation: str | None = None
    sound: tuple[str, ...] = ()


@dataclass(frozen=True)
class SceneMix:
    """Probabilities with which `sample_scenes` departs from one untinted actor on a clear day."""

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


class Draws:
    """Random draws addressed by (seed, stream, counter): splitmix64 (Steele et al. 2014, Fig. 14).

    Pure integer arithmetic, so the same everywhere and for ever; no generator state to carry.
    """

    def __init__(self, seed: int, stream: int = 0) -> None:
        self._state = (seed * 0x9E3779B97F4A7C15 + stream * 0xD1B54A32D192ED03) & _MASK
        self._state = _mix(self._state)

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
        return next(reversed(weights))


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
    """Draw scenes ``seed .. seed + count - 1``; scene i depends on ``seed + i``, mix and split alone.

    Args:
        seed: scene seed of the first one (see `SEED_RANGES`).
        count: how many.
        mix: how often scenes are rich; None is the default mix.
        split: "train" gives no held-out triple, "held_out" gives scenes whose first actor's triple is
            held out, "any" ignores the split.

    Raises:
        InputError: an unknown split.
    """
    if split not in ("train", "held_out", "any"):
        raise InputError(f"split {split!r}: choose one of train, held_out, any")
    mix = mix or SceneMix()
    return [_sample_scene(seed + i, mix, split) for i in range(count)]


def _sample_scene(seed: int, mix: SceneMix, split: Split) -> Scene:
    draws = Draws(seed, stream=1)
    relation = draws.choice(RELATIONS) if draws.chance(mix.two_actors) else None
    while True:
        place = draws.choice(PLACES)
        actors = _cast(draws, mix, relation)
        held_out = [is_held_out(a.sprite, a.motion, place) for a in actors]
        if split == "any" or held_out[0] == (split == "held_out"):
            if split == "train" and any(held_out):
                continue
            break
    cameras = [c for c in cameras_for(actors, relation) if c != "still"]
    times = [t for t in times_in(place) if t != "day"]
    weathers = [w for w in weathers_in(place) if w != "clear"]
    dark = "day" not in times_in(place)
    scene = Scene(
        seed=seed,
        actors=actors,
        place=place,
        time_of_day=draws.choice(times) if times and draws.chance(mix.other_time + dark) else "day",
        weather=draws.choice(weathers)
        if weathers and draws.chance(mix.other_weather)
        else "clear",
        camera=draws.choice(cameras) if draws.chance(mix.camera_moves) else "still",
        relation=relation,
    )
    return scene


def _cast(draws: Draws, mix: SceneMix, relation: str | None) -> tuple[Actor, ...]:
    """Draw one actor, or two whose motions fit their relation."""
    if relation is None:
        return (_draw_actor(draws, mix, MOTIONS),)
    if relation in ("chases", "passes"):
        first = _draw_actor(draws, mix, ("moves left", "moves right"), small=True)
        same = relation == "chases"
        other = first.motion if same else _OPPOSITE[first.motion]
        pair = (first, _draw_actor(draws, mix, (other,), small=True, speed=first.speed))
    elif relation == "circles around":
        first = _draw_actor(draws, mix, ("circles",), small=True, size="small")
        pair = (first, _draw_actor(draws, mix, ("stays",), small=True))
    else:
        motions = _IN_PLACE if relation == "next to" else _ACROSS
        first = _draw_actor(draws, mix, motions, small=True)
        second = (first.motion,) if draws.chance(0.5) else ("stays",)
        pair = (first, _draw_actor(draws, mix, second, small=True, direction=first.direction))
    if pair[0].sprite == pair[1].sprite:
        return _cast(draws, mix, relation)
    return pair


_OPPOSITE = {"moves left": "moves right", "moves right": "moves left"}


def _draw_actor(
    draws: Draws,
    mix: SceneMix,
    motions: Sequence[str],
    *,
    small: bool = False,
    size: str | None = None,
    speed: str | None = None,
    direction: str | None = None,
) -> Actor:
    sprite, motion = draws.choice(SPRITE_NAMES), draws.choice(motions)
    while not is_valid(sprite, motion):
        sprite = draws.choice(SPRITE_NAMES)
    drawn_size = draws.weighted(mix.sizes)
    if motion in ("grows", "shrinks") or (small and drawn_size == "large"):
        drawn_size = "medium"
    drawn_speed = draws.weighted(mix.speeds)
    directions = DIRECTIONS_FOR.get(motion, (None,))
    drawn_direction = draws.choice(directions)
    if small and motion == "bounces":
        drawn_direction = None  # two actors bounce in place: their halves of the frame are narrow
    tints = [t for t in TINTS if t != SPRITES[sprite].color]
    return Actor(
        sprite=sprite,
        motion=motion,
        tint=draws.choice(tints) if draws.chance(mix.tint) else None,
        size=size or drawn_size,
        speed=(speed or drawn_speed) if motion in PACED_MOTIONS else "normal",
        direction=direction if direction in directions and direction else drawn_direction,
    )


def cameras_for(actors: Sequence[Actor], relation: str | None) -> tuple[str, ...]:
    """Return the cameras under which every actor's motion stays identifiable."""
    sets = [set(CAMERAS_FOR[a.motion]) for a in actors]
    for actor, allowed in zip(actors, sets, strict=True):
        if actor.motion == "bounces" and actor.direction:
            allowed -= set(_PANS_ACROSS)
    if relation == "circles around":
        sets.append(set(CAMERAS_FOR["circles"]))
    return tuple(c for c in CAMERAS if all(c in allowed for allowed in sets))


def times_in(place: str) -> tuple[str, ...]:
    """Return the times of day that make sense in a place."""
    return _TIMES_IN.get(place, TIMES)


def weathers_in(place: str) -> tuple[str, ...]:
    """Return the weathers that make sense in a place."""
    return _WEATHERS_IN.get(place, WEATHERS)
