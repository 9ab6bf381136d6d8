"""Which of several sounds for one picture is kept: the one that goes best with what is seen.

Where a picture leaves open when something is hit, one draw of noise hears it now and another then,
or not at all. A model's onset detector looks at nothing else, so it tells them apart. Where nothing
is hit, and in models without one, the sound is kept that the others bear out best: what begins
where most others do errs least (minimum Bayes risk, Kumar & Byrne 2004, eq. 2, with onsets'
F-measure as the gain).

Axes: N candidates, n samples.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from vidgen.media.onsets import Times, find_onsets, pair_times
from vidgen.pipeline.sound.impacts import Impacts

TOGETHER_S = 0.06
"""Onsets of two sounds so near to each other are the same."""


def best_heard(sounds: Tensor, rate: int, impacts: Impacts) -> int:
    """The index of the sound [N, n] that is kept, of equals the first.

    Args:
        sounds: of one picture.
        rate: samples a second.
        impacts: what is seen to be hit, in the sounds' own time.
    """
    if len(sounds) == 1:
        return 0
    if not impacts.any_seen:
        return most_agreed(sounds, rate)
    onsets = find_onsets(sounds.float().cpu(), rate)
    return int(np.argmax([impacts.fit(times) for times in onsets]))


def most_agreed(sounds: Tensor, rate: int) -> int:
    """The index of the sound [N, n] whose onsets agree with the others' best, of equals the first.

    Args:
        sounds: of one picture.
        rate: samples a second.
    """
    onsets = find_onsets(sounds.float().cpu(), rate)
    agreed = [sum(_agreement(one, other) for other in onsets) for one in onsets]
    return int(np.argmax(agreed))


def _agreement(times: Times, others: Times) -> float:
    """The F-measure of two sounds' onsets; those that have none are alike."""
    total = len(times) + len(others)
    return 2 * len(pair_times(times, others, TOGETHER_S, TOGETHER_S)) / total if total else 1.0
