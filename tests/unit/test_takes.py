"""Takes: what a prompt asks of the judge, and which take comes first."""

from dataclasses import replace

import pytest

from train.toybox.world.captions import canonical_prompt, caption
from train.toybox.world.scenes import sample_scenes
from vidgen.story.takes import TakeScore, best_take, wanted_by

GOOD = TakeScore(5, "a.mp4", (), (), {"sprite": True}, 0.9, ("the judge sees car",))


def test_what_captions_name_is_found_in_them():
    for number, scene in enumerate(sample_scenes(0, 300)):
        for text in (canonical_prompt(scene), caption(scene, number)):
            wanted = wanted_by(text)
            assert set(wanted.sprites) == {actor.sprite for actor in scene.actors}, text
            assert wanted.place in (scene.place, ""), text
            assert wanted.camera in (scene.camera, ""), text
            if len(scene.actors) == 1:
                assert wanted.motions == (scene.actors[0].motion,), text
        assert wanted_by(canonical_prompt(scene)).place == scene.place


def test_words_of_another_world_ask_for_nothing():
    wanted = wanted_by("an old lighthouse keeper reads a letter, cinematic, 35 mm")
    assert (wanted.sprites, wanted.motions, wanted.place, wanted.camera) == ((), (), "", "")


@pytest.mark.parametrize("worse", [
    replace(GOOD, seed=1, faults=("flash",)),
    replace(GOOD, seed=1, right={"sprite": False}, shares=3.0),
    replace(GOOD, seed=1, warnings=("still",), shares=3.0),
    replace(GOOD, seed=1, shares=0.2),
    replace(GOOD, seed=6),
])
def test_the_best_has_fewest_faults_then_shows_most_then_warns_least(worse):
    for scores in ([GOOD, worse], [worse, GOOD]):
        choice = best_take(scores)
        assert choice["seed"] == 5
        assert choice["why"].startswith("the judge sees car; next was seed")
        assert [take["seed"] for take in choice["takes"]] == [each.seed for each in scores]
