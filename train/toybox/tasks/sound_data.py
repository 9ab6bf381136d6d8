"""What sound networks learn from: the world's sound, made as it goes, whole, cut or damaged.

Axes: B clips, N samples, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.toybox.sound_judge import SoundJudgeConfig
from train.toybox.world.ambience import ambience_of
from train.toybox.world.scenes import Scene


@dataclass
class SoundBatch:
    """Sounds and what they hold.

    Attributes:
        sound: [B, N] in [-1, 1].
        voices: [B, K + 1], shares that sum to 1; the last class is "nothing".
        ambiences: [B] int64; one past the last class is "nothing".
    """

    sound: Tensor
    voices: Tensor
    ambiences: Tensor


def label_sounds(
    scenes: Sequence[Scene], sound: Tensor, judge: SoundJudgeConfig
) -> SoundBatch:
    """Put a batch's labels beside its sounds."""
    voices = torch.zeros(len(scenes), len(judge.voices) + 1)
    for row, scene in enumerate(scenes):
        for actor in scene.actors:
            voices[row, judge.voices.index(actor.sprite)] = 1
        voices[row, -1] = not scene.actors
    names = [judge.ambiences.index(ambience_of(scene.place)) for scene in scenes]
    return SoundBatch(sound, voices / voices.sum(1, keepdim=True), torch.tensor(names))


def hollow_out(
    batch: SoundBatch, rows: Sequence[int], judge: SoundJudgeConfig, generator: torch.Generator
) -> None:
    """Leave nothing that could be recognised in some rows: noise, tones, or what was there, mashed.

    Mashed sound keeps its spectrum in the mean, but in neither order nor pitch.
    """
    for row in rows:
        sound, luck = batch.sound[row], torch.rand(4, generator=generator).tolist()
        count = len(sound)
        noise = torch.randn(count, generator=generator)
        if luck[0] < 0.2:
            made = noise * 10 ** (-5 + 3 * luck[1])
        elif luck[0] < 0.5:
            spectrum = torch.fft.rfft(noise)
            frequencies = torch.linspace(0.005, 1, len(spectrum))
            made = torch.fft.irfft(spectrum * frequencies ** (-1.8 * luck[1]), count)
            made = made / made.std() * 0.25 * luck[2]
        elif luck[0] < 0.75:
            beat = 1 + luck[3] * torch.sin(torch.arange(count) * 0.004 * luck[2])
            made = 0.3 * luck[2] * torch.sin(torch.arange(count) * (0.01 + 1.8 * luck[1])) * beat
            made = made + noise * 0.02 * luck[3]
        else:
            spectrum = torch.fft.rfft(sound)
            turn = torch.rand(len(spectrum), generator=generator) * 6.2832
            moved = spectrum.abs().roll(int((0.02 + 0.3 * luck[1]) * len(spectrum)))
            made = torch.fft.irfft(torch.polar(moved, turn), count)
        batch.sound[row] = made.clamp(-1, 1)
        batch.voices[row] = 0
        batch.voices[row, -1] = 1
        batch.ambiences[row] = len(judge.ambiences)


def damage_sound(sound: Tensor, generator: torch.Generator) -> Tensor:
    """Damage sounds [B, N] alike, as codecs and generators do: always a new tensor.

    Gain, a tilted or cut spectrum, magnitudes that waver from frame to frame, and hiss.
    """
    luck: list[float] = torch.rand(8, generator=generator).tolist()
    made = sound * 10 ** ((luck[0] - 0.6) * 0.6)
    if luck[1] < 0.5:
        spectrum = torch.fft.rfft(made)
        frequencies = torch.linspace(0, 1, spectrum.shape[1])
        tilt = (0.1 + frequencies) ** (luck[2] - 0.5)
        cut = torch.sigmoid((0.35 + 0.65 * luck[3] - frequencies) * 60)
        made = torch.fft.irfft(spectrum * tilt * cut, made.shape[1])
    if luck[4] < 0.4:
        made = waver(made, 0.8 * luck[5], generator)
    if luck[6] < 0.4:
        noise = torch.randn(made.shape, generator=generator)
        made = made + noise * 10 ** (-4 + 2.2 * luck[7])
    return made.clamp(-1, 1)


def waver(sound: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Let the magnitudes of short spectra waver by e^(+-strength), smoothly over neighbours."""
    window = torch.hann_window(512)
    spectra = torch.stft(sound, 512, 128, window=window, return_complex=True)
    size = (sound.shape[0], 1, 24, max(2, spectra.shape[2] // 4))
    rough = torch.randn(size, generator=generator)
    gains = F.interpolate(rough, spectra.shape[1:], mode="bilinear")[:, 0]
    return torch.istft(
        spectra * (strength * gains).exp(), 512, 128, window=window, length=sound.shape[1]
    )
