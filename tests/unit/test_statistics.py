"""Intervals against published and recomputed values."""

import math

import numpy as np
import pytest

from vidgen.evaluation.statistics import (
    mean_interval,
    paired_interval,
    rate_interval,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, Table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_equals_newcombes_table(correct, total, low, high):
    assert wilson_interval(correct, total) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_solves_its_equation():
    z = 1.959963984540054
    for bound in wilson_interval(37, 50):
        assert abs(37 / 50 - bound) == pytest.approx(z * math.sqrt(bound * (1 - bound) / 50))


def test_wilson_interval_is_symmetric_and_covers_all_of_nothing():
    low, high = wilson_interval(3, 17)
    assert wilson_interval(14, 17) == pytest.approx((1 - high, 1 - low))
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(9, 9)[1] == 1.0


def test_mean_interval_of_a_known_sample():
    low, high = mean_interval([1.0, 2.0, 3.0, 4.0])
    half = 1.959963984540054 * math.sqrt(5 / 3) / 2
    assert (low, high) == pytest.approx((2.5 - half, 2.5 + half))
    assert mean_interval([1.0]) == (-math.inf, math.inf)


def test_what_is_of_one_group_counts_once():
    values = [1.0, 2.0, 3.0, 4.0]
    thrice = [v for v in values for _ in range(3)]
    groups = [i for i in range(4) for _ in range(3)]
    assert mean_interval(thrice, groups=groups) == pytest.approx(mean_interval(values))
    assert mean_interval(thrice, groups=[0] * 12) == (-math.inf, math.inf)
    zeros = [0.0] * 12
    assert paired_interval(thrice, zeros, groups=groups) == paired_interval(values, zeros[:4])
    uneven = mean_interval([1.0, 1.0, 5.0], groups=["a", "a", "b"])
    assert uneven[1] - uneven[0] == pytest.approx(2 * 1.959963984540054 * 16 / 9)


def test_a_rate_of_groups_is_worth_as_many_as_it_varies_by():
    outcomes = [True, True, False, True, False, True]
    alone = rate_interval(outcomes, range(6))
    assert alone == wilson_interval(4, 6)
    thrice, prompts = [o for o in outcomes for _ in range(3)], [i for i in range(6) for _ in "abc"]
    low, high = rate_interval(thrice, prompts)  # clips of a prompt all alike: 6 * 5 / 6 are drawn
    assert (low, high) == pytest.approx(wilson_interval(10 / 3, 5))
    assert rate_interval([True] * 18, prompts) == wilson_interval(6, 6)
    apart = rate_interval([True, False] * 6, [i for i in range(6) for _ in "ab"])
    assert apart == pytest.approx(wilson_interval(6, 12)), "no more than there are"
    assert rate_interval(outcomes, [0] * 6) == wilson_interval(4, 6), "of one prompt clips count"


def test_a_weighted_mean_has_the_interval_of_its_weights():
    values, weights = [1.0, 2.0, 4.0], [1, 1, 2]
    mean = 11 / 4
    error = math.sqrt(sum((w * (v - mean)) ** 2 for v, w in zip(values, weights, strict=True))
                      * 3 / 2) / 4
    low, high = mean_interval(values, weights=weights)
    assert ((low + high) / 2, (high - low) / 2 / 1.959964) == pytest.approx((mean, error))
    assert mean_interval(values, weights=[3, 3, 3]) == pytest.approx(mean_interval(values))
    ones, others = [1.0, 2.0, 3.0] * 4, [0.0, 1.0, 1.0] * 4
    plain = paired_interval(ones, others)
    assert paired_interval(ones, others, weights=([2] * 12, [5] * 12)) == pytest.approx(plain)


def test_a_paired_interval_knows_what_pairs_have_in_common():
    rng = np.random.default_rng(1)
    hardness = rng.normal(0, 10, 400)
    mine, theirs = hardness + rng.normal(1, 0.5, 400), hardness + rng.normal(0, 0.5, 400)
    low, high = paired_interval(mine, theirs)
    expected = mean_interval(list(mine - theirs))
    assert (low, high) == pytest.approx(expected, abs=0.01)
    assert 0.8 < low < 1 < high < 1.2
    assert paired_interval(mine, mine) == (0, 0)
