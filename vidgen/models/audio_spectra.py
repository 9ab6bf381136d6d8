"""Convert sound to the spectra of the audio VAE's encoder, and its decoder's output to sound.

Phases are relative: the encoder reads the advance of each frequency's phase since the last frame,
the decoder predicts it and sums, so a steady tone is a constant. All that is no tone is noise
(harmonics plus noise, Engel et al. 2020, sec. 3), from a fixed table, so decoding is a function.

Axes: B batch, N samples (mono), T frames.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from vidgen.ops.conv import StreamCache
from vidgen.ops.latents import check_positive, check_statistics

NOISE_FRAMES = 4096
"""Frames, 16 s, after which the noise repeats."""
_FRAMES, _PHASES, _GAINS = "frames", "phases", "gains"  # in a stream's cache
_ONSET = 0.1  # share of the full overlap that the first samples are divided by at least


@dataclass(frozen=True)
class AudioVAEConfig:
    """Architecture of an `AudioVAE`.

    Args:
        latent_channels: C.
        encoder_layers: blocks at the frames' rate, then at the latents'.
        decoder_layers: blocks at the latents' rate, then at the frames'.
        expansion: hidden width of a block, in widths.
        kernel_size: frames that a block's convolution sees.
        sample_rate: samples a second.
        hop: samples from a frame to the next.
        window: samples of a frame, three whole hops at least.
        pitch_window: samples, whole windows, that end with a frame and over which the encoder
            follows phases: within a window, tones near each other beat and have no pitch. 0: the
            window.
        frames_per_token: frames in a latent.
        gains_per_frame: the decoder's gains of each frame for tones, and as many for noise; attacks
            are then as sharp as `hop / gains_per_frame` samples, which windows would blur. 0: none.
        compression: power that the encoder raises magnitudes to.
        latents_mean: [C], subtracted from latents to normalise them; None: zeros.
        latents_std: [C], by which they are then divided; None: ones.

    Raises:
        ValueError: values that no network can have.
    """

    latent_channels: int
    encoder_dim: int
    decoder_dim: int
    encoder_layers: tuple[int, int] = (3, 1)
    decoder_layers: tuple[int, int] = (1, 4)
    expansion: int = 2
    kernel_size: int = 7
    sample_rate: int = 16_000
    hop: int = 64
    window: int = 256
    pitch_window: int = 0
    frames_per_token: int = 8
    gains_per_frame: int = 0
    compression: float = 0.3
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check_positive(self, "latent_channels", "encoder_dim", "decoder_dim", "expansion",
                       "kernel_size", "sample_rate", "hop", "frames_per_token")
        if self.window % self.hop or self.window < 3 * self.hop or self.window % 2:
            raise ValueError(
                f"window {self.window} must be even and at least three whole hops of {self.hop}, "
                "or frames don't add up evenly"
            )
        object.__setattr__(self, "pitch_window", self.pitch_window or self.window)
        if self.pitch_window < self.window or self.pitch_window % self.window:
            raise ValueError(
                f"pitch_window {self.pitch_window} must be one or more whole windows of "
                f"{self.window}, so that both have the same frequencies"
            )
        if self.gains_per_frame < 0 or (self.gains_per_frame and self.hop % self.gains_per_frame):
            raise ValueError(
                f"gains_per_frame {self.gains_per_frame} must be 0 or divide the hop of {self.hop}"
            )
        check_statistics(self)

    @property
    def samples_per_token(self) -> int:
        """Samples in a latent."""
        return self.hop * self.frames_per_token

    @property
    def tokens_per_s(self) -> float:
        """Latents a second."""
        return self.sample_rate / self.samples_per_token

    @property
    def lookahead(self) -> int:
        """Samples after its own that a latent depends on."""
        return self.window - self.hop

    @property
    def history(self) -> int:
        """Samples before a sound's first that its spectra depend on."""
        return self.hop + self.pitch_window - self.window

    @property
    def reach(self) -> float:
        """Largest advance of an oscillator, in radians a frame: a little over half-way to the next.

        With more, several would follow one tone and beat with each other.
        """
        return 1.1 * math.pi * self.hop / self.window

    @property
    def num_bins(self) -> int:
        """Frequencies of a frame's spectrum."""
        return self.window // 2 + 1

    def num_tokens(self, num_samples: int) -> int:
        """Return the number of latents that cover `num_samples`."""
        return -(-num_samples // self.samples_per_token)


class Controls(NamedTuple):
    """The decoder's output for each frame.

    Attributes:
        advance: [B, T, bins], of a frequency's phase over its bin's own since the last frame, in
            radians.
        tone: [B, T, bins], magnitude of the oscillator.
        noise: [B, T, bins], standard deviation of the noise.
        attack: [B, T, 2, gains], logs of the gains of tones and noise at the end of each of a
            frame's equal parts, linear between them; or None.
    """

    advance: Tensor
    tone: Tensor
    noise: Tensor
    attack: Tensor | None = None


def to_spectra(config: AudioVAEConfig, sound: Tensor) -> tuple[Tensor, Tensor]:
    """Return the spectra of sound [B, history + T * hop + lookahead], history first.

    Returns:
        Magnitudes [B, T, bins], and tones: complex numbers [B, T, bins] of the magnitude over
        `pitch_window` and the phase's advance since the last frame, less the bin's own.
    """
    sound = sound.float()
    magnitudes = _spectra(config, sound[:, config.history :], config.window).abs()
    longer = _spectra(config, sound, config.pitch_window)
    own = math.tau * config.hop / config.window * torch.arange(config.num_bins)
    turn = torch.polar(torch.ones(config.num_bins), -own).to(sound.device)
    moved = longer[:, 1:] * longer[:, :-1].conj() * turn
    size = longer[:, 1:].abs() * (config.window / config.pitch_window)
    return magnitudes, moved * (size / (moved.abs() + 1e-9))


def _spectra(config: AudioVAEConfig, sound: Tensor, length: int) -> Tensor:
    """Return spectra [B, T, bins] of frames of `length`, whole windows, at the window's bins.

    A frame folded to a window's length has the same spectrum at these bins.
    """
    frames = sound.unfold(1, length, config.hop) * torch.hann_window(length, device=sound.device)
    return torch.fft.rfft(frames.unflatten(2, (-1, config.window)).sum(2))


def to_sound(
    config: AudioVAEConfig, controls: Controls, cache: StreamCache | None = None,
    first_noise: int = 0,
) -> Tensor:
    """Render a decoder's frames to sound [B, T * hop].

    The position of a stream's cache sets the first frame of the noise; without one `first_noise`
    does, which training varies.
    """
    bins, count = config.num_bins, controls.tone.shape[1]
    own = math.tau * config.hop / config.window * torch.arange(bins)
    steps = controls.advance.double() + own.to(controls.advance.device)
    phases = steps.cumsum(1)
    if cache is not None:
        first_noise = cache.position * config.frames_per_token
        phases = phases + cache.tensors.get(_PHASES, 0.0)
        cache.tensors[_PHASES] = phases[:, -1:].remainder(math.tau)
    turned = torch.polar(controls.tone, phases.remainder(math.tau).float())
    at = (first_noise + torch.arange(count)) % NOISE_FRAMES
    noise = _noise_frames(bins)[at].to(turned.device)
    if controls.attack is None:
        return _play(config, turned + controls.noise * noise, cache)
    parts = torch.stack([turned, controls.noise * noise], 1)
    played = _play(config, parts.flatten(0, 1), cache).unflatten(0, (-1, 2))
    return (played * _gains(config, controls.attack, cache)).sum(1)


def _play(config: AudioVAEConfig, spectra: Tensor, cache: StreamCache | None) -> Tensor:
    """Return the sound [B, T * hop] of the spectra of frames [B, T, bins]."""
    frames = torch.fft.irfft(spectra, config.window)
    return overlap_add(config, frames * _window(config, frames.device), cache)


def _gains(config: AudioVAEConfig, attack: Tensor, cache: StreamCache | None) -> Tensor:
    """Interpolate gains of samples [B, 2, T * hop] from their logs at some [B, T, 2, gains]."""
    points = attack.transpose(1, 2).flatten(2).exp()
    before = None if cache is None else cache.tensors.get(_GAINS)
    if before is None:
        before = torch.ones_like(points[..., :1])
    if cache is not None:
        cache.tensors[_GAINS] = points[..., -1:].clone()
    points = torch.cat([before, points], 2)
    step = config.hop // config.gains_per_frame
    rise = torch.arange(1, step + 1, device=points.device) / step
    return (points[..., :-1, None] + points.diff(dim=2)[..., None] * rise).flatten(2)


def overlap_add(config: AudioVAEConfig, frames: Tensor, cache: StreamCache | None = None) -> Tensor:
    """Add frames [B, T, window] where they overlap, [B, T * hop].

    Full overlap has an even sum of squared windows; the first samples have less of it.
    """
    parts = config.window // config.hop
    before = None if cache is None else cache.tensors.get(_FRAMES)
    first = before is None
    if before is None:
        before = frames.new_zeros(frames.shape[0], parts - 1, frames.shape[2])
    count, frames = frames.shape[1], torch.cat([before, frames], 1)
    if cache is not None:
        cache.tensors[_FRAMES] = frames[:, frames.shape[1] - parts + 1 :].clone()
    pieces = frames.unflatten(2, (parts, -1))
    added = sum(pieces[:, parts - 1 - j : parts - 1 - j + count, j] for j in range(parts))
    squares = _window(config, frames.device).square().view(parts, -1)
    full = squares.sum(0)
    scale = full.expand(count, -1)
    if first:
        risen = squares.cumsum(0)[: min(parts, count)].clamp(min=_ONSET * float(full[0]))
        scale = torch.cat([risen, scale[len(risen) :]])
    return (added / scale).flatten(1)


def _window(config: AudioVAEConfig, device: torch.device) -> Tensor:
    return torch.hann_window(config.window, device=device)


@lru_cache(maxsize=4)
def _noise_frames(bins: int) -> Tensor:
    """Return fixed complex normal numbers [`NOISE_FRAMES`, bins]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(NOISE_FRAMES, bins, dtype=torch.complex64, generator=generator)
