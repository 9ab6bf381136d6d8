"""Rates and medians of the Toybox suites, with the doubt they carry."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from vidgen.evaluation.statistics import wilson_interval


@dataclass(frozen=True)
class Rate:
    """How many of how many."""

    correct: int
    total: int

    @classmethod
    def of(cls, outcomes: Iterable[bool]) -> Rate:
        """Count outcomes."""
        known = list(outcomes)
        return cls(sum(known), len(known))

    @property
    def rate(self) -> float:
        """The share that is correct; NaN of nothing."""
        return self.correct / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Its 95% interval."""
        return wilson_interval(self.correct, self.total)


def median_interval(
    values: Sequence[float], groups: Sequence[Hashable] | None = None
) -> tuple[float, float]:
    """95% interval of a median by order statistics, the quantiles 1 / 2 +- 1.96 / (2 sqrt(n)).

    Args:
        values: of which the median is taken.
        groups: of each, as in `mean_interval`; n is then how many there are.
    """
    ranked, count = sorted(values), len(values)
    half = 1.96 / (2 * math.sqrt(len(set(groups)) if groups else count))
    low, high = math.floor(count * (0.5 - half)), math.ceil(count * (0.5 + half))
    return ranked[max(0, low)], ranked[min(count - 1, high)]


def guess_rate(labels: Iterable[Hashable]) -> float:
    """The best score of an answer that is always the same: chance level, fair to uneven classes."""
    counts = Counter(labels)
    return max(counts.values()) / counts.total() if counts else math.nan
