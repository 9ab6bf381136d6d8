"""The little English that captions need: forms of verbs, articles, where actors are heading."""

from __future__ import annotations

import re
from typing import Literal

from train.toybox.world.scenes import Actor

Form = Literal["does", "doing", "do"]


def inflect(phrase: str, form: Form) -> str:
    """Choose a form of each verb of a phrase, which stands there as "drives/driving"."""

    def choose(match: re.Match[str]) -> str:
        does, doing = match.groups()
        return {"does": does, "doing": doing, "do": infinitive(does)}[form]

    return re.sub(r"([a-z]+)/([a-z]+)", choose, phrase)


def infinitive(does: str) -> str:
    """Return "fly" for "flies"."""
    if does.endswith("ies"):
        return f"{does[:-3]}y"
    return does[:-2] if re.search(r"(?:ss|sh|ch|x|o)es$", does) else does[:-1]


def with_article(text: str, *, definite: bool) -> str:
    """Put "the", "a" or "an" before a noun phrase."""
    if definite:
        return f"the {text}"
    return f"{'an' if re.match(r'[aeio]|u[lmn](?!i)', text) else 'a'} {text}"


def directions(actor: Actor) -> dict[str, str]:
    """Return the `direction` in which an actor goes, or turns, and the `opposite` one."""
    heading = actor.motion.split()[-1] if "moves" in actor.motion else actor.direction
    return {"direction": heading or "", "opposite": "left" if heading == "right" else "right"}
