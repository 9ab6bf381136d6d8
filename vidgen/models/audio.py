"""A causal VAE for sound: encode short spectra to latents, decode to oscillators and noise.

Frame t covers `window` samples from `hop * t` on, and each latent covers `frames_per_token` frames.
Latent k therefore depends only on samples before `samples_per_token * (k + 1) + lookahead`, and the
decoded samples of latent k only on latents up to k: sound of any length is processed as a stream,
in constant memory.

ConvNeXt blocks at the frame rate and the inverse STFT follow Vocos (Siuzdak 2024, fig. 1).
`audio_spectra` computes the spectra that the networks read and write.

Axes: B batch, N samples (mono), T frames, K latents, C latent channels, D width. Methods with a
`cache` argument continue the stream of earlier calls with the same cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidgen.core.errors import InputError
from vidgen.models.audio_spectra import AudioVAEConfig, Controls, to_sound, to_spectra
from vidgen.ops.conv import StreamCache
from vidgen.ops.latents import NormalizedLatents

_FAINT, _TINY = 1e-4, 1e-9  # magnitudes of silence, and against division by zero
_LOUDEST = 6.0  # log of a spectrum's largest magnitude
_QUIET = -2.0  # log of an untrained decoder's magnitudes
_STEEPEST = 3.0  # log of the largest gain; the smallest is its inverse


class CausalConv1d(nn.Conv1d):
    """Depthwise convolution over time; output frame t depends on input frames up to t."""

    cache_key: str = ""

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__(dim, dim, kernel_size, groups=dim)
        self.num_history = kernel_size - 1

    def forward(self, x: Tensor, cache: StreamCache | None = None) -> Tensor:
        """Map [B, T, D] to the same shape."""
        before = None if cache is None else cache.tensors.get(self.cache_key)
        if before is None:
            before = x.new_zeros(x.shape[0], self.num_history, x.shape[2])
        x = torch.cat([before, x], 1)
        if cache is not None:
            cache.tensors[self.cache_key] = x[:, x.shape[1] - self.num_history :].clone()
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution, scaled feed-forward and shortcut (Liu et al. 2022, fig. 4)."""

    def __init__(self, dim: int, kernel_size: int, expansion: int, scale: float) -> None:
        super().__init__()
        self.conv = CausalConv1d(dim, kernel_size)
        self.norm = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, expansion * dim)
        self.contract = nn.Linear(expansion * dim, dim)
        self.scale = nn.Parameter(torch.full((dim,), scale))

    def forward(self, x: Tensor, cache: StreamCache | None = None) -> Tensor:
        """Map [B, T, D] to the same shape."""
        y = self.norm(self.conv(x, cache))
        return x + self.scale * self.contract(F.gelu(self.expand(y)))


class _Stack(nn.ModuleList):
    def __init__(self, dim: int, layers: int, config: AudioVAEConfig) -> None:
        super().__init__(
            ConvNeXtBlock(dim, config.kernel_size, config.expansion, 1 / max(layers, 1))
            for _ in range(layers)
        )

    def forward(self, x: Tensor, cache: StreamCache | None = None) -> Tensor:
        for block in self:
            x = block(x, cache)
        return x


class AudioEncoder(nn.Module):
    """Network from spectra to the mean and log-variance of latents."""

    def __init__(self, config: AudioVAEConfig) -> None:
        super().__init__()
        dim, per_token = config.encoder_dim, config.frames_per_token
        self.embed = nn.Linear(3 * config.num_bins, dim)
        self.frames = _Stack(dim, config.encoder_layers[0], config)
        self.gather = nn.Linear(per_token * dim, dim)
        self.tokens = _Stack(dim, config.encoder_layers[1], config)
        self.norm = nn.LayerNorm(dim)
        self.to_moments = nn.Linear(dim, 2 * config.latent_channels)

    def forward(self, x: Tensor, per_token: int, cache: StreamCache | None = None) -> Tensor:
        """Map spectra [B, T, 3 * bins] to [B, K, 2 * C], mean and log-variance."""
        x = self.frames(self.embed(x), cache)
        x = self.gather(x.unflatten(1, (-1, per_token)).flatten(2))
        return self.to_moments(self.norm(self.tokens(x, cache)))


class AudioDecoder(nn.Module):
    """Network from latents to the parameters of `Controls`."""

    def __init__(self, config: AudioVAEConfig) -> None:
        super().__init__()
        dim, per_token = config.decoder_dim, config.frames_per_token
        self.from_latents = nn.Linear(config.latent_channels, dim)
        self.tokens = _Stack(dim, config.decoder_layers[0], config)
        self.spread = nn.Linear(dim, per_token * dim)
        self.frames = _Stack(dim, config.decoder_layers[1], config)
        self.norm = nn.LayerNorm(dim)
        bins = config.num_bins
        self.head = nn.Linear(dim, 3 * bins + 2 * config.gains_per_frame)
        with torch.no_grad():
            self.head.bias.zero_()
            self.head.bias[bins : 3 * bins] = _QUIET

    def forward(self, x: Tensor, per_token: int, cache: StreamCache | None = None) -> Tensor:
        """Map latents [B, K, C] to [B, T, 3 * bins + 2 * gains], float32.

        The last axis has the advance of the phase, and the logs of tone, noise and their gains.
        The head computes in float32, since errors of phases add up over time.
        """
        x = self.spread(self.tokens(self.from_latents(x), cache))
        x = self.frames(x.unflatten(2, (per_token, -1)).flatten(1, 2), cache)
        x = self.norm(x)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.head.weight.float(), self.head.bias.float())


