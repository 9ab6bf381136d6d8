"""Choose the best of several sounds that a model made for one picture.

Where a picture leaves the moment of an impact open, each draw of noise puts its sound elsewhere. A
model's onset detector predicts impacts from the picture alone; sounds are drawn until one matches.
Without impacts, or without a detector, the sound is kept whose onsets agree best with those of the
others (minimum Bayes risk, Kumar & Byrne 2004, eq. 2, with onsets' F-measure as the gain).

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
from vidgen.pipeline.best_of_n import best_of

if TYPE_CHECKING:
    from vidgen.diffusion.temporal_upsampling import LatentRate
    from vidgen.pipeline.loader import ModelLoader
    from vidgen.weights.folder import ModelFolder

TOGETHER_S = 0.06
"""Onsets of two sounds within this distance are the same."""
AT_ONCE = 4
"""Sounds that are drawn before they are compared with the picture."""

ONSET_DETECTOR: Literal["onset_detector"] = "onset_detector"
NEAR_S = 0.1
"""An impact and an onset within this distance match."""
FEWEST = 0.5
"""Impacts expected in a clip below which it counts as having none."""
_SURE = 0.3
"""Impacts expected near an onset from which it counts as one of them."""


class Lateness(NamedTuple):
    """Delay of sounds after the impacts that they match."""

    total_s: float = 0.0  # sum over matches
    met: float = 0.0  # number of matches

    @property
    def mean_s(self) -> float:
        """Mean delay, in seconds; 0 without matches."""
        return self.total_s / self.met if self.met else 0.0

    def and_of(self, other: Lateness) -> Lateness:
        """Return the sum of both."""
        return Lateness(self.total_s + other.total_s, self.met + other.met)


ON_TIME = Lateness()


@dataclass(frozen=True)
class Impacts:
    """Expected impacts in a picture."""

    times: NDArray[np.float64]  # moments in seconds, rising, [n]
    expected: NDArray[np.float64]  # impacts expected at each of them, [n]
    enough: float = 1.0  # fit of a sound that ends the search
    new_from_s: float = 0.0  # earlier sound is given, and has no lateness

    @property
    def any_seen(self) -> bool:
        """True if sounds can be compared with them."""
        return float(self.expected.sum()) >= FEWEST

    def later(self, seconds: float) -> Impacts:
        """Return the same impacts, moved."""
        return replace(self, times=self.times + seconds)

    def fit(self, onsets: Times) -> float:
        """Return the expected F-measure of a sound's onsets against them.

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
        """Return the delay of new onsets after them."""
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
    loader: ModelLoader, picture: Tensor, latent_rate: LatentRate, first: int, fps: Fraction
) -> Impacts | None:
    """Return the impacts that the model's onset detector expects in a picture [1, C, F, h, w].

    The picture begins with latent frame `first` of the clip, at its own `latent_rate`; `fps` is
    the clip's rate as it is shown. Times are seconds of the clip. None without a detector.
    """
    if ONSET_DETECTOR not in loader.folder.components:
        return None
    stride_t = loader.folder.components["vae"].config.strides.t
    with loader.use(ONSET_DETECTOR) as detector:
        expected = detector.expected(picture.to(loader.device))[0].double().cpu()  # [F, P]
    if latent_rate.alone:
        expected[0] = 0  # a single picture
    begins = 0 if latent_rate.alone else latent_rate.factor * (first - 1) + 1
    count, num_parts = expected.shape
    times = part_times(begins, count, num_parts, stride_t, float(fps * latent_rate.factor))
    enough = loader.folder.components[ONSET_DETECTOR].config.enough
    return Impacts(times.flatten().double().numpy(), expected.flatten().numpy(), enough)


class Kept(NamedTuple):
    """The best sound: latents [C, k], and its delay after the picture."""

    latents: Tensor
    lateness: Lateness = ON_TIME


def drawn_at_once(folder: ModelFolder, most: int) -> int:
    """Return the sounds drawn at once: all `most` without an onset detector."""
    return min(AT_ONCE, most) if ONSET_DETECTOR in folder.components else most


def best_sound(
    draw: Callable[[range], Tensor], hear: Callable[[Tensor], Tensor], rate: int, most: int,
    at_once: int, impacts: Impacts | None,
) -> Kept:
    """Draw sounds for a picture until one matches it; return the best.

    Args:
        draw: makes the sounds of a range of numbers, [N, C, k].
        hear: decodes them, [N, n].
        rate: samples per second.
        most: maximum number of sounds.
        at_once: see `drawn_at_once`.
        impacts: of the picture, in the sounds' own time; None without a detector.
    """
    if most == 1:
        return Kept(draw(range(1))[0])
    if impacts is None or not impacts.any_seen:
        made = draw(range(at_once))
        return Kept(made[most_agreed(hear(made), rate)])

    def scored(takes: range) -> list[tuple[float, tuple[Tensor, Times]]]:
        sounds = draw(takes)
        heard = find_onsets(hear(sounds).float().cpu(), rate)
        return [(impacts.fit(each), (sound, each))
                for sound, each in zip(sounds, heard, strict=True)]

    sound, onsets = best_of(scored, most, impacts.enough, at_once=at_once).made
    return Kept(sound, impacts.lateness(onsets))


def most_agreed(sounds: Tensor, rate: int) -> int:
    """Return the index of the sound [N, n] whose onsets agree best with the others'."""
    onsets = find_onsets(sounds.float().cpu(), rate)
    agreed = [sum(_agreement(one, other) for other in onsets) for one in onsets]
    return int(np.argmax(agreed))


def _agreement(times: Times, others: Times) -> float:
    """Return the F-measure of two sounds' onsets; two without any agree."""
    total = len(times) + len(others)
    return 2 * len(pair_times(times, others, TOGETHER_S, TOGETHER_S)) / total if total else 1.0
