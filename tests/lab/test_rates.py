"""Rates and medians against recomputed values."""

import math

from eval.toybox.rates import Rate, guess_rate, median_interval


def test_a_rate_counts():
    rate = Rate.of([True, False, True, True])
    assert (rate.correct, rate.total, rate.rate) == (3, 4, 0.75)
    assert math.isnan(Rate(0, 0).rate)


def test_the_best_guess_is_the_commonest_label():
    assert guess_rate(["still", "pan", "still", "zoom"]) == 0.5
    assert math.isnan(guess_rate([]))


def test_a_median_of_groups_has_the_interval_of_their_number():
    values = [float(v) for v in range(100)]
    low, high = median_interval(values)
    assert (low, high) == (40.0, 60.0)
    wide = median_interval(values, [v // 4 for v in range(100)])
    assert wide == (30.0, 70.0)
    assert median_interval([3.0]) == (3.0, 3.0)
