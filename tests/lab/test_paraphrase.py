import hashlib
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

import vidgen
from train.toybox.world.captions import (
    canonical_prompt,
    caption,
    nouns,
    phrases,
    prompts,
    texts_in,
    words_in,
)
from train.toybox.world.cast import SPRITE_NAMES, SPRITES
from train.toybox.world.grammar import directions, inflect
from train.toybox.world.paraphrase import EFFECTS, MAX_WORDS, compose, loose_caption
from train.toybox.world.scenes import Draws, SceneMix, sample_scenes
from train.toybox.world.slips import misspell, recase, strange_word
from train.toybox.world.thesaurus import loose_names, loose_vocabulary, paraphrases
from vidgen.models.tokenizer import PromptTokenizer
from vidgen.models.words import split_words

RICH = sample_scenes(5000, 300, SceneMix(two_actors=0.3, tint=0.4, other_time=0.6, sound=0.4))
TOKENIZER = Path(vidgen.__file__).parent / "assets" / "toybox" / "tokenizer"
SAID = {name: 1.0 for name in EFFECTS if name != "unknown"}  # all effects on what is said
COLORS = ["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "gray", "white"]


def wordings(*, anonymous=False):
    """Scenes with captions spelt rightly: half in strong paraphrase, half with mild effects."""
    for number, scene in enumerate(RICH):
        for seed in range(4):
            strength = SAID if seed % 2 else {"words": 0.5, "order": 0.5, "length": 0.25}
            draws = Draws(number * 4 + seed, stream=99)
            yield scene, compose(scene, draws, strength, anonymous=anonymous)


def says(text, phrase):
    return re.search(rf"(?<![\w-]){re.escape(phrase)}(?![\w-])", text) is not None


@cache
def called_by_name(sprite):
    """A pattern for any name of a sprite, in a text without articles."""
    names = [re.sub(r"\b(?:an?|the) ", "", name) for name in loose_names(sprite)]
    return re.compile(rf"(?<![\w-])(?:{'|'.join(map(re.escape, names))})(?![\w-])")


def merged(kind):
    plain, wide = phrases()[kind], paraphrases()[kind]
    assert plain.keys() == wide.keys()
    return {name: [*plain[name], *wide[name]] for name in plain}


def test_benchmark_prompts_are_what_they_always_were():
    texts = [text for _, text in prompts("dev", 500)]
    texts += [caption(scene, seed) for scene in RICH for seed in range(3)]
    texts += [canonical_prompt(scene) for scene in RICH]
    assert hashlib.sha256("\n".join(texts).encode()).hexdigest() == (
        "c66a2fdf53ae19e291fbe42d2c61b3e474483363de5e033a7334d81db0630021"
    )


def test_a_loose_caption_is_drawn_by_its_seed():
    for anonymous in (False, True):
        first = [loose_caption(s, 1, anonymous=anonymous) for s in RICH]
        assert first == [loose_caption(s, 1, anonymous=anonymous) for s in RICH]
    assert len({loose_caption(RICH[0], seed) for seed in range(100)}) > 80


def test_nearly_half_are_plain_captions():
    pairs = [(scene, seed) for scene in RICH for seed in range(5)]
    plain = sum(loose_caption(*pair) == caption(*pair) for pair in pairs) / len(pairs)
    assert 0.41 < plain < 0.49


def test_every_class_has_wider_words():
    assert set(paraphrases()["nouns"]) == set(SPRITE_NAMES)
    for sprite in SPRITE_NAMES:
        assert 3 <= len(paraphrases()["nouns"][sprite]) <= 8, sprite
    least = {"motions": 10, "places": 8, "across": 5, "times": 8, "weathers": 6, "cameras": 10,
             "sizes": 5, "speeds": 5, "turns": 5, "relations": 5, "go": 5}
    for kind, count in least.items():
        for name, wide in merged(kind).items():
            assert len(wide) - len(phrases()[kind][name]) >= count, (kind, name)
            assert len(set(wide)) == len(wide), (kind, name)
    assert set(paraphrases()["pairs"]) == set(phrases()["relations"])
    assert set(paraphrases()["it is"]) == {*phrases()["times"], *phrases()["weathers"]}
    assert set(paraphrases()["colors"]) == set(COLORS)


def test_no_wider_phrase_means_two_things():
    uses = Counter(name for sprite in SPRITES for name in loose_names(sprite))
    assert max(uses.values()) == 1
    for kind in ("motions", "places", "across", "times", "weathers", "cameras", "sizes", "speeds"):
        uses = Counter(phrase for wide in merged(kind).values() for phrase in wide)
        assert max(uses.values()) == 1, kind
    colors = Counter(texts_in(paraphrases()["colors"]))
    assert max(colors.values()) == 1


def test_only_a_sprites_own_names_contain_its_name():
    for sprite in SPRITES:
        for other in SPRITE_NAMES:
            for name in loose_names(sprite) if other != sprite else ():
                told = [noun for noun in loose_names(other) if says(name, noun)]
                assert not told, (name, told)


def test_no_sentence_names_a_sprite_by_the_way():
    table = {kind: part for kind, part in paraphrases().items() if kind != "nouns"}
    for text in texts_in(table):
        named = [name for sprite in SPRITES for name in loose_names(sprite) if says(text, name)]
        assert named in ([], ["orange"]), (text, named)


def test_every_verb_has_its_forms():
    for kind in ("go", "motions", "relations"):
        for text in texts_in(paraphrases()[kind]):
            assert re.match(r"[a-z]+/[a-z]+ing\b|\{go\}|\{verb\}|just stands/standing", text), text
    forms = {inflect(text, "do").split()[0] for text in texts_in(merged("motions")) if "/" in text}
    assert {"go", "cross", "do", "rise", "sway", "bounce", "stay", "pass", "rest"} <= forms
    assert inflect("flies/flying past and carries/carrying on", "do") == "fly past and carry on"


def test_an_actor_is_called_by_a_name_of_its_own_only():
    for scene, text in wordings():
        bare = re.sub(r"\b(?:an?|the) ", "", text)
        called = {sprite for sprite in SPRITES if called_by_name(sprite).search(bare)}
        shown = {actor.sprite for actor in scene.actors}
        assert scene.actors[0].sprite in called, text
        assert called <= shown, text


def test_no_direction_contradicts_the_scene():
    coming = re.compile(r"from (?:the )?(?:left|right)|appear(?:s|ing) on the (?:left|right)")
    for scene, text in wordings():
        ways = {directions(actor)["direction"] for actor in scene.actors}
        ways.add(scene.camera.split()[-1])
        told = set(re.findall(r"\b(left|right)(?:wards?)?\b", coming.sub("", text)))
        assert told <= ways, text
        for other in re.findall(r"\b(counter|anti)?-?clockwise", text):
            assert ("counterclockwise" if other else "clockwise") in ways, text


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "attribute"),
    [("cameras", "camera"), ("weathers", "weather"), ("times", "time_of_day"), ("places", "place")],
)
def test_nothing_is_said_of_other_classes(kind, attribute):
    table = merged(kind)
    if kind == "places":
        table = {name: [*wide, *merged("across")[name]] for name, wide in table.items()}
    if kind in ("times", "weathers"):
        table = {name: [*wide, *paraphrases()["it is"][name]] for name, wide in table.items()}
    for scene, text in wordings():
        name = getattr(scene, attribute)
        rest = text
        for phrase in sorted(table[name], key=len, reverse=True):
            rest = re.sub(rf"(?<![\w-]){re.escape(phrase)}(?![\w-])", " ", rest)
        for other in set(table) - {name}:
            told = [phrase for phrase in table[other] if says(rest, phrase)]
            assert not told, (text, told)