class AudioVAE(NormalizedLatents, nn.Module):
    """A VAE that encodes mono sound [B, N] in [-1, 1] to latents [B, C, K], and decodes them."""

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
        """Return mean and log-variance [B, C, K] of the latents, not normalised.

        `sound` [B, N] may have any length and is padded with silence; K is `config.num_tokens(N)`.

        Raises:
            InputError: `sound` is not [B, N] or is empty.
        """
        _check_sound(sound)
        return self._encode(self._fill(F.pad(sound, (self.config.history, 0))), None)

    def decode_raw(self, latents: Tensor, num_samples: int | None = None) -> Tensor:
        """Decode latents [B, C, K], not normalised, to sound [B, N], cut to `num_samples`."""
        return to_sound(self.config, self.controls(latents))[:, :num_samples]

    def controls(self, latents: Tensor, cache: StreamCache | None = None) -> Controls:
        """Decode latents [B, C, K], not normalised, to controls of T = K * frames_per_token."""
        x = latents.transpose(1, 2).to(self.decoder.head.weight.dtype)
        output = self.decoder(x, self.config.frames_per_token, cache)
        bins, gains = self.config.num_bins, self.config.gains_per_frame
        advance, tone, noise, attack = output.split([bins, bins, bins, 2 * gains], dim=2)
        tone, noise = (logs.clamp(max=_LOUDEST).exp() for logs in (tone, noise))
        attack = _STEEPEST * (attack / _STEEPEST).tanh().unflatten(2, (2, gains)) if gains else None
        return Controls(self.config.reach * advance.tanh(), tone, noise, attack)

    def spectra(self, sound: Tensor) -> tuple[Tensor, Tensor]:
        """Return the spectra of sound [B, N] that the encoder reads; see `to_spectra`."""
        _check_sound(sound)
        return to_spectra(self.config, self._fill(F.pad(sound, (self.config.history, 0))))

    def encode(self, sound: Tensor) -> Tensor:
        """Return the posterior's mode, normalised, [B, C, K]; see `encode_moments`."""
        return self.normalize(self.encode_moments(sound)[0])

    def decode(self, latents: Tensor, num_samples: int | None = None) -> Tensor:
        """Decode normalised latents [B, C, K] to sound [B, N], cut to `num_samples`."""
        return self.decode_raw(self.denormalize(latents), num_samples)

    @torch.no_grad()
    def stream_encode(self, sound: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield the normalised latents [B, C, k] of a sound in chunks [B, n] of any lengths.

        A latent follows `config.lookahead` samples after its own; the end is padded with silence.
        """
        cache, size, before = StreamCache(), self.config.samples_per_token, self.config.history
        held: Tensor | None = None
        for chunk in sound:
            _check_sound(chunk)
            held = chunk.new_zeros(chunk.shape[0], before) if held is None else held
            held = torch.cat([held, chunk], 1)
            if (ready := (held.shape[1] - before - self.config.lookahead) // size) > 0:
                whole = held[:, : before + ready * size + self.config.lookahead]
                yield self.normalize(self._encode(whole, cache)[0])
                held = held[:, ready * size :].clone()
        if held is not None and held.shape[1] > before:
            yield self.normalize(self._encode(self._fill(held), cache)[0])

    @torch.no_grad()
    def stream_decode(
        self, latents: Iterable[Tensor], cache: StreamCache | None = None
    ) -> Iterator[Tensor]:
        """Yield the sound [B, samples_per_token * k] of each piece of normalised latents [B, C, k].

        `cache` continues an earlier stream, and is updated; None: start a new sound.
        """
        cache = StreamCache() if cache is None else cache
        for piece in latents:
            sound = to_sound(self.config, self.controls(self.denormalize(piece), cache), cache)
            cache.position += piece.shape[2]
            yield sound

    def _fill(self, sound: Tensor) -> Tensor:
        """Pad sound [B, history + N] with silence to fill the last latent and its lookahead."""
        config = self.config
        size = config.num_tokens(sound.shape[1] - config.history) * config.samples_per_token
        return F.pad(sound, (0, config.history + size + config.lookahead - sound.shape[1]))

    def _encode(self, sound: Tensor, cache: StreamCache | None) -> tuple[Tensor, Tensor]:
        """Return moments of sound [B, history + K * samples_per_token + lookahead]."""
        magnitudes, tones = to_spectra(self.config, sound)
        sizes = tones.abs()
        tones = tones * ((sizes + _FAINT) ** self.config.compression / (sizes + _TINY))
        x = torch.cat([(magnitudes + _FAINT) ** self.config.compression, tones.real, tones.imag], 2)
        x = x.to(self.encoder.embed.weight.dtype)
        moments = self.encoder(x, self.config.frames_per_token, cache).transpose(1, 2)
        mean, logvar = moments.chunk(2, dim=1)
        return mean, logvar


def _check_sound(sound: Tensor) -> None:
    if sound.dim() != 2 or not sound.shape[1]:
        raise InputError(
            f"sound has shape {list(sound.shape)}; the audio VAE takes mono sound [batch, samples] "
            "of at least one sample: mix channels down first"
        )
