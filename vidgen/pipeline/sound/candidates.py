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
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vidgen.media.onsets import Times, find_onsets, pair_times
from vidgen.models.onset_detector import part_times

if TYPE_CHECKING:
    from vidgen.diffusion.temporal_upsampling import LatentRate
    from vidgen.pipeline.loader import Parts
    from vidgen.weights.folder import ModelFolder

TOGETHER_S = 0.06
"""Onsets of two sounds so near to each other are the same."""
AT_ONCE = 4
"""Sounds that are drawn before it is looked whether one goes with the picture."""

ONSET_DETECTOR: Literal["onset_detector"] = "onset_detector"
NEAR_S = 0.1
"""An impact and a sound so near to each other go together."""
FEWEST = 0.5
"""Impacts expected in a clip below which none are taken to be seen."""
_SURE = 0.3
"""Impacts expected near an onset from which it is one of them."""


class Lateness(NamedTuple):
    """How long after what is seen its sounds begin.

    Attributes:
        total_s: the sum over those that belong together, in seconds.
        met: how many do.
    """

    total_s: float = 0.0
    met: float = 0.0

    @property
    def mean_s(self) -> float:
        """Of one of them; 0 where none do."""
        return self.total_s / self.met if self.met else 0.0

    def and_of(self, other: Lateness) -> Lateness:
        """Of both."""
        return Lateness(self.total_s + other.total_s, self.met + other.met)


ON_TIME = Lateness()


@dataclass(frozen=True)
class Impacts:
    """When something may be seen to meet the ground.

    Attributes:
        times: moments in seconds, rising, [n].
        expected: impacts that are expected at each of them, [n].
        enough: the fit of a sound from which on no other one is made.
        new_from_s: until when the sound was there before, so that it can't be early or late.
    """

    times: NDArray[np.float64]
    expected: NDArray[np.float64]
    enough: float = 1.0
    new_from_s: float = 0.0

    @property
    def any_seen(self) -> bool:
        """Whether a sound can be told by them."""
        return float(self.expected.sum()) >= FEWEST

    def later(self, seconds: float) -> Impacts:
        """The same so much later."""
        return replace(self, times=self.times + seconds)

    def fit(self, onsets: Times) -> float:
        """How well a sound with such onsets goes with them: the F-measure that is expected.

        An onset meets at most one impact, and each expected one counts for one onset.
        """
        left, met = self.expected.copy(), 0.0
        for onset in onsets:
            near = np.abs(self.times - onset) <= NEAR_S
            met += min(1.0, float(left[near].sum()))
            left[near] = 0
        total = float(self.expected.sum()) + len(onsets)
        return 2 * met / total if total else 1.0

    def lateness(self, onsets: Times) -> Lateness:
        """How long after them such onsets come, as far as they are new."""
        late = ON_TIME
        for onset in onsets[onsets >= self.new_from_s]:
            near = np.abs(self.times - onset) <= NEAR_S
            expected = float(self.expected[near].sum())
            if expected >= _SURE:
                seen = float(self.times[near] @ self.expected[near]) / expected
                met = min(1.0, expected)
                late = late.and_of(Lateness(met * (float(onset) - seen), met))
        return late


def impacts_seen(
    parts: Parts, picture: Tensor, latent_rate: LatentRate, first: int, fps: Fraction
) -> Impacts | None:
    """What the model's onset detector sees in a stretch of a clip; None where it has none.

    Args:
        parts: the networks.
        picture: latents [1, C, F, h, w].
        latent_rate: how they lie to the clip's.
        first: the clip's latent frame with which they begin.
        fps: of the clip as it is shown.

    Returns:
        In seconds of the clip.
    """
    if ONSET_DETECTOR not in parts.folder.components:
        return None
    stride_t = parts.folder.components["vae"].config.strides.t
    with parts.use(ONSET_DETECTOR) as detector:
        expected = detector.expected(picture.to(parts.device))[0].double().cpu()  # [F, P]
    if latent_rate.alone:
        expected[0] = 0  # a single picture
    begins = 0 if latent_rate.alone else latent_rate.factor * (first - 1) + 1
    count, num_parts = expected.shape
    times = part_times(begins, count, num_parts, stride_t, float(fps * latent_rate.factor))
    enough = parts.folder.components[ONSET_DETECTOR].config.enough
    return Impacts(times.flatten().double().numpy(), expected.flatten().numpy(), enough)


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