def test_a_full_wording_still_says_what_moves_where():
    table = {name: [*a, *merged("across")[name]] for name, a in merged("places").items()}
    named = 0
    for scene, text in wordings():
        named += any(says(text, phrase) for phrase in table[scene.place])
    assert named > 0.6 * 4 * len(RICH)  # the others are short or lists of keywords


def test_captions_are_in_the_vocabulary_but_for_slips_and_nonsense():
    for scene, text in wordings():
        assert words_in([text]) <= loose_vocabulary(), text
        assert not set(text) & set("{}"), text
        assert not re.search(r"  | ,|^ | $", text), (scene, text)


def test_captions_stay_within_what_the_model_reads():
    tokenizer = PromptTokenizer(TOKENIZER)
    longest = 0
    for scene in RICH:
        for seed in range(6):
            text = loose_caption(scene, seed, anonymous=seed == 5)
            assert len(text.split()) <= MAX_WORDS, text
            longest = max(longest, tokenizer.count(text))
    assert 60 < longest < tokenizer.max_length // 2


def test_the_anonymous_are_neither_named_nor_coloured_nor_heard():
    for scene, text in wordings(anonymous=True):
        first = scene.actors[0]
        assert not [name for name in loose_names(first.sprite) if says(text, name)], text
        color = first.tint or SPRITES[first.sprite].color
        settings = [*merged("places")[scene.place], *merged("across")[scene.place]]
        rest = text
        for phrase in settings:
            rest = rest.replace(phrase, " ")
        second = scene.actors[1:]
        if color and not second:
            assert not says(rest, color), text
            assert not [c for c in paraphrases()["colors"][color] if says(rest, c)], text
        assert not re.search(r"\b(?:sound|hear|audio|accompanied)\b", text), text


