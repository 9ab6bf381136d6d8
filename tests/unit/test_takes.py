"""Takes: which take comes first."""

from dataclasses import replace

import pytest

from vidgen.pipeline.best_of_n import Verified
from vidgen.story.store import TakeScore, best_take

SEEN = Verified("car", 0.95, is_enough=True)
MISSED = Verified("car", 0.2, is_enough=False)
GOOD = TakeScore(5, "a.mp4", (), (), (SEEN,), ("the verifier sees car (0.95)",))


@pytest.mark.parametrize("worse", [
    replace(GOOD, seed=1, faults=("flash",)),
    replace(GOOD, seed=1, verified=(MISSED,)),
    replace(GOOD, seed=1, verified=(SEEN, replace(MISSED, score=1.0))),
    replace(GOOD, seed=1, warnings=("still",), verified=(replace(SEEN, score=1.0),)),
    replace(GOOD, seed=1, verified=(replace(SEEN, score=0.91),)),
    replace(GOOD, seed=6),
])
def test_the_best_has_fewest_faults_then_shows_most_then_warns_least(worse):
    for scores in ([GOOD, worse], [worse, GOOD]):
        choice = best_take(scores)
        assert choice["seed"] == 5
        assert choice["why"].startswith("the verifier sees car (0.95); next was seed")
        assert [take["seed"] for take in choice["takes"]] == [each.seed for each in scores]


def test_without_a_verifier_the_first_take_stands_among_equals():
    bare = replace(GOOD, verified=(), reasons=("the checks found nothing",))
    assert best_take([replace(bare, seed=6), bare])["seed"] == 5
    assert best_take([replace(bare, warnings=("still",)), replace(bare, seed=6)])["seed"] == 6
