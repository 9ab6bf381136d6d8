"""What clips that go wrong have in common."""

from dataclasses import replace

import pytest

from eval.toybox.suite.table import weak_spots_table
from eval.toybox.suite.weak_spots import weak_spots
from train.toybox.world.scenes import SEED_RANGES, SceneMix, sample_scenes

SCENES = sample_scenes(SEED_RANGES["dev"][0], 200, SceneMix(tint=0.3, two_actors=0.0))


def found(is_right, scenes=SCENES):
    rows = [{"right": {"sprite": is_right(i, scene), "place": True}}
            for i, scene in enumerate(scenes)]  # fmt: skip
    return weak_spots({"text": rows}, {"text": scenes})


def test_what_goes_wrong_more_often_is_named_with_what_it_costs():
    spot, = found(lambda i, scene: i % 3 == 0 if scene.actors[0].tint else i % 20 > 0)
    assert (spot["source"], spot["measure"], spot["trait"], spot["name"]) == (
        "text", "sprite", "tint", "tinted")  # fmt: skip
    tinted = [i for i, scene in enumerate(SCENES) if scene.actors[0].tint]
    assert spot["total"] == len(tinted)
    assert spot["value"] == pytest.approx(sum(i % 3 == 0 for i in tinted) / len(tinted))
    assert spot["others"] == pytest.approx(0.95, abs=0.03)
    assert spot["p"] < 0.01
    drawn = weak_spots_table({"weak_spots": [spot]})
    assert drawn.row_count == 1
    assert list(drawn.columns[2].cells) == ["tint: tinted"]


@pytest.mark.parametrize("share", [2, 5, 10])
def test_faults_that_fall_anywhere_are_no_weak_spot(share):
    assert found(lambda _, scene: scene.seed * 7919 % 101 % share > 0) == []
    assert weak_spots_table({"weak_spots": []}) is None


def test_clips_of_one_scene_count_as_one():
    few, wrong = SCENES[:12], SCENES[:2]
    assert found(lambda i, _: few[i % 12] not in wrong, few * 20) == [], "240 clips of 12 scenes"
    apart = [replace(scene, seed=i) for i, scene in enumerate(few * 20)]
    assert found(lambda i, _: i % 12 > 1, apart), "what each of 240 scenes would tell"


def test_what_is_always_right_or_never_has_no_weak_spot():
    assert found(lambda *_: True) == found(lambda *_: False) == []