def test_anonymous_captions_name_nothing_after_slips_either():
    for scene in RICH:
        for seed in range(5):
            text = loose_caption(scene, seed, anonymous=True).lower()
            names = loose_names(scene.actors[0].sprite)
            assert not [name for name in names if says(text, name)], text


def test_slips_hit_many_words_and_never_make_another_word():
    known = loose_vocabulary()
    changed = total = 0
    for number, scene in enumerate(RICH):
        text = caption(scene, number, detail="full").lower()
        slipped = misspell(text, Draws(number), 1.0, known)
        new = words_in([slipped]) - words_in([text])
        assert not new & known, slipped
        total += len(re.findall(r"[a-z]{4,}", text))
        changed += len(new)
    assert changed > 0.6 * total
    assert misspell("a cat", Draws(0), 0.0, known) == "a cat"
    assert misspell("it's", Draws(0), 1.0, known) == "its"


def test_slips_are_small():
    for seed in range(300):
        slipped = misspell("butterfly", Draws(seed), 1.0, frozenset())
        assert abs(len(slipped) - 9) <= 1
        assert sum((Counter(slipped) - Counter("butterfly")).values()) <= 1


def test_capitals_change_no_letter():
    shouted = 0
    for seed in range(200):
        text = "a cat's toy, in the sand. it is night"
        written = recase(text, Draws(seed), 1.0)
        assert re.sub(r"[^a-z ]", "", written.lower()).strip() == re.sub(r"[^a-z ]", "", text)
        assert "'S" not in written or written.isupper() or "CAT'S" in written
        shouted += written.isupper()
    assert 40 < shouted < 110


def test_made_up_words_are_unknown_ones():
    known = loose_vocabulary()
    words = {strange_word(Draws(seed), known) for seed in range(300)}
    assert len(words) > 290
    assert not words & known


def test_words_that_a_release_lists_cover_the_captions():
    listed = {part for word in loose_vocabulary() for part in split_words(word)}
    for scene, text in wordings():
        assert set(split_words(text)) <= listed, (scene, text)
    assert {word for sprite in SPRITE_NAMES for name in nouns(sprite)
            for word in split_words(name)} <= listed
