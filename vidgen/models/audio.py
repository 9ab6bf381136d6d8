"""A causal VAE for sound: short spectra to few latents a second, back to oscillators and noise.

Encoder and decoder work on the same grid of frames: frame t covers `window` samples from `hop * t`
on, and `frames_per_token` frames make a latent. So latent k depends on samples before
`samples_per_token * (k + 1) + lookahead` alone, its own samples are finished by latents up to k,
and sound of any length streams through in constant memory.

ConvNeXt blocks at the frames' rate and an inverse STFT are Vocos' (Siuzdak 2024, fig. 1): the
spectra that the networks read and write are in `audio_spectra`.

Axes: B batch, N samples (mono), T frames, K latents, C latent channels, D width. With a cache,
input follows that of earlier calls.
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

_SAMPLES = "samples"  # what a stream of sound keeps until it fills a latent
_FAINT, _TINY = 1e-4, 1e-9  # magnitudes below which there is no sound, and no number
_LOUDEST = 6.0  # log of a spectrum's largest magnitude
_QUIET = -2.0  # log of a fresh decoder's magnitudes
_STEEPEST = 3.0  # log of the largest gain, and less the least one's


class CausalConv1d(nn.Conv1d):
    """Depthwise convolution over [B, T, D] whose output frame t sees input frames up to t."""

    cache_key: str = ""

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__(dim, dim, kernel_size, groups=dim)
        self.num_history = kernel_size - 1

    def forward(self, x: Tensor, cache: StreamCache | None = None) -> Tensor:
        """[B, T, D] -> the same; with a cache, x follows the frames of earlier calls."""
        before = None if cache is None else cache.tensors.get(self.cache_key)
        if before is None:
            before = x.new_zeros(x.shape[0], self.num_history, x.shape[2])
        x = torch.cat([before, x], 1)
        if cache is not None:
            cache.tensors[self.cache_key] = x[:, x.shape[1] - self.num_history :].clone()
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class ConvNeXtBlock(nn.Module):
    """x + scaled feed-forward of a depthwise convolution (Liu et al. 2022, fig. 4)."""

    def __init__(self, dim: int, kernel_size: int, expansion: int, scale: float) -> None:
        super().__init__()
        self.conv = CausalConv1d(dim, kernel_size)
        self.norm = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, expansion * dim)
        self.contract = nn.Linear(expansion * dim, dim)
        self.scale = nn.Parameter(torch.full((dim,), scale))

    def forward(self, x: Tensor, cache: StreamCache | None = None) -> Tensor:
        """[B, T, D] -> the same."""
        y = self.norm(self.conv(x, cache))
        return x + self.scale * self.contract(F.gelu(self.expand(y)))


class _Stack(nn.ModuleList):
    """A sequence of blocks."""

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
    """Spectra to moments."""

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
        """[B, T, 3 * bins] -> [B, K, 2 * C], mean and log-variance."""
        x = self.frames(self.embed(x), cache)
        x = self.gather(x.unflatten(1, (-1, per_token)).flatten(2))
        return self.to_moments(self.norm(self.tokens(x, cache)))


class AudioDecoder(nn.Module):
    """Latents to spectra."""

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
        """[B, K, C] -> [B, T, 3 * bins + 2 * gains], float32.

        The advance of the phase, and the logs of tone, noise and of the gains of both.

        The head computes in float32, for what it says of phases adds up.
        """
        x = self.spread(self.tokens(self.from_latents(x), cache))
        x = self.frames(x.unflatten(2, (per_token, -1)).flatten(1, 2), cache)
        x = self.norm(x)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.head.weight.float(), self.head.bias.float())


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
        """Decode latents [B, C, K] as encoded to the sound of frames, T = K * frames_per_token."""
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
        """Return the spectra of sound [B, N] that the encoder reads.

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
