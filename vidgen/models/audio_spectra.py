"""Convert sound to the audio VAE's input spectra, and the decoder's output to sound.

Phases are relative: the encoder reads the advance of each frequency's phase since the last frame;
the decoder predicts the advance and sums it, so that a steady tone is constant over time. The rest
of the sound is filtered noise (harmonics plus noise, Engel et al. 2020, sec. 3) from a fixed table,
so that decoding is deterministic.

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
"""Frames after which the noise repeats, 16 s at the default sizes."""
_FRAMES, _PHASES, _GAINS = "frames", "phases", "gains"  # in a stream's cache
_ONSET = 0.1  # least share of the full overlap by which the first samples are divided


@dataclass(frozen=True)
class AudioVAEConfig:
    """Architecture of an `AudioVAE`.

    Args:
        latent_channels: C.
        encoder_layers: blocks at the frame rate, then at the latents' rate.
        decoder_layers: blocks at the latents' rate, then at the frame rate.
        expansion: hidden width of a block as a multiple of its width.
        kernel_size: frames that a block's convolution sees.
        sample_rate: samples per second.
        hop: samples from one frame to the next.
        window: samples in a frame; a multiple of the hop, at least three.
        pitch_window: samples that end with a frame, over which the encoder measures phases; a
            multiple of the window, or 0 for the window. In a short window, tones that are close to
            each other beat instead of having separate pitches.
        frames_per_token: frames in a latent.
        gains_per_frame: gains per frame that the decoder predicts for tones, and as many for noise.
            They make attacks as sharp as `hop / gains_per_frame` samples, which windows would blur.
            0: no gains.
        compression: exponent that the encoder applies to magnitudes.
        latents_mean: [C], subtracted from latents to normalise them; None: zeros.
        latents_std: [C], divides them after that; None: ones.

    Raises:
        ValueError: invalid or inconsistent values.
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
                f"window {self.window} must be even and a multiple of the hop {self.hop}, at least "
                "three, or overlapping frames don't add up evenly"
            )
        object.__setattr__(self, "pitch_window", self.pitch_window or self.window)
        if self.pitch_window < self.window or self.pitch_window % self.window:
            raise ValueError(
                f"pitch_window {self.pitch_window} must be a multiple of the window {self.window}, "
                "so that both have the same frequencies"
            )
        if self.gains_per_frame < 0 or (self.gains_per_frame and self.hop % self.gains_per_frame):
            raise ValueError(
                f"gains_per_frame {self.gains_per_frame} must be 0 or divide the hop {self.hop}"
            )
        check_statistics(self)

    @property
    def samples_per_token(self) -> int:
        """Samples per latent."""
        return self.hop * self.frames_per_token

    @property
    def tokens_per_s(self) -> float:
        """Latents per second."""
        return self.sample_rate / self.samples_per_token

    @property
    def lookahead(self) -> int:
        """Samples after a latent's own on which it depends."""
        return self.window - self.hop

    @property
    def history(self) -> int:
        """Samples before the first frame on which its spectra depend."""
        return self.hop + self.pitch_window - self.window

    @property
    def reach(self) -> float:
        """Largest advance of an oscillator over its bin's own, in radians per frame.

        It reaches a little over half-way to the next bin. With more reach, several oscillators
        would follow one tone and beat with each other.
        """
        return 1.1 * math.pi * self.hop / self.window

    @property
    def num_bins(self) -> int:
        """Number of frequencies in a frame's spectrum."""
        return self.window // 2 + 1

    def num_tokens(self, num_samples: int) -> int:
        """Return the number of latents that cover `num_samples`."""
        return -(-num_samples // self.samples_per_token)


class Controls(NamedTuple):
    """The decoder's output for each frame.

    Attributes:
        advance: [B, T, bins], advance of each oscillator's phase since the last frame, less that of
            its bin's own frequency, in radians.
        tone: [B, T, bins], magnitude of the oscillator.
        noise: [B, T, bins], standard deviation of the noise.
        attack: [B, T, 2, gains], log gains of tones and of noise at the end of each of a frame's
            equal parts; gains are interpolated linearly between them. None: no gains.
    """

    advance: Tensor
    tone: Tensor
    noise: Tensor
    attack: Tensor | None = None


def to_spectra(config: AudioVAEConfig, sound: Tensor) -> tuple[Tensor, Tensor]:
    """Return the spectra of sound [B, history + T * hop + lookahead], which begins with history.

    Returns:
        Magnitudes [B, T, bins], and tones, complex [B, T, bins]: their absolute value is the
        magnitude over `pitch_window`, their angle the phase's advance since the last frame, less
        that of the bin's own frequency.
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
    """Return spectra [B, T, bins], at the window's frequencies, of frames of one or more windows.

    A longer frame is folded to a window's length, which leaves its spectrum at these frequencies.
    """
    frames = sound.unfold(1, length, config.hop) * torch.hann_window(length, device=sound.device)
    return torch.fft.rfft(frames.unflatten(2, (-1, config.window)).sum(2))


def to_sound(
    config: AudioVAEConfig, controls: Controls, cache: StreamCache | None = None,
    first_noise: int = 0,
) -> Tensor:
    """Render a decoder's frames to sound [B, T * hop].

    `first_noise` is the first frame of the noise table, which training varies; with a cache it
    follows from the stream's position.
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
    """Return the sound [B, T * hop] of spectra [B, T, bins]."""
    frames = torch.fft.irfft(spectra, config.window)
    return overlap_add(config, frames * _window(config, frames.device), cache)


def _gains(config: AudioVAEConfig, attack: Tensor, cache: StreamCache | None) -> Tensor:
    """Interpolate log gains [B, T, 2, gains] to gains of samples, [B, 2, T * hop]."""
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
    """Overlap and add frames [B, T, window] to sound [B, T * hop].

    Samples are divided by the sum of squared windows: a constant, except for the first samples of a
    sound, which fewer frames cover.
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
    """Return fixed complex Gaussian noise [`NOISE_FRAMES`, bins]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(NOISE_FRAMES, bins, dtype=torch.complex64, generator=generator)
