"""Mel spectra: what of a sound's spectrum the ear tells apart.

Axes: B clips, N samples, F frequencies of the transform, M mel bands, T frames.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def log_mel(
    sound: Tensor, rate: int, *, window: int = 1024, hop: int = 256, bands: int = 80,
    floor: float = 1e-4,
) -> Tensor:
    """Natural logarithm of mel magnitudes, [B, M, T] with T = 1 + N // hop.

    Args:
        sound: [B, N] in [-1, 1]; a full-scale sine has a magnitude of about 1.
        rate: samples a second.
        window: samples of a frame; a Hann window, centred on the frame's time.
        hop: samples from a frame to the next.
        bands: M.
        floor: added to magnitudes.
    """
    magnitudes = spectrogram(sound, window, hop)
    bank = mel_bank(bands, window, rate).to(sound.device)
    return (bank @ magnitudes + floor).log()


def spectrogram(sound: Tensor, window: int, hop: int) -> Tensor:
    """Magnitudes of short spectra, [B, F, T]; a full-scale sine has about 1."""
    taper = torch.hann_window(window, device=sound.device)
    spectra = torch.stft(
        sound.float(), window, hop, window=taper, pad_mode="constant", return_complex=True
    )
    return spectra.abs() * (2 / float(taper.sum()))


@lru_cache(maxsize=16)
def mel_bank(bands: int, window: int, rate: int) -> Tensor:
    """Triangles evenly spaced on the mel scale (O'Shaughnessy 1987, p. 150), [M, F].

    Each sums to 1, and spans two bins at least, so that none is empty at low frequencies.
    """
    top = 2595 * torch.log10(torch.tensor(1 + rate / 2 / 700))
    points = 700 * (10 ** (torch.linspace(0, float(top), bands + 2) / 2595) - 1)
    bins = torch.linspace(0, rate / 2, window // 2 + 1)
    step = rate / window
    rise = (points[1:-1] - points[:-2]).clamp(min=step)[:, None]
    fall = (points[2:] - points[1:-1]).clamp(min=step)[:, None]
    off = bins - points[1:-1, None]
    bank = torch.minimum(1 + off / rise, 1 - off / fall).clamp(min=0)
    return bank / bank.sum(1, keepdim=True)
