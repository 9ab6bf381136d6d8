"""What a sound is made of, as the sound VAE's decoder says it: tones and noise, frame by frame.

Spectra of what a decoder plays hardly tell its oscillators where to go: one that is off by a little
is as wrong as one that is off by a lot. What they should play can be read off the sound instead
(analysis by instantaneous frequency, Flanagan & Golden 1966; sines plus noise, Serra 1989).

Axes: B batch, T frames, bins.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vidgen.models.audio_spectra import AudioVAEConfig, Controls

STEADY_FRAMES = 13
"""Frames, about 50 ms, over which a tone's phase goes on evenly and noise's doesn't."""
NOISY, STEADY = 0.90, 0.98  # evenness of what is all noise, and all tone
TONE = 1.5
"""A steady oscillator's magnitude over its spectrum's, of Hann windows at any overlap."""
FAINT = 1e-3  # magnitude that can't be heard; a full-scale sine has a quarter of the window's
_LOOK = 128  # samples over which levels are compared, to find attacks
_HUSHED = 3e-4  # level below which nothing is heard
#: Logs of levels that count as right, of the most that is mended, and its share.
_RIGHT, _MOST, _MENDED = 0.4, 2.0, 1.3
_MEAN = 0.79  # of noise's magnitudes, compressed and raised back, in root mean squares


def take_apart(config: AudioVAEConfig, magnitudes: Tensor, tones: Tensor) -> Controls:
    """What a decoder should say, [B, T, bins], to sound like `AudioVAE.spectra` of a sound.

    An oscillator plays the tone that is nearest to it, in so far as its phase goes on evenly; the
    rest is noise. The mean of what is said of noise, compressed, has its level.
    """
    advance = tones.angle()
    evenness = _mean_over_time(tones / (tones.abs() + 1e-9)).abs()
    share = ((evenness - NOISY) / (STEADY - NOISY)).clamp(0, 1)
    mine = advance.abs() <= config.reach
    level = math.sqrt(config.window / config.hop) / _MEAN
    return Controls(
        advance, TONE * magnitudes * share.sqrt() * mine, level * magnitudes * (1 - share)
    )


def attacks(config: AudioVAEConfig, sound: Tensor, played: Tensor) -> Tensor:
    """Logs of the gains that sharpen what windows blur, [B, T, gains]; see `Controls.attack`.

    Mostly 0: noise is chance, so levels that are nearly right stay.

    Args:
        config: with gains.
        sound: [B, N].
        played: its parts, played without gains, [B, T * hop].
    """
    step = config.hop // config.gains_per_frame
    padded = F.pad(sound, (0, played.shape[1] - sound.shape[1]))
    wanted, there = (
        F.avg_pool1d(x.square()[:, None], _LOOK, step, _LOOK // 2)[:, 0, 1:] + _HUSHED**2
        for x in (padded, played)
    )
    off = 0.5 * (wanted / there).log()
    gains: Tensor = _MENDED * F.softshrink(off, _RIGHT).clamp(-_MOST, _MOST)
    gains = gains.unflatten(1, (-1, config.gains_per_frame))
    return gains


def controls_distance(
    config: AudioVAEConfig, said: Controls, wanted: Controls
) -> tuple[Tensor, Tensor]:
    """How far controls are from those wanted, two scalars.

    Returns:
        (mean squared error of both magnitudes, compressed as the encoder's are, mean of 1 - cos of
        the error of the advance, weighted by the root of the tone that is wanted).
    """
    power = config.compression
    errors = [
        ((ours + FAINT) ** power - (theirs + FAINT) ** power).square().mean()
        for ours, theirs in ((said.tone, wanted.tone), (said.noise, wanted.noise))
    ]
    weight = wanted.tone.sqrt()
    apart = 1 - (said.advance - wanted.advance).cos()
    return torch.stack(errors).mean(), (weight * apart).sum() / weight.sum().clamp(min=1e-6)


def _mean_over_time(x: Tensor) -> Tensor:
    """Mean of complex [B, T, bins] over `STEADY_FRAMES` around each frame."""
    parts = torch.view_as_real(x).flatten(2).transpose(1, 2)
    mean = F.avg_pool1d(parts, STEADY_FRAMES, 1, STEADY_FRAMES // 2, count_include_pad=False)
    return torch.view_as_complex(mean.transpose(1, 2).unflatten(2, (-1, 2)).contiguous())
