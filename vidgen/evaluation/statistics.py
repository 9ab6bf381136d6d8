"""Confidence intervals of rates, means and differences."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from statistics import NormalDist, fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
"""Coverage of all intervals, two-sided."""
DRAWS = 2000
"""Number of resamples of a bootstrap."""
_Z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)


def wilson_interval(correct: float, total: float) -> tuple[float, float]:
    """Return the score interval of a proportion (Wilson 1927, p. 212; Brown et al. 2001, eq. 4).

    Unlike p +- z sqrt(p (1 - p) / n) it stays inside [0, 1] and has a width at p = 0 and 1. It is
    [0, 1] without trials. `total` may be an effective number of independent trials.
    """
    if total == 0:
        return 0.0, 1.0
    share, scale = correct / total, 1 + _Z * _Z / total
    centre = (share + _Z * _Z / (2 * total)) / scale
    half = _Z / scale
    half *= math.sqrt(share * (1 - share) / total + _Z * _Z / (4 * total * total))
    low = 0.0 if correct == 0 else centre - half
    high = 1.0 if correct == total else centre + half
    return low, high


def rate_interval(outcomes: Sequence[bool], groups: Sequence[Hashable]) -> tuple[float, float]:
    """Return Wilson's interval of a rate whose outcomes are correlated within groups.

    A group is, for instance, the clips of one prompt. The effective number of trials is
    p (1 - p) / s^2, at most the number of outcomes (Korn and Graubard 1998); if all outcomes agree,
    it is the number of groups. A single group counts as none.
    """
    total, known = len(outcomes), len(set(groups))
    share = sum(outcomes) / total
    worth = float(total)
    if 1 < known < total:
        error = _mean_error(outcomes, groups)
        agree = share in (0.0, 1.0)
        worth = known if agree else min(worth, share * (1 - share) / max(error**2, 1e-12))
    return wilson_interval(share * worth, worth)


def mean_interval(
    values: Sequence[float], *, groups: Sequence[Hashable] | None = None,
    weights: Sequence[float] | None = None,
) -> tuple[float, float]:
    """Return the interval mean +- z s / sqrt(n) of a mean, valid from dozens of values on.

    The variance is that of the sums of the G groups, such as the clips of one prompt (Liang and
    Zeger 1986, eq. 2.3, for a mean), times G / (G - 1). Without `groups` values are independent;
    without `weights` they count equally.
    """
    mean = fmean(values, weights)
    half = _Z * _mean_error(values, groups or range(len(values)), weights)
    return mean - half, mean + half


def _mean_error(
    values: Sequence[float], groups: Sequence[Hashable], weights: Sequence[float] | None = None
) -> float:
    """Return the standard error of a mean by the sums of its groups; infinite for a single one."""
    mean, sums = fmean(values, weights), dict[Hashable, float]()
    weights = weights or [1] * len(values)
    for value, group, weight in zip(values, groups, weights, strict=True):
        sums[group] = sums.get(group, 0.0) + weight * (value - mean)
    if len(sums) < 2:
        return math.inf
    squares = sum(s * s for s in sums.values()) * len(sums) / (len(sums) - 1)
    return math.sqrt(squares) / sum(weights)


def paired_interval(
    values: Sequence[float], others: Sequence[float], *,
    groups: Sequence[Hashable] | None = None,
    weights: tuple[Sequence[float], Sequence[float]] | None = None,
) -> tuple[float, float]:
    """Return the interval of mean(values) - mean(others) by a paired bootstrap (Efron 1979).

    Pairs, of the same prompts in the same order, are drawn together, so the difficulty of a prompt
    cancels out. Groups are drawn as a whole, so that many clips of one prompt don't count as many
    prompts. Without `groups` pairs are independent. `weights` are those of the values and of the
    others in the two means.
    """
    changes = np.subtract(values, others)
    names = {name: i for i, name in enumerate(dict.fromkeys(groups or range(len(changes))))}
    of = np.array([names[name] for name in groups or range(len(changes))])
    picks = np.random.default_rng(0).integers(len(names), size=(DRAWS, len(names)))

    def drawn(side: Sequence[float] | NDArray[Any], counts: Sequence[float] | None) -> NDArray[Any]:
        sums = np.bincount(of, side if counts is None else np.multiply(side, counts))
        return np.asarray(sums[picks].sum(1) / np.bincount(of, counts)[picks].sum(1))

    if weights is None:
        means = drawn(changes, None)
    else:
        means = drawn(values, weights[0]) - drawn(others, weights[1])
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
