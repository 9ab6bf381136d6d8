"""Two models' clips compared: who is steadier, and when that can't be told."""

import numpy as np
import pytest

from vidgen.evaluation.statistics import wilson_interval
from vidgen.evaluation.temporal.comparison import compare, figures
from vidgen.evaluation.temporal.report import pairs_text


def rows(values, dynamic=True, seeds=1, **more):
    return {f"clip {i}": {"name": f"clip {i}", "prompt": f"prompt {i // seeds}", "num_frames": 9,
                          "figures": {"steadiness": v if dynamic else 0.0, "warp_error": 10 - v},
                          "dynamic": dynamic, "features": [], **more}
            for i, v in enumerate(values)}  # fmt: skip


def test_a_clear_difference_has_a_winner_and_noise_has_none():
    base = np.linspace(0.5, 0.9, 12)
    noise = np.random.default_rng(0).normal(0, 0.05, 12)
    clear = compare("a", rows(base + 0.1), "b", rows(base))
    assert clear["verdict"] == "a is steadier"
    assert clear["measures"]["warp_error"]["verdict"] == "a is better"
    assert clear["measures"]["steadiness"]["difference"] == pytest.approx(0.1)
    unclear = compare("a", rows(base + noise - noise.mean()), "b", rows(base))
    assert unclear["verdict"] == "no significant difference"
    few = compare("a", rows(base[:3] + 0.1), "b", rows(base[:3]))
    assert few["verdict"] == "too few pairs (3 of 6)"


def test_clips_of_a_prompt_dont_count_as_many_prompts():
    base, luck = np.linspace(0.5, 0.9, 40), np.random.default_rng(3).normal(0.02, 0.06, 8)
    better = base + np.repeat(luck, 5)  # five seeds each, all as good or bad as their prompt
    alone, together = (
        compare("a", rows(better, seeds=n), "b", rows(base, seeds=n))["measures"]["steadiness"]
        for n in (1, 5)
    )
    assert (alone["pairs"], alone["prompts"]) == (40, 40)
    assert (together["pairs"], together["prompts"]) == (40, 8)
    assert together["difference"] == alone["difference"]
    assert together["high"] - together["low"] > 1.8 * (alone["high"] - alone["low"])
    few = compare("a", rows(base + 1, seeds=10), "b", rows(base, seeds=10))
    assert few["verdict"] == "too few prompts (4 of 6)"
    one = compare("a", rows(base + 1, seeds=40), "b", rows(base, seeds=40))
    assert one["verdict"] == "a is steadier", "of a single prompt clips are what is drawn"


def test_still_clips_cannot_win():
    moving, still = rows(np.linspace(0.5, 0.6, 10)), rows(np.ones(10), dynamic=False)
    found = compare("still", still, "moving", moving)
    assert found["verdict"].startswith("moving is steadier")
    assert "10 of 10 pairs" in found["verdict"]
    assert "warp_error" not in found["measures"], "only pairs that move both count"


def test_a_value_and_a_difference_lie_in_their_intervals_whatever_clips_weigh():
    name, moves = "proxy_subject_consistency", "proxy_dynamic_degree"
    sides = [
        [{"name": f"clip {i}", "prompt": f"prompt {i}", "dynamic": True,
          "features": [], "num_frames": 2 + i**3 * scale, "figures": {
              name: 1 - (7 - i) * spread, moves: float(i > 0),
              "warp_error": 0.1 if i else 9.0}} for i in range(8)]
        for scale, spread in ((2, 0.02), (5, 0.03))
    ]  # fmt: skip
    shown = [figures(side)["figures"] for side in sides]
    for found in shown:
        for figure in found.values():
            assert figure["low"] <= figure["value"] <= figure["high"]
        assert found[name]["high"] <= 1
        assert found["warp_error"]["low"] == 0
        moving = found[moves]
        assert (moving["low"], moving["high"]) == pytest.approx(wilson_interval(7, 8))
    one, other = ({clip["name"]: clip for clip in side} for side in sides)
    compared = compare("a", one, "b", other)["measures"][name]
    values = [found[name]["value"] for found in shown]
    assert compared["difference"] == pytest.approx(values[0] - values[1])
    assert compared["low"] <= compared["difference"] <= compared["high"]


def test_pairs_of_two_sizes_are_reported():
    base = np.linspace(0.5, 0.9, 8)
    found = compare("a", rows(base, size=[64, 64]), "b", rows(base, size=[32, 32]))
    assert found["unlike"] == 8
    assert "8 of 8 pairs differ in size or frame rate" in found["verdict"]


def test_clips_without_a_pair_are_counted():
    base = np.linspace(0.5, 0.9, 8)
    found = compare("a", rows(base), "b", rows(base[:6]))
    assert (found["pairs"], found["unpaired"]) == (6, [2, 0])
    assert pairs_text(found).endswith("; without a pair: 2 of a")
    apart = {f"other {name}": row for name, row in rows(base).items()}
    assert compare("a", rows(base), "b", apart)["verdict"].startswith("no pair of clips")
