"""Sentences written by hand say what their truth is, and say it unlike the grammar."""

import re
from collections import Counter

import pytest

from eval.toybox.suite.phrasings import read_phrasings
from train.toybox.world.captions import caption, nouns, vocabulary
from train.toybox.world.cast import SPRITE_NAMES
from train.toybox.world.scenes import CAMERAS, MOTIONS, PLACES, SEED_RANGES, is_held_out, is_valid
from vidgen.core.errors import InputError

ALL = read_phrasings(200)
KINDS = {"typos", "capitals", "order", "synonyms", "longer", "unknown"}


def test_truths_are_scenes_that_could_be_trained_on() -> None:
    start, end = SEED_RANGES["dev"]
    for scene, _, _ in ALL:
        (actor,) = scene.actors
        assert is_valid(actor.sprite, actor.motion)
        assert not is_held_out(actor.sprite, actor.motion, scene.place)
        assert start <= scene.seed < end
    test = read_phrasings(200, "test")
    assert all(p.scene.seed >= SEED_RANGES["test"][0] for p in test)
    assert [p.text for p in test] == [p.text for p in ALL]


def test_kinds_come_by_turns_and_classes_evenly() -> None:
    assert {p.kind for p in ALL} == {p.kind for p in ALL[:6]} == KINDS
    assert min(Counter(p.kind for p in ALL).values()) >= 25
    actors = [p.scene.actors[0] for p in ALL]
    assert {a.sprite for a in actors} == set(SPRITE_NAMES)
    assert {a.motion for a in actors} == set(MOTIONS)
    assert {p.scene.place for p in ALL} == set(PLACES)
    assert {p.scene.camera for p in ALL} == set(CAMERAS)
    assert len({p.text for p in ALL}) == 200


def test_no_sentence_is_one_that_the_grammar_draws() -> None:
    known = set(vocabulary())
    for scene, text, kind in ALL:
        words = re.findall(r"[a-z]+(?:[-'][a-z]+)*", text.lower())
        if kind in ("typos", "synonyms", "unknown"):
            assert set(words) - known, text
        elif kind == "longer":
            assert len(words) >= 25, text
        elif kind == "order":
            assert not text.startswith(("a ", "an ")) or "," in text, text
        else:
            assert re.search(r"[A-Z].*[A-Z]|[.;!]", text), text
        assert text not in {caption(scene, seed) for seed in range(20)}


def test_sprites_are_named_where_words_are_not_what_is_tried() -> None:
    for scene, text, kind in ALL:
        if kind not in ("typos", "synonyms"):
            assert any(noun in text.lower() for noun in nouns(scene.actors[0].sprite)), text


def test_more_than_there_are_is_refused() -> None:
    with pytest.raises(InputError, match="phrasings is 201; there are 200"):
        read_phrasings(201)
