"""Scenes to sentences: a grammar of paraphrases, its vocabulary, class labels, benchmark prompts.

The phrases stand in words.json; the first of each list is canonical. "drives/driving" is a verb in
its two forms; {go} becomes the way the sprite's kind gets about, {other} the second actor.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from typing import Any, Literal, TypeVar

from train.toybox.world.cast import SPRITE_NAMES, SPRITES
from train.toybox.world.grammar import directions, inflect, with_article
from train.toybox.world.motion import ASSETS
from train.toybox.world.scenes import (
    CAMERAS,
    DIRECTIONS,
    MOTIONS,
    PLACES,
    RELATIONS,
    SEED_RANGES,
    SIZES,
    SPEEDS,
    TIMES,
    TINTS,
    WEATHERS,
    Actor,
    Draws,
    Scene,
    compose_scene,
    is_held_out,
    is_valid,
    times_in,
    weathers_in,
)
from vidgen.core.errors import InputError

Detail = Literal["full", "short"]
T = TypeVar("T")
FULL_SHARE = 0.85
_NONE = "none"

#: The labels of each attribute of a scene, in class order; those of a second actor end in "_2".
CLASSES: dict[str, tuple[str, ...]] = {
    "sprite": SPRITE_NAMES,
    "motion": MOTIONS,
    "place": PLACES,
    "time_of_day": TIMES,
    "weather": WEATHERS,
    "camera": CAMERAS,
    "tint": (_NONE, *TINTS),
    "size": tuple(SIZES),
    "speed": SPEEDS,
    "direction": (_NONE, *DIRECTIONS),
    "relation": (_NONE, *RELATIONS),
    "sprite_2": (_NONE, *SPRITE_NAMES),
    "motion_2": (_NONE, *MOTIONS),
    "tint_2": (_NONE, *TINTS),
}


def attributes(scene: Scene) -> dict[str, str]:
    """Return the scene's label for each of `CLASSES`; a reserved sprite's name is in none."""
    first, second = scene.actors[0], (scene.actors[1] if len(scene.actors) > 1 else None)
    return {
        "sprite": first.sprite,
        "motion": first.motion,
        "place": scene.place,
        "time_of_day": scene.time_of_day,
        "weather": scene.weather,
        "camera": scene.camera,
        "tint": first.tint or _NONE,
        "size": first.size,
        "speed": first.speed,
        "direction": first.direction or _NONE,
        "relation": scene.relation or _NONE,
        "sprite_2": second.sprite if second else _NONE,
        "motion_2": second.motion if second else _NONE,
        "tint_2": (second.tint if second else None) or _NONE,
    }


@lru_cache(maxsize=1)
def phrases() -> dict[str, Any]:
    """Read words.json: the synonym lists of motions, places, times, weathers, cameras and so on."""
    words: dict[str, Any] = json.loads((ASSETS / "words.json").read_text())
    return words


def nouns(sprite: str) -> tuple[str, ...]:
    """Return what a sprite is called, its own name first."""
    return (sprite, *SPRITES[sprite].synonyms)


@lru_cache(maxsize=1)
def vocabulary() -> list[str]:
    """Return every lower-case word a caption can contain, sorted."""
    texts = [*texts_in(phrases()), "a an the"]
    texts += [" ".join((*nouns(s.name), s.color or "")) for s in SPRITES.values()]
    texts += [*TINTS, *DIRECTIONS]
    return sorted(words_in(texts))


def words_in(texts: Sequence[str]) -> set[str]:
    """Return the lower-case words of phrases, without what stands in braces."""
    return set(re.findall(r"[a-z]+(?:[-'][a-z]+)*", re.sub(r"\{\w*\}", " ", " ".join(texts))))


def texts_in(node: Any) -> list[str]:
    """Return the texts of a JSON value's lists and objects, without keys."""
    if isinstance(node, str):
        return [node]
    children = node.values() if isinstance(node, dict) else node
    return [text for child in children for text in texts_in(child)]


def caption(scene: Scene, seed: int, detail: Detail | None = None) -> str:
    """Put a scene into words, one of very many ways.

    Args:
        scene: the scene.
        seed: draws the wording; the same seed gives the same caption.
        detail: "full" names all that is visible, "short" the main thing alone; None draws one,
            full with `FULL_SHARE`.
    """
    draws = Draws(scene.seed * 0x10001 + seed, stream=5)
    full = draws.chance(FULL_SHARE)  # drawn always, so that the words after it stay the same
    full = full if detail is None else detail == "full"
    speech = _Speech(scene, draws)
    text = speech.full() if full else speech.short()
    return f"{text[0].upper()}{text[1:]}." if draws.chance(0.15) else text


def canonical_prompt(scene: Scene) -> str:
    """Return the scene's plain caption: first words of each list, usual details left unsaid."""
    return _Speech(scene, None).full()


