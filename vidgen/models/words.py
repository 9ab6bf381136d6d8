"""Word normalisation: replace a word that a model doesn't know by the known one that is meant.

The word may be a synonym, another form of a known word, or a typing error. English words, names and
synonyms are in `assets/english`; all models share them.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import lru_cache
from pathlib import Path

from vidgen.core.errors import ModelError

ENGLISH = Path(__file__).parent.parent / "assets" / "english"
WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")
SPECIAL = re.compile(r"<[^<>\s]*>")
_SPECIAL_OR_WORD = re.compile(f"{SPECIAL.pattern}|{WORD.pattern}")
_LINKS = frozenset(["a", "an", "and", "at", "by", "from", "in", "into", "is", "it", "of", "on",
                    "over", "the", "through", "to", "under", "up", "with"])  # fmt: skip
_SHORT_STEM = re.compile(r"[^aeiou]+[aeiou][^aeiouwxy]")  # doubles its last letter: hop, hopping
_VOWELS = frozenset("aeiou")
_LONG = 7  # least letters of a word in which two slips are corrected
_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")  # of a keyboard
_FIRST = 0.01  # added cost of a slip in the first letter, which is rare


def _neighbours() -> dict[str, str]:
    near = {letter: "" for row in _ROWS for letter in row}
    for r, row in enumerate(_ROWS):
        for c, letter in enumerate(row):
            sides = row[max(0, c - 1) : c] + row[c + 1 : c + 2]
            above = _ROWS[r - 1][c : c + 2] if r else ""
            below = _ROWS[r + 1][max(0, c - 1) : c + 1] if r < len(_ROWS) - 1 else ""
            near[letter] = sides + above + below
    return near


NEIGHBOURS = _neighbours()
"""Neighbours of each letter on a keyboard."""


def split_words(text: str) -> list[str]:
    """Return the lowercase words of a prompt or caption, without numbers and `<tokens>`."""
    return WORD.findall(SPECIAL.sub(" ", text).lower())


def replace_words(text: str, replacements: Mapping[str, str]) -> str:
    """Replace words of a text, ignoring case; `<tokens>` stay unchanged."""
    return _SPECIAL_OR_WORD.sub(lambda found: replacements.get(found[0].lower(), found[0]), text)


def near_words(
    word: str, known: Collection[str], rank: Callable[[str], float] | None = None
) -> list[str]:
    """Return at most three known words that may be meant by a mistyped `word`, best first.

    A slip is a missing, extra or wrong letter, or two swapped letters. Words of three to five
    letters may have one slip, longer ones two. All words are in lower case; `rank` returns a known
    word's rarity, from 0 to 1.
    """
    most = 0 if len(word) < 3 else 1 if len(word) < 6 else 2
    near, letters = [], _letters(word)
    for other in known:
        if len(other) > 1 and abs(len(other) - len(word)) <= most:
            its = _letters(other)
            if max(len(letters - its), len(its - letters)) > most:
                continue  # a slip changes one letter at most; a cheap test for most words
            cost = _slips(word, other)
            if cost < most + 1:
                cost += (0.03 * rank(other) if rank else 0) + 0.008 * (other in _LINKS)
                near.append((cost, other))
    return [other for _, other in sorted(near)[:3]]


@lru_cache(maxsize=8192)
def _letters(word: str) -> frozenset[str]:
    return frozenset(word)


def slip_count(word: str, other: str) -> int:
    """Return the number of slips between two words (optimal string alignment, Damerau 1964)."""
    return int(_slips(word, other))


def _slips(typed: str, meant: str) -> float:
    """Return the number of slips, plus a fraction that is larger for less likely slips."""
    before, row = list[float](), [sum(_missing(meant, k) for k in range(j))
                                  for j in range(len(meant) + 1)]  # fmt: skip
    for i, letter in enumerate(typed):
        older, before, row = before, row, [row[0] + _surplus(typed, i)]
        for j, its in enumerate(meant):
            best = min(
                before[j + 1] + _surplus(typed, i),
                row[j] + _missing(meant, j),
                before[j] + (0 if letter == its else _other(letter, its, is_first=not i or not j)),
            )
            if i and j and letter == meant[j - 1] and its == typed[i - 1]:
                best = min(best, older[j - 1] + (1 if i > 1 and j > 1 else 1 + _FIRST))
            row.append(best)
    return row[-1]


def _surplus(typed: str, at: int) -> float:
    return 1 if at and typed[at] == typed[at - 1] else 1.016


def _missing(meant: str, at: int) -> float:
    if at and meant[at] == meant[at - 1]:
        return 1
    return 1.008 + _FIRST * (not at)


def _other(letter: str, its: str, *, is_first: bool) -> float:
    if letter in NEIGHBOURS.get(its, ""):
        unlike = 0.002
    else:
        unlike = 0.006 if letter in _VOWELS and its in _VOWELS else 0.02
    return 1 + unlike + _FIRST * is_first


class WordReader:
    """Find known words to replace those that a model doesn't know, or that were too rare.

    Args:
        known: the model's words, in lower case.
        rank: returns a known word's rarity, from 0 to 1, to choose among corrections.
        rare: known words that were too rare in training, each with a more common replacement.
    """

    def __init__(
        self, known: Collection[str], rank: Callable[[str], float], rare: Mapping[str, str]
    ) -> None:
        self.known, self._rank, self._rare = known, rank, rare

    def read(self, word: str) -> str | None:
        """Return the known word or words that a lowercase word most likely means; None if unclear.

        An English word or name is replaced by a synonym, a more general word or another form, but
        never counts as a typing error: "goat" isn't read as "boat", nor "Mary" as "mare".
        """
        meant = word if word in self._rare else self._unknown(word)
        return meant and replace_words(meant, self._rare)

    def _unknown(self, word: str) -> str | None:
        if (meant := self._synonym(word)) is not None:
            return meant
        if word.removesuffix("'s") in english_words():
            forms = (form for form in _other_forms(word) if form in self.known)
            of_one = filter(None, map(self._synonym, _singulars(word)))
            return next(forms, None) or next(of_one, None)
        near = next(iter(self.near(word)), None)
        if near is not None and slip_count(word, near) == 1:
            return near
        if (joined := self._joined(word)) is not None:
            return joined
        # two slips: the first letter is rarely wrong (Kukich 1992, section 1.2), nor is a third of
        # the letters; another word, such as a name, is more likely in these cases
        return near if near is not None and len(word) >= _LONG and word[0] == near[0] else None

    def near(self, word: str) -> list[str]:
        """Return at most three known words that may be meant by a mistyped one, best first."""
        return near_words(word, self.known, self._rank)

    def _synonym(self, word: str) -> str | None:
        meant = synonyms().get(word)
        return meant if meant and all(part in self.known for part in meant.split()) else None

    def _joined(self, word: str) -> str | None:
        """Split a word into two known ones, at least one of them a linking word such as "on"."""
        for at in range(1, len(word)):
            parts = word[:at], word[at:]
            if all(part in self.known for part in parts) and not _LINKS.isdisjoint(parts) and (
                len(max(parts, key=len)) > 2
            ):
                return " ".join(parts)
        return None


def _singulars(word: str) -> Iterator[str]:
    """Yield possible singulars of a plural or genitive."""
    if word.endswith("'s"):
        yield word[:-2]
    elif word.endswith("s") and not word.endswith("ss") and len(word) > 3:
        if word.endswith("ies"):
            yield f"{word[:-3]}y"
        yield word[:-1]
        if word.endswith("es"):
            yield word[:-2]


def _other_forms(word: str) -> Iterator[str]:
    """Yield forms of the same noun or verb: singular and plural, "jumps" for "jumped"."""
    yield from _singulars(word)
    yield f"{word}s"
    if word.endswith("ied"):
        yield f"{word[:-3]}ies"
    for ending in ("ed", "ing"):
        stem = word.removesuffix(ending)
        if stem == word or len(stem) < 3:
            continue
        if not _SHORT_STEM.fullmatch(stem):
            yield f"{stem}s"
        if stem[-1] == stem[-2]:
            yield f"{stem[:-1]}s"
        yield f"{stem}es"


@lru_cache(maxsize=1)
def synonyms() -> dict[str, str]:
    """Return a table from English words to synonyms or more general words."""
    return read_synonyms(ENGLISH / "synonyms.json")


def read_synonyms(path: Path) -> dict[str, str]:
    """Read a table `{meant: [words]}` as `{word: meant}`; raise ModelError if it can't be read."""
    try:
        table = json.loads(path.read_text("utf-8"))
        meant = {word: known for known, words in table.items() for word in words}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path} is not a table of synonyms: {error}; copy it again") from error
    return meant


@lru_cache(maxsize=1)
def english_words() -> frozenset[str]:
    """Return common English words and given names of three letters or more, in lower case."""
    packed = (ENGLISH / "words.txt.gz").read_bytes()
    names = (ENGLISH / "names.txt").read_text("utf-8")
    return frozenset(gzip.decompress(packed).decode().split()) | frozenset(names.split())
