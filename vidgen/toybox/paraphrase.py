"""Captions as people write them, for training: other words, orders and lengths, slips of fingers.

`captions` holds the plain grammar, which the benchmarks are made of; here scenes are said in the
wider words and the sentences of paraphrases.json, and then written carelessly (`slips`). The truth
stays: a loose caption leaves things out, but never says what the scene doesn't show.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from vidgen.toybox.captions import caption, nouns, phrases, texts_in, vocabulary, words_in
from vidgen.toybox.motion import ASSETS
from vidgen.toybox.scenes import SPRITES, Actor, Draws, Scene, times_in
from vidgen.toybox.slips import misspell, recase, strange_word

PLAIN_SHARE = 0.45
FULL_SHARE = 0.85
MAX_WORDS = 60
EFFECTS = ("words", "order", "length", "unknown", "slips", "capitals")
MILD = 0.25  # how strong an effect is that wasn't chosen, in one caption of five
_LEADING = re.compile(
    r"(?:in front of|next to|at the bottom of|at the foot of|in|on|at|by|over|among|amid|inside"
    r"|below|beneath|near|under|through|across|along|past|down|during|while it|as|with|beside"
    r"|between)\b (?:the |a |an )?"
)
_ADVERBIAL = re.compile(
    r"(?:$|(?:to|towards?|over|from|up|down|left|right|back|past|by|across|through|around|on|off|in"
    r"|upwards?|downwards?|leftwards?|rightwards?|along)\b)"
)


@lru_cache(maxsize=1)
def paraphrases() -> dict[str, Any]:
    """Read paraphrases.json: what words.json lacks, and the sentences that it is said in."""
    table: dict[str, Any] = json.loads((ASSETS / "paraphrases.json").read_text())
    return table


@lru_cache(maxsize=1)
def loose_vocabulary() -> list[str]:
    """Return every lower-case word of loose captions, misspelt ones aside, sorted."""
    return sorted({*vocabulary(), *words_in(texts_in(paraphrases()))})


def loose_names(sprite: str) -> tuple[str, ...]:
    """Return what people call a sprite, `nouns` first."""
    return (*nouns(sprite), *paraphrases()["nouns"].get(sprite, ()))


def loose_caption(scene: Scene, seed: int, *, anonymous: bool = False) -> str:
    """Put a scene into words as people do; 45% are plain captions.

    Args:
        scene: the scene.
        seed: draws the wording; the same seed gives the same caption.
        anonymous: the first actor gets no name, colour or voice ("it", "the subject"), since a
            picture shows it. None is a plain caption then.
    """
    draws = Draws(scene.seed * 0x10001 + seed, stream=7)
    if draws.chance(PLAIN_SHARE):
        if not anonymous:
            return caption(scene, seed)
        return compose(scene, draws, anonymous=True)
    chosen = {draws.choice(EFFECTS), draws.choice(EFFECTS)}
    strength = {
        name: 1.0 if name in chosen else MILD if draws.chance(0.2) else 0.0 for name in EFFECTS
    }
    text = compose(scene, draws, strength, anonymous=anonymous)
    if strength["slips"]:
        text = misspell(text, draws, 0.2 * strength["slips"], frozenset(loose_vocabulary()))
    return recase(text, draws, strength["capitals"])


def compose(
    scene: Scene,
    draws: Draws,
    strength: dict[str, float] | None = None,
    *,
    anonymous: bool = False,
) -> str:
    """Put a scene into words, spelt rightly and in lower case.

    Args:
        scene: the scene.
        draws: of the wording.
        strength: of the effects "words", "order", "length" and "unknown", from 0 to 1; what isn't
            named is 0.
        anonymous: see `loose_caption`.
    """
    return _Wording(scene, draws, strength or {}, anonymous).text()


class _Wording:
    """One way of putting a scene into words; each part of it is drawn once."""

    def __init__(
        self, scene: Scene, draws: Draws, strength: dict[str, float], anonymous: bool
    ) -> None:
        self.scene, self.draws, self.anonymous = scene, draws, anonymous
        self.strength = {name: strength.get(name, 0.0) for name in EFFECTS}
        first = scene.actors[0]
        self.full = draws.chance(FULL_SHARE)
        self.attributes = self._attributes(first)
        self.name = self._name(first)
        self.predicate = self._predicate()

    def text(self) -> str:
        """Return the whole caption."""
        strength, draws = self.strength, self.draws
        if draws.chance(0.3 * strength["order"]):
            text = self._keywords()
        else:
            kind = self._kind()
            lead, settings = self._settings(kind)
            text = self._sentence(kind, settings)
            if lead:
                text = self._fill("leads", lead=lead, text=text)
            text = self._with_camera(self._with_sound(text))
        return self._with_tags(self._with_fillers(text))

    def _word(self, kind: str, name: str) -> str:
        """Draw a phrase, from the wider ones as strongly as "words" is."""
        plain, wide = phrases()[kind].get(name, []), paraphrases()[kind].get(name, [])
        if wide and (not plain or self.draws.chance(0.8 * self.strength["words"])):
            return self.draws.choice(wide)
        return self.draws.choice(plain)

    def _fill(self, kind: str, **slots: str) -> str:
        return self.draws.choice(paraphrases()[kind]).format(**slots)

    # The actors

    def _attributes(self, actor: Actor) -> list[str]:
        """Size and colour, as far as they are said."""
        words, named = [], not (self.anonymous and actor is self.scene.actors[0])
        if self.full and (actor.size != "medium" or self.draws.chance(0.08)):
            words.append(self._word("sizes", actor.size))
        color = actor.tint or (SPRITES[actor.sprite].color if self.draws.chance(0.3) else None)
        if color and named and (self.full or self.draws.chance(0.5)):
            words.append(self._color(color))
        return words

    def _color(self, color: str) -> str:
        if self.draws.chance(0.7 * self.strength["words"]):
            return self.draws.choice(paraphrases()["colors"][color])
        return color

    def _name(self, actor: Actor) -> str:
        """What the actor is called, without an article; of an anonymous one all, with "{}"."""
        if self.anonymous and actor is self.scene.actors[0]:
            names = paraphrases()["anonymous"]
            if self.attributes and self.draws.chance(0.8):
                names = [name for name in names if "{}" in name]
            return self.draws.choice(names)
        names, colored = loose_names(actor.sprite), r"\bgolden\b"
        if not self.draws.chance(self.strength["words"]):
            names = nouns(actor.sprite)
        if actor.tint:
            names = [name for name in names if not re.search(colored, name)]
        return self.draws.choice(names)

    def _noun_phrase(self, attributes: Sequence[str], name: str) -> str:
        """Put name and attributes together, with strange words between where it is to be so."""
        words = list(attributes)
        if self.draws.chance(0.6 * self.strength["unknown"]):
            words.insert(0, self._strange("styles"))
        if "{}" in name or name in paraphrases()["anonymous"]:
            return name.format("".join(f"{word} " for word in words))
        return article(" ".join([*words, name]), definite=self.draws.chance(0.12))

    def _strange(self, kind: str) -> str:
        if self.draws.chance(0.4):
            return strange_word(self.draws, frozenset(loose_vocabulary()))
        return self.draws.choice(paraphrases()[kind])

    def _other(self) -> str:
        second = self.scene.actors[1]
        return self._noun_phrase(self._attributes(second), self._name(second))

    # What they do

    def _predicate(self) -> str:
        """What the first actor does, every verb in two forms."""
        scene, first = self.scene, self.scene.actors[0]
        if scene.relation is None:
            return self._verb(first)
        template = self._word("relations", scene.relation)
        second, direction = scene.actors[1], _heading(first)
        text = template.format(
            go=self._go(first), go2=inflect(self._go(second), "does"), other=self._other(),
            verb=self._verb(first), verb2=inflect(self._verb(second), "does"),
            direction=direction, opposite=_opposite(direction),
        )
        return text if "{verb}" in template else text + self._manner(first)

    def _go(self, actor: Actor) -> str:
        """How the actor gets about; an anonymous one just moves."""
        if self.anonymous and actor is self.scene.actors[0]:
            return self.draws.choice(paraphrases()["go"]["anonymous"])
        return self._word("go", SPRITES[actor.sprite].kind)

    def _verb(self, actor: Actor) -> str:
        along = actor.motion == "bounces" and actor.direction
        phrase = self._word("motions", "bounces along" if along else actor.motion)
        direction = _heading(actor)
        slots = {"direction": direction, "opposite": _opposite(direction)}
        return phrase.format(go=self._go(actor), **slots) + self._manner(actor)

    def _manner(self, actor: Actor) -> str:
        """Sense of rotation and speed, each with a leading space."""
        text = ""
        if not self.full:
            return text
        if actor.direction in phrases()["turns"] and self.draws.chance(0.8):
            text += f" {self._word('turns', actor.direction)}"
        if actor.speed != "normal" or self.draws.chance(0.04):
            text += f" {self._word('speeds', actor.speed)}"
        return text

    # Where and when

    def _settings(self, kind: str) -> tuple[str, str]:
        """Return a clause that leads, or none, and place, time and weather in some order."""
        lead, parts = "", [] if kind == "short" else [self._place(across=kind != "long")]
        for kind, name in self._unusual():
            if not lead and self.draws.chance(0.3 * self.strength["order"]):
                lead = self.draws.choice(paraphrases()["it is"][name])
            else:
                parts.insert(int(self.draws.uniform(0.6, 2.8)), self._word(kind, name))
        return lead, " ".join(parts)

    def _unusual(self) -> list[tuple[str, str]]:
        """Time and weather where they are to be said: what is usual only now and then."""
        scene, draws = self.scene, self.draws
        said = []
        if self.full and (scene.time_of_day != times_in(scene.place)[0] or draws.chance(0.25)):
            said.append(("times", scene.time_of_day))
        if self.full and scene.weather != "clear":
            said.append(("weathers", scene.weather))
        return said

    def _place(self, *, across: bool) -> str:
        first = self.scene.actors[0]
        goes = first.motion.startswith(("moves", "drives")) or first.direction in ("left", "right")
        across = across and goes and self.draws.chance(0.4)
        return self._word("across" if across else "places", self.scene.place)

    # Sentences

    def _sentence(self, kind: str, settings: str) -> str:
        """Say who does what where by one of the sentences of a kind."""
        bare = self._noun_phrase([], self.name)
        subject = self._noun_phrase(self.attributes, self.name)
        verb, _, rest = inflect(self.predicate, "does").partition(" ")
        if kind == "pairs":
            return f"{self._pair(subject)} {settings}"
        slots = {form: inflect(self.predicate, form) for form in ("does", "doing", "do")}
        slots |= {"subject": subject, "bare": bare, "settings": settings, "verb": verb}
        slots |= {"rest": rest, "attributes": " and ".join(self.attributes)}
        return self._fill(kind, **slots).strip().replace(" ,", ",").replace("  ", " ")

    def _pair(self, subject: str) -> str:
        """Say of two actors what they do together, beginning with either."""
        first, second = self.scene.actors
        template = self.draws.choice(paraphrases()["pairs"][self.scene.relation])
        return template.format(
            subject=subject, does=inflect(self._verb(first), "does"), other=self._other(),
            does2=inflect(self._verb(second), "does"), direction=_heading(first),
            opposite=_opposite(_heading(first)),
        )

    def _kind(self) -> str:
        """Draw the list of sentences to choose from, of those that suit the scene."""
        draws, order, length = self.draws, self.strength["order"], self.strength["length"]
        if not (self.full or draws.chance(0.6)):
            return "short"
        if draws.chance(0.75 * length):
            return "long" if draws.chance(0.4 * length) else "requests"
        if not draws.chance(order):
            return "plain"
        kinds = ["orders", "orders", "orders"]
        if not self.anonymous:
            kinds += ["named orders", "named orders"]
            _, _, rest = inflect(self.predicate, "does").partition(" ")
            bends = self.scene.actors[0].motion not in ("grows", "shrinks", "stays")
            if self.scene.relation is not None:
                kinds += ["pairs", "pairs"]
            elif bends and _ADVERBIAL.match(rest):
                kinds += ["inverted", "inverted"]
        if self.attributes:
            kinds.append("described")
        return draws.choice(kinds)

    def _keywords(self) -> str:
        """A list of what is to be seen, as one types it into a search."""
        scene, draws = self.scene, self.draws
        name = "subject" if self.anonymous else self.name
        parts = [" ".join([*self.attributes, name]), inflect(self.predicate, "doing")]
        kinds = [("places", scene.place), *self._unusual()]
        tail = [_LEADING.sub("", self._word(*kind), count=1) for kind in kinds]
        if scene.camera != "still":
            tail.append(self._word("cameras", scene.camera))
        if draws.chance(0.4):
            tail = tail[::-1]
        parts = [*tail, *parts] if draws.chance(0.2) else [*parts, *tail]
        return draws.choice((", ", ", ", ", ", " ", " / ", " - ", " | ", "; ", ". ")).join(parts)

    def _with_camera(self, text: str) -> str:
        if not self.full or not (self.scene.camera != "still" or self.draws.chance(0.2)):
            return text
        shot = self._word("cameras", self.scene.camera)
        if not self.draws.chance(max(0.3, self.strength["order"])):
            return f"{text}, {shot}"
        clause = shot.startswith(("the ", "we ")) and self.draws.chance(0.5)
        return self._fill("clause joins" if clause else "joins", text=text, camera=shot)

    def _with_sound(self, text: str) -> str:
        """Voices give names away, so nothing is heard of the anonymous."""
        if not self.scene.sound or self.anonymous or not self.full:
            return text
        heard = self.draws.choice(phrases()["sounds"][self.scene.sound[0]])
        plain = not self.draws.chance(self.strength["words"])
        table = phrases() if plain else paraphrases()
        return f"{text}, {self.draws.choice(table['hearing']).format(sound=heard)}"

    def _with_fillers(self, text: str) -> str:
        """Add words that mean nothing, before or behind, as long as there is room for them."""
        for _ in range(3):
            if not self.draws.chance(0.6 * self.strength["length"]):
                break
            filler = self.draws.choice(paraphrases()["fillers"])
            longer = f"{filler}, {text}" if self.draws.chance(0.3) else f"{text}, {filler}"
            text = longer if filler not in text and len(longer.split()) <= MAX_WORDS else text
        return text

    def _with_tags(self, text: str) -> str:
        for _ in range(4):
            if not self.draws.chance(0.7 * self.strength["unknown"]):
                break
            longer = f"{text}, {self._strange('tags')}"
            text = longer if len(longer.split()) <= MAX_WORDS else text
        return text


def article(text: str, *, definite: bool = False) -> str:
    """Put "a", "an" or "the" before a noun phrase."""
    if definite:
        return f"the {text}"
    return f"{'an' if re.match(r'[aeio]|u[lmn](?!i)', text) else 'a'} {text}"


def inflect(phrase: str, form: str) -> str:
    """Choose a form of each "drives/driving": "does", "doing" or "do" (drive)."""

    def choose(match: re.Match[str]) -> str:
        does, doing = match.groups()
        return {"does": does, "doing": doing, "do": _infinitive(does)}[form]

    return re.sub(r"([a-z]+)/([a-z]+)", choose, phrase)


def _infinitive(does: str) -> str:
    if does.endswith("ies"):
        return f"{does[:-3]}y"
    return does[:-2] if re.search(r"(?:ss|sh|ch|x|o)es$", does) else does[:-1]


def _heading(actor: Actor) -> str:
    return actor.motion.split()[-1] if "moves" in actor.motion else actor.direction or ""


def _opposite(direction: str) -> str:
    return "left" if direction == "right" else "right"