class _Speech:
    """One way of putting a scene into words; without draws, the canonical one."""

    def __init__(self, scene: Scene, draws: Draws | None) -> None:
        self.scene, self.draws = scene, draws
        self.ing = self._maybe(0.35)

    def _pick(self, options: Sequence[T]) -> T:
        return self.draws.choice(options) if self.draws else options[0]

    def _maybe(self, probability: float) -> bool:
        return self.draws is not None and self.draws.chance(probability)

    def _word(self, kind: str, name: str) -> str:
        word: str = self._pick(phrases()[kind][name])
        return word

    def full(self) -> str:
        """Name everything; what is usual (day, clear, still) only now and then."""
        scene = self.scene
        tail = [self._place()]
        more = []
        if scene.time_of_day != times_in(scene.place)[0] or self._maybe(0.3):
            more.append(self._word("times", scene.time_of_day))
        if scene.weather != "clear" or (len(weathers_in(scene.place)) > 1 and self._maybe(0.15)):
            more.append(self._word("weathers", scene.weather))
        tail += more[::-1] if self._maybe(0.3) else more
        clause = self._clause(detailed=True)
        text = " ".join([clause, *tail])
        if self._maybe(0.15):
            text = f"{' '.join(tail)}, {clause}"
        elif self.ing and self._maybe(0.4):
            text = f"{self._pick(phrases()['openings'])} {text}"
        if scene.sound:
            heard = self._word("sounds", scene.sound[0])
            text += f", {self._pick(phrases()['hearing']).format(sound=heard)}"
        if scene.camera != "still" or self._maybe(0.25):
            shot = self._word("cameras", scene.camera)
            text = f"{shot}, {text}" if self._maybe(0.15) else f"{text}, {shot}"
        return text

    def short(self) -> str:
        """Name the first actor, its motion and perhaps the place."""
        clause = self._clause(detailed=False)
        return f"{clause} {self._place()}" if self._maybe(0.6) else clause

    def _clause(self, *, detailed: bool) -> str:
        """Return subject and verb, with the second actor where there is one."""
        scene, first = self.scene, self.scene.actors[0]
        subject = self._noun_phrase(first, detailed)
        if scene.relation is None:
            return f"{subject} {self._verb(first, detailed, self.ing)}"
        second = scene.actors[1]
        template = self._word("relations", scene.relation)
        slots = {
            **directions(first),
            "go": self._word("go", SPRITES[first.sprite].kind),
            "go2": inflect(self._word("go", SPRITES[second.sprite].kind), "does"),
            "other": self._noun_phrase(second, detailed),
            "verb": "{verb}",
            "verb2": self._verb(second, detailed, ing=False),
        }
        predicate = inflect(template.format(**slots), "doing" if self.ing else "does")
        if "{verb}" in predicate:
            predicate = predicate.format(verb=self._verb(first, detailed, self.ing))
        elif detailed:
            predicate += self._manner(first)
        return f"{subject} {predicate}"

    def _noun_phrase(self, actor: Actor, detailed: bool) -> str:
        words = []
        if detailed and (actor.size != "medium" or self._maybe(0.08)):
            words.append(self._word("sizes", actor.size))
        color = actor.tint or (SPRITES[actor.sprite].color if self._maybe(0.3) else None)
        if color and (detailed or self._maybe(0.5)):
            words.append(color)
        words.append(self._pick(nouns(actor.sprite)))
        text = " ".join(words)
        return with_article(text, definite=self._maybe(0.12))

    def _verb(self, actor: Actor, detailed: bool, ing: bool) -> str:
        along = actor.motion == "bounces" and actor.direction
        phrase = self._word("motions", "bounces along" if along else actor.motion)
        go = self._word("go", SPRITES[actor.sprite].kind)
        text = inflect(phrase.format(go=go, **directions(actor)), "doing" if ing else "does")
        return text + (self._manner(actor) if detailed else "")

    def _manner(self, actor: Actor) -> str:
        """Return sense of rotation and speed, each with a leading space."""
        text = ""
        if actor.direction in phrases()["turns"] and (self.draws is None or self._maybe(0.8)):
            text += f" {self._word('turns', str(actor.direction))}"
        if actor.speed != "normal" or self._maybe(0.04):
            text += f" {self._word('speeds', actor.speed)}"
        return text

    def _place(self) -> str:
        first = self.scene.actors[0]
        goes = first.motion.startswith(("moves", "drives")) or first.direction in ("left", "right")
        return self._word("across" if goes and self._maybe(0.4) else "places", self.scene.place)


def prompts(
    split: Literal["dev", "test"] = "dev", count: int = 300, *, held_out: bool = False
) -> list[tuple[Scene, str]]:
    """Return benchmark scenes of one actor with full captions, balanced over the main classes.

    Every sprite, motion and place comes as often as the others, give or take what validity and the
    hold-out exclude. Scene seeds come from the split's own range.

    Args:
        split: "dev" for choosing, "test" to be run once for a release.
        count: how many.
        held_out: give only triples never trained on, instead of none of them.

    Raises:
        InputError: an unknown split.
    """
    if split not in ("dev", "test"):
        raise InputError(f"prompts are split into dev and test, not {split!r}")
    start = SEED_RANGES[split][0] + (held_out << 32)
    draws, uses = Draws(start, stream=6), Counter[str]()
    pairs = []
    for seed in range(start, start + count):
        orders = [
            sorted(names, key=lambda name: uses[name] + draws.uniform())
            for names in (SPRITE_NAMES, MOTIONS, PLACES)
        ]
        triple = next(
            (sprite, motion, place)
            for sprite, motion, place in product(*orders)
            if is_valid(sprite, motion) and is_held_out(sprite, motion, place) == held_out
        )
        uses.update(triple)
        scene = compose_scene(seed, *triple)
        pairs.append((scene, caption(scene, seed=0, detail="full")))
    return pairs
