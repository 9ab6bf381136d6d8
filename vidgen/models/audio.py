"""A causal VAE for sound: short spectra to few latents a second, back to oscillators and noise.

Encoder and decoder work on the same grid of frames: frame t covers `window` samples from `hop * t`
on, and `frames_per_token` frames make a latent. So latent k depends on samples before
`samples_per_token * (k + 1) + lookahead` alone, its own samples are finished by latents up to k,
and sound of any length streams through in constant memory.

ConvNeXt blocks at the frames' rate and an inverse STFT are Vocos' (Siuzdak 2024, fig. 1): the
networks are in `audio_blocks`, what they see and say in `audio_spectra`.

Axes: B batch, N samples (mono), T frames, K latents, C latent channels, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidgen.core.errors import InputError
from vidgen.models.audio_blocks import AudioDecoder, AudioEncoder, CausalConv1d
from vidgen.models.audio_spectra import Controls, to_sound, to_spectra
from vidgen.models.latents import NormalizedLatents
from vidgen.ops.conv import StreamCache

_SAMPLES = "samples"  # what a stream of sound keeps until it fills a latent
_FAINT, _TINY = 1e-4, 1e-9  # magnitudes below which there is no sound, and no number
_LOUDEST = 6.0  # log of a spectrum's largest magnitude
_STEEPEST = 3.0  # log of the largest gain, and less the least one's


@dataclass(frozen=True)
class AudioVAEConfig:
    """Architecture of an `AudioVAE`.

    Args:
        latent_channels: C.
        encoder_dim: width of the encoder's blocks.
        decoder_dim: the same in the decoder.
        encoder_layers: blocks at the frames' rate, then at the latents'.
        decoder_layers: blocks at the latents' rate, then at the frames'.
        expansion: hidden width of a block, in widths.
        kernel_size: frames that a block's convolution sees.
        sample_rate: samples a second.
        hop: samples from a frame to the next.
        window: samples of a frame, three whole hops at least.
        pitch_window: samples, whole windows, that end with a frame and over which the encoder
            follows phases: tones nearer to each other than a window tells apart beat in it, and
            have no pitch there. 0: the window.
        frames_per_token: frames that make a latent.
        gains_per_frame: gains that the decoder says of each frame for its tones, and as many for
            its noise: attacks are then as sharp as `hop / gains_per_frame` samples, where windows
            alone would blur them. 0: none.
        compression: power that the encoder raises magnitudes to.
        latents_mean: [C], what normalised latents have subtracted; None: zeros.
        latents_std: [C], what normalised latents are divided by; None: ones.

    Raises:
        ValueError: for values that no network can have.
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
        """Check the values against each other."""
        positive = (
            "latent_channels", "encoder_dim", "decoder_dim", "expansion", "kernel_size",
            "sample_rate", "hop", "frames_per_token",
        )  # fmt: skip
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, not {getattr(self, name)}")
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
        for name in ("latents_mean", "latents_std"):
            values = getattr(self, name)
            if values is not None and len(values) != self.latent_channels:
                raise ValueError(
                    f"{name} has {len(values)} values for {self.latent_channels} channels"
                )

    @property
    def samples_per_token(self) -> int:
        """Samples that a latent stands for."""
        return self.hop * self.frames_per_token

    @property
    def tokens_per_s(self) -> float:
        """Latents a second."""
        return self.sample_rate / self.samples_per_token

    @property
    def lookahead(self) -> int:
        """Samples behind its own that a latent depends on."""
        return self.window - self.hop

    @property
    def history(self) -> int:
        """Samples before a sound's first that its spectra depend on."""
        return self.hop + self.pitch_window - self.window

    @property
    def reach(self) -> float:
        """Largest advance of an oscillator, in radians a frame: a little over half-way to the next.

        Several that could follow one tone would beat with each other.
        """
        return 1.1 * math.pi * self.hop / self.window

    @property
    def num_bins(self) -> int:
        """Frequencies of a frame's spectrum."""
        return self.window // 2 + 1

    def num_tokens(self, num_samples: int) -> int:
        """Latents of so many samples: those that cover them."""
        return -(-num_samples // self.samples_per_token)


class AudioVAE(NormalizedLatents, nn.Module):
    """Sound [B, N], mono in [-1, 1], <-> latents [B, C, K]."""

    config: AudioVAEConfig

    def __init__(self, config: AudioVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = AudioEncoder(config)
        self.decoder = AudioDecoder(config)
        for name, module in self.named_modules():
            if isinstance(module, CausalConv1d):
                module.cache_key = name

    def encode_moments(self, sound: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the latents, not normalised.

        Args:
            sound: [B, N], of any length; silence is taken to follow it.

        Returns:
            Two tensors [B, C, K], K = `config.num_tokens(N)`.

        Raises:
            InputError: for sound that is not [B, N] or is empty.
        """
        _check_sound(sound)
        return self._encode(self._fill(F.pad(sound, (self.config.history, 0))), None)

    def decode_raw(self, latents: Tensor, num_samples: int | None = None) -> Tensor:
        """Sound [B, N] of latents [B, C, K] as encoded, cut to `num_samples` where given."""
        return self.render(self.controls(latents))[:, :num_samples]

    def controls(self, latents: Tensor, cache: StreamCache | None = None) -> Controls:
        """What the decoder says of latents [B, C, K] as encoded, T = K * frames_per_token."""
        x = latents.transpose(1, 2).to(self.decoder.head.weight.dtype)
        said = self.decoder(x, self.config.frames_per_token, cache)
        bins, gains = self.config.num_bins, self.config.gains_per_frame
        advance, tone, noise, attack = said.split([bins, bins, bins, 2 * gains], dim=2)
        tone, noise = (logs.clamp(max=_LOUDEST).exp() for logs in (tone, noise))
        attack = _STEEPEST * (attack / _STEEPEST).tanh().unflatten(2, (2, gains)) if gains else None
        return Controls(self.config.reach * advance.tanh(), tone, noise, attack)

    def render(
        self, controls: Controls, cache: StreamCache | None = None, first_noise: int = 0
    ) -> Tensor:
        """Sound [B, T * hop] of a decoder's frames.

        Args:
            controls: see `controls`.
            cache: of a stream.
            first_noise: frame of the noise to begin with; training varies it.
        """
        return to_sound(self.config, controls, cache, first_noise)

    def spectra(self, sound: Tensor) -> tuple[Tensor, Tensor]:
        """What the encoder sees of sound [B, N].

        Returns:
            Magnitudes [B, T, bins], and tones, complex; see `to_spectra`; T = K * frames_per_token.
        """
        _check_sound(sound)
        return to_spectra(self.config, self._fill(F.pad(sound, (self.config.history, 0))))

    def encode(self, sound: Tensor) -> Tensor:
        """The posterior's mode, normalised, [B, C, K]; see `encode_moments`."""
        return self.normalize(self.encode_moments(sound)[0])

    def decode(self, latents: Tensor, num_samples: int | None = None) -> Tensor:
        """Sound [B, N] of normalised latents [B, C, K], cut to `num_samples` where given."""
        return self.decode_raw(self.denormalize(latents), num_samples)

    @torch.no_grad()
    def stream_encode(
        self, sound: Iterable[Tensor], cache: StreamCache | None = None, *, ends: bool = True
    ) -> Iterator[Tensor]:
        """Encode sound as it comes, `lookahead` samples late, in constant memory.

        Args:
            sound: chunks [B, n] of any lengths.
            cache: where an earlier stream stopped, and where this one does; None: a new sound.
            ends: whether silence follows; if not, samples that don't fill a latent stay in the
                cache for the next call.

        Yields:
            Normalised latents [B, C, k], equal to those of `encode` on the whole sound.
        """
        cache = StreamCache() if cache is None else cache
        size, ahead = self.config.samples_per_token, self.config.lookahead
        before = self.config.history
        for chunk in sound:
            _check_sound(chunk)
            held = cache.tensors.pop(_SAMPLES, chunk.new_zeros(chunk.shape[0], before))
            held = torch.cat([held, chunk], 1)
            if (ready := (held.shape[1] - before - ahead) // size) > 0:
                yield self._next_tokens(held[:, : before + ready * size + ahead], ready, cache)
                held = held[:, ready * size :]
            cache.tensors[_SAMPLES] = held.clone()
        rest = cache.tensors.pop(_SAMPLES, None) if ends else None
        if rest is not None and rest.shape[1] > before:
            count = self.config.num_tokens(rest.shape[1] - before)
            yield self._next_tokens(self._fill(rest), count, cache)

    @torch.no_grad()
    def stream_decode(
        self, latents: Iterable[Tensor], cache: StreamCache | None = None
    ) -> Iterator[Tensor]:
        """Decode latents as they come, in constant memory.

        Args:
            latents: normalised, pieces [B, C, k] of any lengths.
            cache: where an earlier stream stopped, and where this one does; None: a new sound.

        Yields:
            Sound [B, samples_per_token * k], equal to that of `decode` on the whole.
        """
        cache = StreamCache() if cache is None else cache
        for piece in latents:
            sound = self.render(self.controls(self.denormalize(piece), cache), cache)
            cache.position += piece.shape[2]
            yield sound

    def _next_tokens(self, sound: Tensor, count: int, cache: StreamCache) -> Tensor:
        mean, _ = self._encode(sound, cache)
        cache.position += count
        return self.normalize(mean)

    def _fill(self, sound: Tensor) -> Tensor:
        """Let silence follow until the last latent and what it looks ahead to are full.

        `sound` [B, history + N] begins with what came before it.
        """
        config = self.config
        size = config.num_tokens(sound.shape[1] - config.history) * config.samples_per_token
        return F.pad(sound, (0, config.history + size + config.lookahead - sound.shape[1]))

    def _encode(self, sound: Tensor, cache: StreamCache | None) -> tuple[Tensor, Tensor]:
        """Moments of sound [B, history + K * samples_per_token + lookahead]."""
        magnitudes, tones = to_spectra(self.config, sound)
        sizes = tones.abs()
        ways = tones * ((sizes + _FAINT) ** self.config.compression / (sizes + _TINY))
        x = torch.cat([(magnitudes + _FAINT) ** self.config.compression, ways.real, ways.imag], 2)
        x = x.to(self.encoder.embed.weight.dtype)
        moments = self.encoder(x, self.config.frames_per_token, cache).transpose(1, 2)
        mean, logvar = moments.chunk(2, dim=1)
        return mean, logvar


def _check_sound(sound: Tensor) -> None:
    """Refuse what is no mono sound."""
    if sound.dim() != 2 or not sound.shape[1]:
        raise InputError(
            f"sound is {list(sound.shape)}; the audio VAE takes mono sound [batch, samples], "
            "at least one sample; mix channels down first"
        )
