"""Which of several sounds for one picture is kept: the one that goes best with what is seen.

Where a picture leaves open when something is hit, one draw of noise hears it now and another then,
or not at all. A model's onset detector looks at nothing else: sounds are drawn until one goes with
what it sees. Where nothing is hit the first few do, and in models without a detector all that may
be; of these the one is kept that the others bear out best, as what begins where most others do errs
least (minimum Bayes risk, Kumar & Byrne 2004, eq. 2, with onsets' F-measure as the gain).

Axes: N candidates, C latent channels, k sound latents, n samples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from torch import Tensor

from vidgen.media.onsets import Times, find_onsets, pair_times
from vidgen.pipeline.sound.impacts import ON_TIME, ONSET_DETECTOR, Impacts, Lateness

if TYPE_CHECKING:
    from vidgen.weights.folder import ModelFolder

TOGETHER_S = 0.06
"""Onsets of two sounds so near to each other are the same."""
AT_ONCE = 4
"""Sounds that are drawn before it is looked whether one goes with the picture."""


class Kept(NamedTuple):
    """The best sound: latents [C, k], and how long after what is seen it is heard."""

    latents: Tensor
    lateness: Lateness = ON_TIME


def drawn_at_once(folder: ModelFolder, most: int) -> int:
    """How many of so many sounds are drawn at once: all where nobody looks at the picture."""
    return min(AT_ONCE, most) if ONSET_DETECTOR in folder.components else most


def best_heard(
    draw: Callable[[range], Tensor], hear: Callable[[Tensor], Tensor], rate: int, most: int,
    at_once: int, impacts: Impacts | None,
) -> Kept:
    """Draw sounds for a picture until one goes with it, and keep the best.

    Args:
        draw: makes those of some numbers, [N, C, k].
        hear: decodes them, [N, n].
        rate: samples a second.
        most: sounds that are drawn at most.
        at_once: of them, as `drawn_at_once` tells.
        impacts: what is seen to be hit, in the sounds' own time; None: nobody looks.
    """
    if most == 1:
        return Kept(draw(range(1))[0])
    if impacts is None or not impacts.any_seen:
        made = draw(range(at_once))
        return Kept(made[most_agreed(hear(made), rate)])
    fits, sounds, heard = list[float](), list[Tensor](), list[Times]()
    for first in range(0, most, at_once):
        sounds += (made := draw(range(first, min(first + at_once, most))))
        heard += (onsets := find_onsets(hear(made).float().cpu(), rate))
        fits += map(impacts.fit, onsets)
        if max(fits) >= impacts.enough:
            break
    best = fits.index(max(fits))
    return Kept(sounds[best], impacts.lateness(heard[best]))


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
