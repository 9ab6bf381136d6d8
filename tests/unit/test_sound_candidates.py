"""Which of several sounds is kept."""

from __future__ import annotations

import numpy as np
import torch

from vidgen.pipeline.sound.own_sound import most_agreed

RATE = 16_000


def clicks(*times: float, seconds: float = 2.0) -> torch.Tensor:
    """Decaying tones that begin at some times, [n]."""
    sound, moments = torch.zeros(round(seconds * RATE)), torch.arange(round(seconds * RATE)) / RATE
    for at in times:
        since = moments - at
        fading = 0.4 * (since >= 0) * torch.exp(-since.clamp(min=0) / 0.05)
        sound += fading * torch.sin(5000 * since)
    return sound


def test_the_one_is_kept_that_most_others_sound_like() -> None:
    alike = [clicks(0.5, 1.3), clicks(0.52, 1.28), clicks(0.49, 1.31)]
    others = [clicks(0.2, 0.9), clicks(1.0), clicks(0.5, 0.8, 1.1, 1.6)]
    for order in np.random.default_rng(0).permuted(np.tile(np.arange(6), (8, 1)), axis=1):
        sounds = torch.stack([[*others, *alike][index] for index in order])
        assert order[most_agreed(sounds, RATE)] >= 3


def test_where_all_agree_or_nothing_is_heard_the_first_is_kept() -> None:
    assert most_agreed(clicks(0.5)[None], RATE) == 0
    assert most_agreed(clicks(0.5).expand(3, -1), RATE) == 0
    assert most_agreed(torch.zeros(3, RATE), RATE) == 0
    assert most_agreed(torch.stack([clicks(0.5), *torch.zeros(2, 2 * RATE)]), RATE) == 1
