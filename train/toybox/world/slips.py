"""How carelessly people type: slips of the fingers, capitals, marks, words that nobody knows."""

from __future__ import annotations

import re
from collections.abc import Set as AbstractSet

from train.toybox.world.scenes import Draws
from vidgen.models.words import NEIGHBOURS

_ONSETS = ("b", "br", "d", "dr", "f", "fl", "g", "gl", "k", "kr", "l", "m", "n", "p", "pl", "qu",
           "r", "s", "sk", "st", "t", "tr", "v", "w", "x", "y", "z", "zw")  # fmt: skip
_VOWELS = ("a", "e", "i", "o", "u", "ee", "oo", "ai")
_CODAS = ("", "", "", "b", "k", "l", "m", "n", "nk", "p", "r", "s", "sh", "t", "x")


def misspell(text: str, draws: Draws, rate: float, known: AbstractSet[str]) -> str:
    """Let the fingers slip.

    Args:
        text: in lower case.
        draws: where and how.
        rate: share of the words of four letters or more that get one slip; shorter ones get fewer,
            so do the spaces between words.
        known: words that no slip may end in, as it would say something else.
    """
    parts = re.split(r"([a-z']+)", text)
    for i in range(1, len(parts), 2):
        word = parts[i]
        if not draws.chance(rate * (1.0 if len(word) >= 4 else 0.15 if len(word) == 3 else 0.0)):
            continue
        if "'" in word:
            parts[i] = word.replace("'", "")
        elif (slip := _slip(word, draws)) not in known:
            parts[i] = slip
    for i in range(2, len(parts) - 2, 2):
        if parts[i] == " " and draws.chance(0.15 * rate):
            joined = parts[i - 1] + parts[i + 1]
            parts[i] = "" if joined not in known else " "
    return "".join(parts)


def _slip(word: str, draws: Draws) -> str:
    """One slip: a letter replaced, dropped, doubled or swapped with the next."""
    at = int(draws.uniform() * (len(word) - 1)) + (draws.chance(0.2) and len(word) > 3)
    kind = draws.choice(("replace", "drop", "double", "swap"))
    if kind == "swap":
        at = min(at, len(word) - 2)
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    letter = word[at]
    put = {"replace": draws.choice(NEIGHBOURS[letter]), "drop": "", "double": 2 * letter}[kind]
    return word[:at] + put + word[at + 1 :]


def strange_word(draws: Draws, known: AbstractSet[str]) -> str:
    """Return a word of two or three random syllables that isn't known."""
    while True:
        syllables = 2 + draws.chance(0.4)
        word = "".join(
            draws.choice(_ONSETS) + draws.choice(_VOWELS) + draws.choice(_CODAS)
            for _ in range(syllables)
        )
        if word not in known:
            return word


def recase(text: str, draws: Draws, strength: float) -> str:
    """Write a text in capitals, titles or sentences, with marks at its end.

    Args:
        text: in lower case.
        draws: how.
        strength: 0 at most begins with a capital; 1 shouts.
    """
    if not draws.chance(strength):
        return f"{text[0].upper()}{text[1:]}." if draws.chance(0.2) else text
    style = draws.choice(("upper", "upper", "title", "sentences", "mixed", "marks"))
    if style == "upper":
        text = text.upper()
    elif style == "title":
        text = re.sub(r"(?<![\w'])[a-z]", lambda match: match[0].upper(), text)
    elif style == "sentences":
        text = re.sub(r"(?:^|(?<=\. ))[a-z]", lambda match: match[0].upper(), text)
    elif style == "mixed":
        words = (word.upper() if draws.chance(0.25) else word for word in text.split(" "))
        text = " ".join(words)
    elif draws.chance(0.5):
        text = re.sub(r"[,.:;]", "", text)
    return text + draws.choice(("", "", ".", "!", "!!!", "...", "?", " !!"))
