"""What a codec leaves of the world's sound: when things begin, and how they sound."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from eval.toybox.metrics.sync import match_times
from train.toybox.mel import log_mel
from train.toybox.world.cues import SAMPLE_RATE
from vidgen.media.onsets import Times, find_onsets

WITHIN_S = 0.045  # the ITU's window for early sound, on both sides
_KNOWN_S = 0.01  # a cue counts if the original's onset is found so near
_SHARE = 0.2  # quieter onsets count than between sound and picture


@dataclass(frozen=True)
class SoundFidelity:
    """How near decoded sound is to the world's.

    Attributes:
        onset_median_s: median of |decoded onset - cue| over the cues that are found again.
        onset_p95_s: its 95th percentile.
        onset_recall: share of the cues with a plain onset in the original that are found again.
        mel: mean absolute difference of log mel magnitudes, natural logarithm.
        cues: how many cues have a plain onset in the original.
    """

    onset_median_s: float
    onset_p95_s: float
    onset_recall: float
    mel: float
    cues: int


def measure_fidelity(
    original: Tensor, decoded: Tensor, cues: Sequence[Sequence[float]]
) -> SoundFidelity:
    """Compare decoded sounds with the originals and with the truth.

    Args:
        original: [B, N] at the world's rate.
        decoded: [B, N].
        cues: of each sound the seconds at which something begins.
    """
    errors: list[float] = []
    known = 0
    before, after = (find_onsets(sound, SAMPLE_RATE, _SHARE) for sound in (original, decoded))
    for times, plain, heard in zip(cues, before, after, strict=True):
        told = np.array(sorted(set(times)))
        there = told[[i for i, _ in match_times(told, plain, _KNOWN_S, _KNOWN_S)]]
        pairs = match_times(there, heard, WITHIN_S, WITHIN_S)
        errors += [abs(float(heard[j] - there[i])) for i, j in pairs]
        known += len(there)
    mel = (log_mel(decoded, SAMPLE_RATE) - log_mel(original, SAMPLE_RATE)).abs().mean()
    return SoundFidelity(
        _quantile(np.array(errors), 0.5), _quantile(np.array(errors), 0.95),
        len(errors) / known if known else math.nan, float(mel), known,
    )


def _quantile(values: Times, share: float) -> float:
    return float(np.quantile(values, share)) if len(values) else math.nan
