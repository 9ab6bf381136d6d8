"""Which of several sounds for one picture is kept: the one that the others bear out best.

Where a picture leaves open when something is hit, one draw of noise hears it now and another then,
or not at all. A sound that begins where most others do errs least (minimum Bayes risk, Kumar &
Byrne 2004, eq. 2, with onsets' F-measure as the gain).

Axes: N candidates, n samples.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from vidgen.media.onsets import Times, find_onsets, pair_times

TOGETHER_S = 0.06
"""Onsets of two sounds so near to each other are the same."""


def most_agreed(sounds: Tensor, rate: int) -> int:
    """The index of the sound [N, n] whose onsets agree with the others' best, of equals the first.

    Args:
        sounds: of one picture.
        rate: samples a second.
    """
    if len(sounds) == 1:
        return 0
    onsets = find_onsets(sounds.float().cpu(), rate)
    agreed = [sum(_agreement(one, other) for other in onsets) for one in onsets]
    return int(np.argmax(agreed))


def _agreement(times: Times, others: Times) -> float:
    """The F-measure of two sounds' onsets; those that have none are alike."""
    total = len(times) + len(others)
    return 2 * len(pair_times(times, others, TOGETHER_S, TOGETHER_S)) / total if total else 1.0
