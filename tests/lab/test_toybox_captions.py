import re
from collections import Counter

import pytest

from train.toybox.world.captions import (
    CLASSES,
    attributes,
    canonical_prompt,
    caption,
    nouns,
    phrases,
    prompts,
    vocabulary,
)
from train.toybox.world.cast import SPRITES
from train.toybox.world.scenes import (
    AMBIENCES,
    CAMERAS,
    EVENT_SOUNDS,
    MOTIONS,
    PLACES,
    RELATIONS,
    SEED_RANGES,
    TIMES,
    WEATHERS,
    Actor,
    Scene,
    SceneMix,
    is_held_out,
    sample_scenes,
)
from vidgen.core.errors import InputError

RICH = sample_scenes(0, 300, SceneMix(two_actors=0.4, tint=0.5, other_time=0.6, sound=0.5))


def test_a_caption_is_drawn_by_its_seed():
    assert [caption(s, 1) for s in RICH] == [caption(s, 1) for s in RICH]
    assert len({caption(RICH[0], seed) for seed in range(50)}) > 40


def test_canonical_prompts_read_well():
    car = Actor("car", "bounces", tint="blue", direction="right")
    assert canonical_prompt(Scene(0, (car,), "desert")) == (
        "a blue car bounces to the right in the desert"
    )
    elephant = Actor("elephant", "spins", size="large", speed="slow", direction="clockwise")
    scene = Scene(0, (elephant,), "city", "night", "rain", "zoom in", sound=("rain",))
    assert canonical_prompt(scene) == (
        "a large elephant spins clockwise slowly in the city at night in the rain, "
        "with the sound of pattering rain, the camera zooms in"
    )
    pair = (Actor("cat", "moves left"), Actor("umbrella", "moves left", size="small"))
    assert canonical_prompt(Scene(0, pair, "room", relation="chases")) == (
        "a cat chases a small umbrella to the left in a room"
    )


def test_every_word_is_in_the_vocabulary():
    known = set(vocabulary())
    assert 300 < len(known) < 700
    for scene in RICH:
        for seed in range(4):
            text = caption(scene, seed).lower()
            assert set(re.findall(r"[a-z'-]+", text)) <= known, text
            assert not set(text) & set("{}/"), text
            assert "  " not in text


def test_full_captions_name_all_that_is_unusual():
    words = phrases()
    for scene in RICH:
        text = caption(scene, 3, detail="full").lower()
        for actor in scene.actors:
            assert any(noun in text for noun in nouns(actor.sprite)), text
            assert actor.tint is None or actor.tint in text
            if actor.size != "medium":
                assert any(size in text for size in words["sizes"][actor.size])
        for kind, name, usual in (
            ("cameras", scene.camera, "still"),
            ("weathers", scene.weather, "clear"),
            ("times", scene.time_of_day, "night" if scene.place == "space" else "day"),
        ):
            assert name == usual or any(p in text for p in words[kind][name]), text
        places = words["places"][scene.place] + words["across"][scene.place]
        assert any(place in text for place in places), text


def test_short_captions_are_short():
    lengths = [len(caption(s, 0, detail="short")) for s in RICH if s.relation is None]
    full = [len(caption(s, 0, detail="full")) for s in RICH if s.relation is None]
    assert sum(lengths) < 0.65 * sum(full)


def test_most_captions_are_full():
    drawn = [(scene, seed) for scene in RICH for seed in range(3)]
    full = sum(caption(*pair) == caption(*pair, detail="full") for pair in drawn)
    short = sum(caption(*pair) == caption(*pair, detail="short") for pair in drawn)
    assert 0.10 < short / len(drawn) < 0.20
    assert 0.80 < full / len(drawn) < 0.90


def test_phrases_cover_the_world():
    words = phrases()
    assert set(words["places"]) == set(words["across"]) == set(PLACES)
    assert set(words["motions"]) == {*MOTIONS, "bounces along"}
    assert set(words["times"]) == set(TIMES)
    assert set(words["weathers"]) == set(WEATHERS)
    assert set(words["cameras"]) == set(CAMERAS)
    assert set(words["relations"]) == set(RELATIONS)
    voices = {s.voice for s in SPRITES.values() if s.voice}
    assert set(words["sounds"]) == {*voices, *AMBIENCES.values(), *EVENT_SOUNDS.values(), "rain"}


def test_no_phrase_means_two_things():
    words = phrases()
    for kind in ("places", "times", "weathers", "cameras", "sizes", "speeds"):
        uses = Counter(phrase for name in words[kind] for phrase in words[kind][name])
        assert max(uses.values()) == 1, kind
    uses = Counter(noun for sprite in SPRITES for noun in nouns(sprite))
    assert max(uses.values()) == 1


def test_labels_are_in_their_classes():
    for scene in RICH:
        labels = attributes(scene)
        assert labels.keys() == CLASSES.keys()
        for name, label in labels.items():
            assert label in CLASSES[name]


@pytest.mark.parametrize("held_out", [False, True])
def test_prompts_are_balanced_and_of_their_split(held_out):
    pairs = prompts("dev", 300, held_out=held_out)
    assert len(pairs) == 300
    for name in ("sprite", "motion", "place"):
        counts = Counter(attributes(scene)[name] for scene, _ in pairs)
        assert len(counts) == len(CLASSES[name])
        assert max(counts.values()) <= 1.4 * min(counts.values())
    low, high = SEED_RANGES["dev"]
    for scene, _ in pairs:
        actor = scene.actors[0]
        assert low <= scene.seed < high
        assert is_held_out(actor.sprite, actor.motion, scene.place) == held_out


def test_dev_and_test_prompts_differ_and_stay():
    dev, test = prompts("dev", 20), prompts("test", 20)
    assert dev == prompts("dev", 20)
    assert not {text for _, text in dev} & {text for _, text in test}
    with pytest.raises(InputError, match="dev and test"):
        prompts("train")
