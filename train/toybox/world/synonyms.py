"""Single words of loose captions, and the grammar's own that mean the same.

A model meets each of the loose ones too seldom to learn it well.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import lru_cache

from train.toybox.world.captions import phrases, texts_in, vocabulary, words_in
from train.toybox.world.grammar import Form, inflect
from train.toybox.world.thesaurus import bare_words, paraphrases

_FORMS: tuple[Form, ...] = ("does", "doing")
_PLACED = ("places", "across", "times", "weathers")
_SAME = {"across": "places", "bounces along": "bounces"}


def grammar_synonyms() -> dict[str, list[str]]:
    """Words of the grammar, each with the words of loose captions that are to be read as it.

    Phrases are left out, and so is a word that stands for two of the grammar's or that is said of
    something else, too: "revolves" is "spins" and "circles around".
    """
    meant = dict([*_classes(), *_motions(), *_ways()])
    table = defaultdict(list)
    for word in sorted(meant.keys() - vocabulary()):
        if re.fullmatch("[a-z]+", word):
            table[meant[word]].append(word)
    return dict(sorted(table.items()))


def _classes() -> Iterator[tuple[str, str]]:
    """Phrases of one word, each with its class' first word."""
    wide, own = paraphrases(), phrases()
    for kind in ("nouns", "colors", "sizes", "speeds"):
        for name, words in wide[kind].items():
            known = own[kind][name][0] if kind in own else name
            yield from ((word, known) for word in words if _is_of(kind, name, word))
    for kind in _PLACED:
        for name, texts in wide[kind].items():
            first = own[_SAME.get(kind, kind)][name][0]
            known = bare_words(first)
            if known != first:  # not "underwater", which is no noun
                bare = (bare_words(text) for text in texts if bare_words(text) != text)
                yield from ((word, known) for word in bare if _is_of(kind, name, word))


def _motions() -> Iterator[tuple[str, str]]:
    """Verbs that name a motion, each with the grammar's in the same form."""
    for motion, verbs in paraphrases()["motions"].items():
        for verb in verbs:
            if " " not in verb and all(_is_of("motions", motion, word) for word in verb.split("/")):
                known = phrases()["motions"][motion][0]
                yield from ((inflect(verb, form), inflect(known, form)) for form in _FORMS)


def _ways() -> Iterator[tuple[str, str]]:
    """Verbs of getting about, each with the grammar's for all that get about so: "moves" fits."""
    wide, own = paraphrases()["go"], phrases()["go"]
    for verb in sorted({verb for verbs in wide.values() for verb in verbs}):
        said_in = {kind for word in verb.split("/") for kind, _ in _classes_with()[word]}
        if said_in <= {"go", "anonymous go", "motions"}:
            kinds = [kind for kind in wide if verb in wide[kind]]
            known = next(each for each in own[kinds[0]] if all(each in own[kind] for kind in kinds))
            yield from ((inflect(verb, form), inflect(known, form)) for form in _FORMS)


def _is_of(kind: str, name: str, word: str) -> bool:
    """Whether a word stands in phrases for one class alone."""
    return _classes_with()[word] == {(_SAME.get(kind, kind), _SAME.get(name, name))}


@lru_cache(maxsize=1)
def _classes_with() -> Mapping[str, set[tuple[str, str]]]:
    """Kind and class of all phrases with a word, by the word."""
    found = defaultdict(set)
    for kind, table in paraphrases().items():
        for name, texts in table.items() if isinstance(table, dict) else [("", table)]:
            for word in words_in(texts_in(texts)):
                found[word].add((_SAME.get(kind, kind), _SAME.get(name, name)))
    return found
