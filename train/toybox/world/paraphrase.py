"""Captions as people write them, for training: other words, orders and lengths, slips of fingers.

`captions` holds the plain grammar, which the benchmarks are made of; here scenes are said in wider
words (`thesaurus`) and the sentences of paraphrases.json, and then written carelessly (`slips`).
The truth stays: a loose caption leaves things out, but never says what the scene doesn't show.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from train.toybox.world.captions import caption, phrases
from train.toybox.world.grammar import Form, directions, inflect
from train.toybox.world.scenes import Draws, Scene, times_in, weathers_in
from train.toybox.world.slips import misspell, recase
from train.toybox.world.thesaurus import Wording, bare_words, loose_vocabulary, paraphrases

PLAIN_SHARE = 0.45
MAX_WORDS = 60
EFFECTS = ("words", "order", "length", "unknown", "slips", "capitals")
MILD = 0.25  # how strong an effect is that wasn't chosen, in one caption of five
NOTHING: Mapping[str, float] = {}
_SEPARATORS = (", ", ", ", ", ", " ", " / ", " - ", " | ", "; ", ". ")
_HIDDEN = ("it", "subject", "this one", "character", "main character")
_BENDS = re.compile(
    r"$|(?:to|towards?|over|from|up|down|left|right|back|past|by|across|through|around|on|in|along"
    r"|(?:up|down|left|right)wards?|fast|(?:anti|counter)?clockwise|\w+ly)\b"
)


def loose_caption(scene: Scene, seed: int, *, anonymous: bool = False) -> str:
    """Put a scene into words as people do; `PLAIN_SHARE` of them are plain all the same.

    Args:
        scene: the scene.
        seed: draws the wording; the same seed gives the same caption.
        anonymous: the first actor gets no name, colour or voice ("it", "the subject"): a picture
            shows it.
    """
    draws = Draws(scene.seed * 0x10001 + seed, stream=7)
    if draws.chance(PLAIN_SHARE):
        return compose(scene, draws, anonymous=True) if anonymous else caption(scene, seed)
    chosen = {draws.choice(EFFECTS), draws.choice(EFFECTS)}
    strength = {
        name: 1.0 if name in chosen else MILD if draws.chance(0.2) else 0.0 for name in EFFECTS
    }
    text = compose(scene, draws, strength, anonymous=anonymous)
    text = misspell(text, draws, 0.2 * strength["slips"], loose_vocabulary())
    return recase(text, draws, strength["capitals"])


def compose(
    scene: Scene, draws: Draws, strength: Mapping[str, float] = NOTHING, *, anonymous: bool = False
) -> str:
    """Put a scene into words, spelt rightly and in lower case.

    Args:
        scene: the scene.
        draws: draws the wording.
        strength: from 0 to 1, of "words", "order", "length" and "unknown"; what isn't named is 0.
        anonymous: see `loose_caption`.
    """
    return _Caption(scene, draws, strength, anonymous).text()


class _Caption(Wording):
    """One way of putting a scene into words."""

    def text(self) -> str:
        """Return the whole caption."""
        order = self._strong("order")
        if self.draws.chance(0.25 * order):
            text = self._keywords()
        else:
            kind = self._kind()
            lead, settings = self._settings(kind)
            text = self._sentence(kind, settings)
            if lead:
                text = self.fill("leads", lead=lead, text=text)
            text = self._with_camera(self._with_sound(text))
            if self.draws.chance(0.15 * order):
                text = re.sub(r"\b(?:an?|the) ", "", text)
        return self._with_tags(self._with_fillers(text))

    def _kind(self) -> str:
        """Draw the list of sentences to choose from, of those that suit the scene."""
        draws, length = self.draws, self._strong("length")
        if not (self.full or draws.chance(0.6)):
            return "short"
        if draws.chance(0.75 * length):
            return "long" if draws.chance(0.4 * length) else "requests"
        if not draws.chance(self._strong("order")):
            return "plain"
        kinds = ["orders", "orders", "orders"]
        if self.attributes:
            kinds.append("described")
        if not self.anonymous:
            kinds += ["named orders", "named orders"]
            _, _, rest = inflect(self.predicate, "does").partition(" ")
            changes = self.scene.actors[0].motion in ("grows", "shrinks", "stays")
            if self.scene.relation is not None:
                kinds += ["pairs", "pairs"]
            elif not rest:
                kinds += ["acting", "acting"]
            if self.scene.relation is None and _BENDS.match(rest) and not changes:
                kinds += ["inverted", "inverted"]
        return draws.choice(kinds)

    def _sentence(self, kind: str, settings: str) -> str:
        """Say who does what where by one of the sentences of a kind."""
        subject = self.noun_phrase(self.attributes, self.name)
        if kind == "pairs":
            return f"{self._pair(subject)} {settings}"
        does, doing = inflect(self.predicate, "does"), inflect(self.predicate, "doing")
        verb, _, rest = does.partition(" ")
        text = self.fill(
            kind, subject=subject, bare=self.noun_phrase([], self.name), settings=settings,
            attributes=" and ".join(self.attributes), verb=verb, rest=rest,
            does=does, doing=doing, do=inflect(self.predicate, "do"),
            acting=self.noun_phrase([*self.attributes, doing], self.name),
        )  # fmt: skip
        return re.sub(r" +(?=[ ,]|$)", "", text.lstrip())

    def _pair(self, subject: str) -> str:
        """Say of two actors what they do together, beginning with either."""
        first, second = self.scene.actors
        template: str = self.draws.choice(paraphrases()["pairs"][self.scene.relation])
        return template.format(
            subject=subject, does=inflect(self.verb(first), "does"), other=self.other(),
            does2=inflect(self.verb(second), "does"), **directions(first),
        )  # fmt: skip

    def _settings(self, kind: str) -> tuple[str, str]:
        """Return a clause that leads, or none, and place, time and weather in some order."""
        if kind == "short":
            return "", ""
        lead, parts = "", [self._place(across=kind != "long")]
        for what, name in self._unusual():
            if not lead and self.draws.chance(0.3 * self._strong("order")):
                lead = self.draws.choice(paraphrases()["it is"][name])
            else:
                parts.insert(0 if self.draws.chance(0.15) else 2, self.word(what, name))
        return lead, " ".join(parts)

    def _place(self, *, across: bool) -> str:
        first = self.scene.actors[0]
        goes = first.motion.startswith(("moves", "drives")) or first.direction in ("left", "right")
        across = across and goes and self.draws.chance(0.4)
        return self.word("across" if across else "places", self.scene.place)

    def _unusual(self) -> list[tuple[str, str]]:
        """Time and weather where they are to be said: what is usual only now and then."""
        scene, said = self.scene, list[tuple[str, str]]()
        if not self.full:
            return said
        if scene.time_of_day != times_in(scene.place)[0] or self.draws.chance(0.25):
            said.append(("times", scene.time_of_day))
        changes = len(weathers_in(scene.place)) > 1
        if scene.weather != "clear" or (changes and self.draws.chance(0.1)):
            said.append(("weathers", scene.weather))
        return said

    def _keywords(self) -> str:
        """List what is to be seen, as one types it into a search."""
        name = self.draws.choice(_HIDDEN) if self.anonymous else self.name
        form: Form = "do" if self.draws.chance(0.2) else "doing"
        parts = [" ".join([*self.attributes, name]), inflect(self.predicate, form)]
        kinds = [("places", self.scene.place), *self._unusual()]
        tail = [bare_words(self.word(*kind)) for kind in kinds]
        if self.scene.camera != "still":
            tail.append(self.word("cameras", self.scene.camera))
        if self.draws.chance(0.4):
            tail.reverse()
        parts = [*tail, *parts] if self.draws.chance(0.2) else [*parts, *tail]
        return self.draws.choice(_SEPARATORS).join(parts)

    def _with_camera(self, text: str) -> str:
        if not self.full or not (self.scene.camera != "still" or self.draws.chance(0.2)):
            return text
        shot = self.word("cameras", self.scene.camera)
        if not self.draws.chance(max(0.3, self._strong("order"))):
            return f"{text}, {shot}"
        clause = shot.startswith(("the ", "we ")) and self.draws.chance(0.5)
        return self.fill("clause joins" if clause else "joins", text=text, camera=shot)

    def _with_sound(self, text: str) -> str:
        """Name what is heard; voices give names away, so it is nothing for the anonymous."""
        if not self.scene.sound or self.anonymous or not self.full:
            return text
        heard = self.draws.choice(phrases()["sounds"][self.scene.sound[0]])
        table = paraphrases() if self.draws.chance(self._strong("words")) else phrases()
        return f"{text}, {self.draws.choice(table['hearing']).format(sound=heard)}"

    def _with_fillers(self, text: str) -> str:
        """Add what means nothing, before or behind, as long as there is room for it."""
        for _ in range(3):
            if not self.draws.chance(0.6 * self._strong("length")):
                break
            filler = self.draws.choice(paraphrases()["fillers"])
            longer = f"{filler}, {text}" if self.draws.chance(0.3) else f"{text}, {filler}"
            text = longer if filler not in text and len(longer.split()) <= MAX_WORDS else text
        return text

    def _with_tags(self, text: str) -> str:
        for _ in range(4):
            if not self.draws.chance(0.7 * self._strong("unknown")):
                break
            tag = self.strange("tags")
            if tag not in text and len(f"{text} {tag}".split()) <= MAX_WORDS:
                text = f"{text}, {tag}"
        return text
