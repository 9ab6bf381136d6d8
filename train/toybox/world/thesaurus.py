"""The words of loose captions, wider than the grammar's; `paraphrase` makes sentences of them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from train.toybox.world.captions import (
    FULL_SHARE,
    nouns,
    phrases,
    texts_in,
    vocabulary,
    words_in,
)
from train.toybox.world.cast import SPRITES
from train.toybox.world.grammar import directions, inflect, with_article
from train.toybox.world.motion import ASSETS
from train.toybox.world.scenes import PACED_MOTIONS, Actor, Draws, Scene
from train.toybox.world.slips import strange_word


@lru_cache(maxsize=1)
def paraphrases() -> dict[str, Any]:
    """Read paraphrases.json: what words.json lacks, and the sentences that it is said in."""
    table: dict[str, Any] = json.loads((ASSETS / "paraphrases.json").read_text())
    return table


@lru_cache(maxsize=1)
def loose_vocabulary() -> frozenset[str]:
    """Return every lower-case word of plain and loose captions, misspelt and made-up ones aside."""
    texts = texts_in([phrases(), paraphrases()])
    verbs = [inflect(text, "do") for text in texts]
    return frozenset({*vocabulary(), *words_in(texts), *words_in(verbs)})


def loose_names(sprite: str) -> tuple[str, ...]:
    """Return what people call a sprite, `nouns` first."""
    return (*nouns(sprite), *paraphrases()["nouns"].get(sprite, ()))


class Wording:
    """Draws the words for what a scene shows.

    Args:
        scene: the scene.
        draws: what all choices depend on.
        strength: from 0 to 1, of "words" (wider ones) and "unknown" (ones without meaning); what
            isn't named is 0.
        anonymous: the first actor gets no name, colour or voice.
    """

    def __init__(
        self, scene: Scene, draws: Draws, strength: Mapping[str, float], anonymous: bool
    ) -> None:
        self.scene, self.draws, self.anonymous = scene, draws, anonymous
        self.strength = strength
        self.full = draws.chance(FULL_SHARE)
        self.attributes = self._attributes(scene.actors[0])
        self.name = self._name(scene.actors[0], self.attributes)
        self.predicate = self._predicate()

    def fill(self, kind: str, **slots: str) -> str:
        """Draw one of a list of sentences and fill its slots."""
        sentence: str = self.draws.choice(paraphrases()[kind])
        return sentence.format(**slots)

    def word(self, kind: str, name: str) -> str:
        """Draw a phrase for a class, of the wider ones as often as "words" is strong."""
        plain: list[str] = phrases()[kind][name]
        wide: list[str] = paraphrases()[kind][name]
        return self.draws.choice(wide if self.draws.chance(0.8 * self._strong("words")) else plain)

    def strange(self, kind: str) -> str:
        """Draw a word without meaning: one of a list, or one that nobody knows."""
        if self.draws.chance(0.4):
            return strange_word(self.draws, loose_vocabulary())
        words: list[str] = paraphrases()[kind]
        return self.draws.choice(words)

    def noun_phrase(self, attributes: Sequence[str], name: str) -> str:
        """Put attributes, name and an article together, at times with a strange word in front."""
        words = list(attributes)
        if self.draws.chance(0.6 * self._strong("unknown")):
            words.insert(0, self.strange("styles"))
        if name in paraphrases()["anonymous"]:
            return name.format("".join(f"{word} " for word in words))
        return with_article(" ".join([*words, name]), definite=self.draws.chance(0.12))

    def other(self) -> str:
        """Return a noun phrase for the second actor."""
        second = self.scene.actors[1]
        attributes = self._attributes(second)
        return self.noun_phrase(attributes, self._name(second, attributes))

    def verb(self, actor: Actor) -> str:
        """Return what an actor does and how; verbs are in two forms."""
        along = actor.motion == "bounces" and actor.direction
        phrase = self.word("motions", "bounces along" if along else actor.motion)
        return phrase.format(go=self._go(actor), **directions(actor)) + self._manner(actor)

    def _strong(self, effect: str) -> float:
        return self.strength.get(effect, 0.0)

    def _is_hidden(self, actor: Actor) -> bool:
        return self.anonymous and actor is self.scene.actors[0]

    def _attributes(self, actor: Actor) -> list[str]:
        """Size and colour, as far as they are said."""
        words = []
        if self.full and (actor.size != "medium" or self.draws.chance(0.08)):
            words.append(self.word("sizes", actor.size))
        color = actor.tint or (SPRITES[actor.sprite].color if self.draws.chance(0.3) else None)
        if color and not self._is_hidden(actor) and (self.full or self.draws.chance(0.5)):
            wide = self.draws.chance(0.7 * self._strong("words"))
            words.append(self.draws.choice(paraphrases()["colors"][color]) if wide else color)
        return words

    def _name(self, actor: Actor, attributes: Sequence[str]) -> str:
        """What an actor is called, without an article; a hidden one's has one, and room for more.

        What is tinted isn't called golden, nor what is called so already.
        """
        if self._is_hidden(actor):
            names: Sequence[str] = paraphrases()["anonymous"]
            roomy = [name for name in names if "{}" in name]
            return self.draws.choice(roomy if attributes else names)
        wide = self.draws.chance(self._strong("words"))
        names = loose_names(actor.sprite) if wide else nouns(actor.sprite)
        colored = actor.tint or "golden" in attributes
        return self.draws.choice([n for n in names if not (colored and "golden" in n)])

    def _predicate(self) -> str:
        """What the first actor does, to the second if there is one; verbs are in two forms."""
        scene, first = self.scene, self.scene.actors[0]
        if scene.relation is None:
            return self.verb(first)
        template, second = self.word("relations", scene.relation), scene.actors[1]
        text = template.format(
            go=self._go(first), go2=inflect(self._go(second), "does"), other=self.other(),
            verb=self.verb(first), verb2=inflect(self.verb(second), "does"), **directions(first),
        )  # fmt: skip
        return text if "{verb}" in template else text + self._manner(first)

    def _go(self, actor: Actor) -> str:
        """How an actor gets about; a hidden one just moves, as "swims" would half name it."""
        if self._is_hidden(actor):
            moves: list[str] = paraphrases()["anonymous go"]
            return self.draws.choice(moves)
        return self.word("go", SPRITES[actor.sprite].kind)

    def _manner(self, actor: Actor) -> str:
        """Sense of rotation and speed, each with a leading space."""
        text = ""
        if not self.full:
            return text
        if actor.direction in phrases()["turns"] and self.draws.chance(0.8):
            text += f" {self.word('turns', str(actor.direction))}"
        paced = actor.motion in PACED_MOTIONS
        if actor.speed != "normal" or (paced and self.draws.chance(0.04)):
            text += f" {self.word('speeds', actor.speed)}"
        return text


def bare_words(phrase: str) -> str:
    """Return "forest" for "in the forest"."""
    return _LEADING.sub("", phrase, count=1)


_LEADING = re.compile(
    r"(?:in front of|next to|at the bottom of|at the foot of|in|on|at|by|over|among|amid|inside"
    r"|below|beneath|near|under|through|across|along|past|down|during|while it|as|with|beside"
    r"|between)\b (?:the |an? )?"
)
