"""What `python -m eval.toybox` makes clips of: sources, their scenes, sentences and seeds.

A source is scenes of one kind, `material`, brought into pictures in one `way`: generated, rendered
(what the metrics make of perfection), or rendered and passed through the VAE (the best that a
generator behind it can reach).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from eval.toybox.metrics.sync import bouncing_scenes
from eval.toybox.suite.phrasings import read_phrasings
from train.toybox.world.captions import caption, prompts
from train.toybox.world.cast import RESERVED_SPRITES, SPRITE_NAMES, SPRITES
from train.toybox.world.scenes import (
    MOTIONS,
    PLACES,
    SEED_RANGES,
    Draws,
    Scene,
    SceneMix,
    compose_scene,
    is_held_out,
    is_valid,
    sample_scenes,
)
from vidgen.core.errors import InputError
from vidgen.core.values import parse_settings

Suite = Literal[
    "all", "text", "image", "vae", "judge", "triples", "phrasings", "extend", "sound", "full"
]
Way = Literal["generate", "render", "vae"]
Pair = tuple[Scene, str]
MAX_SEEDS = 1000

#: Motions that can go on for ever; what moves left is gone after one window.
ENDLESS = ("stays", "bounces", "swings", "spins", "circles")
_RESERVED, _TWO, _TRIPLES, _SOUND = 1 << 36, 1 << 37, 1 << 38, 1 << 39  # within a split's seeds


class Source(NamedTuple):
    """Scenes of one kind, brought into pictures in one way."""

    material: str
    way: Way


_ENDINGS: tuple[tuple[str, Way], ...] = (("", "generate"), ("_render", "render"), ("_vae", "vae"))
SOURCES: dict[str, Source] = {
    "text": Source("text", "generate"),
    "render": Source("text", "render"),
    "vae": Source("text", "vae"),
    "held_out": Source("held_out", "generate"),
    "reserved": Source("reserved", "vae"),
    **{f"{name}{end}": Source(name, way)
       for name in ("two", "extend", "sound")
       for end, way in _ENDINGS},
    "image": Source("image", "generate"),
    "render_end": Source("image", "render"),
    "vae_end": Source("image", "vae"),
    "seen_triples": Source("seen_triples", "generate"),
    "held_triples": Source("held_triples", "generate"),
    "grammar": Source("grammar", "generate"),
    "phrased": Source("phrased", "generate"),
}  # fmt: skip
_TEXT = ("render", "vae", "text", "held_out", "two_render", "two_vae", "two")
_IMAGE = ("render_end", "vae_end", "image")
_TRIPLE = ("seen_triples", "held_triples")
_PHRASED = ("grammar", "phrased")
_EXTEND = ("extend_render", "extend_vae", "extend")
_HEARD = ("sound_render", "sound_vae", "sound")
SUITES: dict[Suite, tuple[str, ...]] = {
    "text": _TEXT,
    "image": _IMAGE,
    "vae": ("vae", "reserved"),
    "judge": ("render",),
    "triples": _TRIPLE,
    "phrasings": _PHRASED,
    "extend": _EXTEND,
    "sound": _HEARD,
    "all": (*_TEXT, "reserved", *_IMAGE),
    "full": (*_TEXT, "reserved", *_IMAGE, *_TRIPLE, *_PHRASED, *_EXTEND, *_HEARD),
}
#: Which sources say how high a generated one's scores can be: rendered, and behind the VAE.
CEILINGS = {
    "text": ("render", "vae"), "held_out": ("render", "vae"), "two": ("two_render", "two_vae"),
    "image": ("render_end", "vae_end"), "extend": ("extend_render", "extend_vae"),
    "sound": ("sound_render", "sound_vae"),
}  # fmt: skip


@dataclass(frozen=True)
class Item:
    """One clip to be scored."""

    source: str
    index: int
    scene: Scene
    prompt: str
    seed: int


@dataclass(frozen=True)
class Benchmark:
    """What to score, and how the clips are made.

    Args:
        model: name or folder.
        split: "dev" for choosing, "test" once for a release.
        prompts: of text to video.
        held_out: prompts of triples never trained on.
        images: first frames of image to video.
        reserved: clips of reserved sprites.
        two: prompts of two actors.
        pairs: of matched triples, one seen in training and one held out.
        phrasings: prompts as people type them, each beside the grammar's caption of its scene.
        extensions: clips of several windows.
        windows: of each of them.
        sounds: bouncing clips with their sound.
        suite: which part to run.
        seed: of the first clip; the others follow.
        seeds: clips that are generated of each prompt.
        batch: clips made at once.
        steps: and the following, None: the model's own.
        judge: folder of another judge than the embedded one.
        sound_judge: folder of a judge of sound; None: the embedded one.
    """

    model: str = "toybox"
    split: Literal["dev", "test"] = "dev"
    prompts: int = 300
    held_out: int = 100
    images: int = 200
    reserved: int = 60
    two: int = 60
    pairs: int = 1000
    phrasings: int = 200
    extensions: int = 20
    windows: int = 4
    sounds: int = 100
    suite: Suite = "all"
    seed: int = 0
    seeds: int = 1
    batch: int = 8
    steps: int | None = None
    guidance: float | None = None
    shift: float | None = None
    sampler: str | None = None
    own_settings: Mapping[str, float] = field(default_factory=dict)
    frames: int | None = None
    size: str | None = None
    dtype: str | None = None
    judge: str | None = None
    sound_judge: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "own_settings", parse_settings(self.own_settings))
        counts = ("held_out", "images", "reserved", "two", "pairs", "phrasings", "extensions",
                  "sounds")
        least = dict.fromkeys(counts, 0) | {"prompts": 1, "batch": 1, "windows": 2, "seeds": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise InputError(f"{name} is {getattr(self, name)}; give {value} or more")
        if self.seeds > MAX_SEEDS:
            raise InputError(f"seeds is {self.seeds}; give {MAX_SEEDS} or fewer")

    @property
    def settings(self) -> dict[str, Any]:
        """How clips are generated, as options of a request."""
        names = ("steps", "guidance", "shift", "sampler", "frames", "size")
        return {**{name: getattr(self, name) for name in names}, "settings": self.own_settings}


def items_of(bench: Benchmark, source: str) -> list[Item]:
    """The clips of a source; those of a pair (triples, phrasings) share scene seed and noise.

    What is generated comes `bench.seeds` times, all prompts with one seed each and then again;
    `index` is the prompt's.
    """
    material, way = SOURCES[source]
    pairs = _pairs(bench, material)
    return [
        Item(source, i, *pair, bench.seed + turn * len(pairs) + i)
        for turn in range(bench.seeds if way == "generate" else 1)
        for i, pair in enumerate(pairs)
    ]


def _pairs(bench: Benchmark, material: str) -> list[Pair]:
    split = bench.split
    if material == "text":
        return prompts(split, bench.prompts)
    if material == "held_out":
        return prompts(split, bench.held_out, held_out=True)
    if material == "image":  # a car that drives past is gone at the end
        pool = prompts(split, 2 * bench.images)
        return [p for p in pool if p[0].actors[0].motion != "drives past"][: bench.images]
    if material in ("seen_triples", "held_triples"):
        which = int(material == "held_triples")
        return _told([pair[which] for pair in matched_triples(split, bench.pairs)])
    if material in ("grammar", "phrased"):
        written = read_phrasings(bench.phrasings, split)
        own = material == "phrased"
        return [(p.scene, p.text if own else _told_of(p.scene)) for p in written]
    if material == "extend":
        return endless_prompts("endless", bench.extensions, split)
    first = SEED_RANGES[split][0]
    if material == "reserved":
        return _told(reserved_scenes(split, bench.reserved))
    if material == "two":
        mix = SceneMix(two_actors=1.0)
        return _told(sample_scenes(first + _TWO, bench.two, mix, split="train"))
    return _told(bouncing_scenes(first + _SOUND, bench.sounds))


def _told(scenes: list[Scene]) -> list[Pair]:
    return [(scene, _told_of(scene)) for scene in scenes]


def _told_of(scene: Scene) -> str:
    return caption(scene, seed=0, detail="full")


def reserved_scenes(split: str, count: int) -> list[Scene]:
    """Scenes of the reserved sprites in all motions and places."""
    first = SEED_RANGES[split][0] + _RESERVED
    pairs = [(s, m) for m in MOTIONS for s in RESERVED_SPRITES if is_valid(s, m)]
    return [
        compose_scene(first + i, *pairs[i % len(pairs)], PLACES[i % len(PLACES)])
        for i in range(count)
    ]


def endless_prompts(scenes: str, count: int, split: Literal["dev", "test"] = "dev") -> list[Pair]:
    """The first prompts of a split whose motion and camera can go on; of "any" scenes all."""
    wide = 1
    while True:
        pool = prompts(split, wide * count)
        found = [
            (scene, text) for scene, text in pool
            if scenes == "any"
            or (scene.camera == "still" and all(a.motion in ENDLESS for a in scene.actors))
        ]
        if len(found) >= count:
            return found[:count]
        wide *= 2


@lru_cache(maxsize=2)
def matched_triples(split: str, count: int) -> list[tuple[Scene, Scene]]:
    """Pairs of scenes, the first of a triple seen in training, the second of one held out.

    Both have one scene seed, motion and place, and with them camera, size, speed and weather, and
    are of one kind of sprite where that can be; sprites, motions and places come evenly.
    """
    start = SEED_RANGES[split][0] + _TRIPLES
    draws, uses = Draws(start, stream=62), Counter[str]()
    pairs: list[tuple[Scene, Scene]] = []
    for index in range(count):
        motion = MOTIONS[index % len(MOTIONS)]
        place = PLACES[(index + index // len(MOTIONS)) % len(PLACES)]
        order = sorted(SPRITE_NAMES, key=lambda name: uses[name] + draws.uniform())
        allowed = [name for name in order if is_valid(name, motion)]
        held = next(name for name in allowed if is_held_out(name, motion, place))
        seen = [name for name in allowed if not is_held_out(name, motion, place)]
        alike = [name for name in seen if SPRITES[name].kind == SPRITES[held].kind] or seen
        uses.update((held, alike[0]))
        pair = [compose_scene(start + index, name, motion, place) for name in (alike[0], held)]
        pairs.append((pair[0], pair[1]))
    return pairs
