"""A causal VAE for sound: short spectra to few latents a second, back to oscillators and noise.

Encoder and decoder work on the same grid of frames: frame t covers `window` samples from `hop * t`
on, and `frames_per_token` frames make a latent. So latent k depends on samples before
`samples_per_token * (k + 1) + lookahead` alone, its own samples are finished by latents up to k,
and sound of any length streams through in constant memory.

ConvNeXt blocks at the frames' rate and an inverse STFT are Vocos' (Siuzdak 2024, fig. 1). Phases
aren't told but followed: the encoder sees how far each frequency's phase went since the last frame,
the decoder says how far it goes, and sums; so a steady tone is a constant. What is no tone is noise
of its own (harmonics plus noise, Engel et al. 2020, sec. 3), from a fixed table, so that decoding
is a function.

Axes: B batch, N samples (mono), T frames, K latents, C latent channels, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidgen.core.errors import InputError
from vidgen.models.latents import NormalizedLatents
from vidgen.ops.conv import StreamCache

_SAMPLES, _FRAMES, _PHASES = "samples", "frames", "phases"  # what a stream keeps besides history
_LOUDEST, _QUIET = 6.0, -2.0  # logs of a spectrum's magnitude: the largest, the first ones
NOISE_FRAMES = 4096
"""After which the noise repeats, 16 s; a table of them is kept."""
_ONSET = 0.1  # share of the full overlap that the first samples are divided by at least


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
        frames_per_token: frames that make a latent.
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
    frames_per_token: int = 8
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
    def num_bins(self) -> int:
        """Frequencies of a frame's spectrum."""
        return self.window // 2 + 1

    def num_tokens(self, num_samples: int) -> int:
        """Latents of so many samples: those that cover them."""
        return -(-num_samples // self.samples_per_token)


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
    """Blocks one after the other."""

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
        self.head = nn.Linear(dim, 3 * config.num_bins)
        with torch.no_grad():
            self.head.bias.fill_(_QUIET)
            self.head.bias[: config.num_bins] = 0

    def forward(self, x: Tensor, per_token: int, cache: StreamCache | None = None) -> Tensor:
        """[B, K, C] -> [B, T, 3 * bins]: advance of the phase, logs of tone and noise, float32.

        The head computes in float32, for what it says of phases adds up.
        """
        x = self.spread(self.tokens(self.from_latents(x), cache))
        x = self.frames(x.unflatten(2, (per_token, -1)).flatten(1, 2), cache)
        x = self.norm(x)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.head.weight.float(), self.head.bias.float())


class Controls(NamedTuple):
    """What a decoder says of each frame, [B, T, bins].

    advance: by which a frequency's phase leads its bin's own since the last frame, in (-pi, pi).
    tone: magnitude of the oscillator.
    noise: deviation of the noise.
    """

    advance: Tensor
    tone: Tensor
    noise: Tensor


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
        return self._encode(self._fill(F.pad(sound, (self.config.hop, 0))), None)

    def decode_raw(self, latents: Tensor, num_samples: int | None = None) -> Tensor:
        """Sound [B, N] of latents [B, C, K] as encoded, cut to `num_samples` where given."""
        return self.render(self.controls(latents))[:, :num_samples]

    def controls(self, latents: Tensor, cache: StreamCache | None = None) -> Controls:
        """What the decoder says of latents [B, C, K] as encoded, T = K * frames_per_token."""
        x = latents.transpose(1, 2).to(self.decoder.head.weight.dtype)
        said = self.decoder(x, self.config.frames_per_token, cache)
        advance, tone, noise = said.chunk(3, dim=2)
        tone, noise = (logs.clamp(max=_LOUDEST).exp() for logs in (tone, noise))
        return Controls(math.pi * advance.tanh(), tone, noise)

    def render(
        self, controls: Controls, cache: StreamCache | None = None, first_noise: int = 0
    ) -> Tensor:
        """Sound [B, T * hop] of a decoder's frames.

        Args:
            controls: see `controls`.
            cache: of a stream.
            first_noise: frame of the noise to begin with; training varies it.
        """
        bins, count = self.config.num_bins, controls.tone.shape[1]
        own = math.tau * self.config.hop / self.config.window * torch.arange(bins)
        steps = controls.advance.double() + own.to(controls.advance.device)
        phases = steps.cumsum(1)
        if cache is not None:
            first_noise = cache.position * self.config.frames_per_token
            phases = phases + cache.tensors.get(_PHASES, 0.0)
            cache.tensors[_PHASES] = phases[:, -1:].remainder(math.tau)
        turned = torch.polar(controls.tone, phases.remainder(math.tau).float())
        at = (first_noise + torch.arange(count)) % NOISE_FRAMES
        noise = _noise_frames(bins)[at].to(turned.device)
        frames = torch.fft.irfft(turned + controls.noise * noise, self.config.window)
        return self._overlap(frames * self._window(frames.device), cache)

    def spectra(self, sound: Tensor) -> tuple[Tensor, Tensor]:
        """What the encoder sees of sound [B, N].

        Returns:
            Magnitudes [B, T, bins], and the phases' advance since the last frame, less their bin's
            own, as complex numbers of length 1; T = K * frames_per_token.
        """
        _check_sound(sound)
        return self._spectra(self._fill(F.pad(sound, (self.config.hop, 0))))

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
        hop = self.config.hop  # of what came before, for the first frame's advance
        for chunk in sound:
            _check_sound(chunk)
            held = cache.tensors.pop(_SAMPLES, chunk.new_zeros(chunk.shape[0], hop))
            held = torch.cat([held, chunk], 1)
            if (ready := (held.shape[1] - hop - ahead) // size) > 0:
                yield self._next_tokens(held[:, : hop + ready * size + ahead], ready, cache)
                held = held[:, ready * size :]
            cache.tensors[_SAMPLES] = held.clone()
        held = cache.tensors.pop(_SAMPLES, None) if ends else None
        if held is not None and held.shape[1] > hop:
            count = self.config.num_tokens(held.shape[1] - hop)
            yield self._next_tokens(self._fill(held), count, cache)

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

        `sound` [B, hop + N] begins with what came before it.
        """
        tokens = self.config.num_tokens(sound.shape[1] - self.config.hop)
        whole = self.config.hop + tokens * self.config.samples_per_token + self.config.lookahead
        return F.pad(sound, (0, whole - sound.shape[1]))

    def _spectra(self, sound: Tensor) -> tuple[Tensor, Tensor]:
        """As `spectra`, of sound [B, hop + K * samples_per_token + lookahead]."""
        config = self.config
        frames = sound.float().unfold(1, config.window, config.hop) * self._window(sound.device)
        spectra = torch.fft.rfft(frames)
        own = math.tau * config.hop / config.window * torch.arange(config.num_bins)
        turn = torch.polar(torch.ones(config.num_bins), -own).to(sound.device)
        moved = spectra[:, 1:] * spectra[:, :-1].conj() * turn
        return spectra[:, 1:].abs(), moved / (moved.abs() + 1e-9)

    def _encode(self, sound: Tensor, cache: StreamCache | None) -> tuple[Tensor, Tensor]:
        """Moments of sound [B, hop + K * samples_per_token + lookahead]."""
        magnitudes, advance = self._spectra(sound)
        levels = (magnitudes + 1e-4) ** self.config.compression
        x = torch.cat([levels, levels * advance.real, levels * advance.imag], 2)
        x = x.to(self.encoder.embed.weight.dtype)
        moments = self.encoder(x, self.config.frames_per_token, cache).transpose(1, 2)
        mean, logvar = moments.chunk(2, dim=1)
        return mean, logvar

    def _overlap(self, frames: Tensor, cache: StreamCache | None) -> Tensor:
        """Add frames [B, T, window] where they overlap, [B, T * hop].

        Full overlap has an even sum of squared windows; the first samples have less of it.
        """
        parts = self.config.window // self.config.hop
        before = None if cache is None else cache.tensors.get(_FRAMES)
        first = before is None
        if before is None:
            before = frames.new_zeros(frames.shape[0], parts - 1, frames.shape[2])
        count, frames = frames.shape[1], torch.cat([before, frames], 1)
        if cache is not None:
            cache.tensors[_FRAMES] = frames[:, frames.shape[1] - parts + 1 :].clone()
        pieces = frames.unflatten(2, (parts, -1))
        added = sum(pieces[:, parts - 1 - j : parts - 1 - j + count, j] for j in range(parts))
        squares = self._window(frames.device).square().view(parts, -1)
        full = squares.sum(0)
        scale = full.expand(count, -1)
        if first:
            risen = squares.cumsum(0)[: min(parts, count)].clamp(min=_ONSET * float(full[0]))
            scale = torch.cat([risen, scale[len(risen) :]])
        return (added / scale).flatten(1)

    def _window(self, device: torch.device) -> Tensor:
        return torch.hann_window(self.config.window, device=device)


@lru_cache(maxsize=4)
def _noise_frames(bins: int) -> Tensor:
    """Complex normal numbers [`NOISE_FRAMES`, bins], always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(NOISE_FRAMES, bins, dtype=torch.complex64, generator=generator)


def _check_sound(sound: Tensor) -> None:
    """Refuse what is no mono sound."""
    if sound.dim() != 2 or not sound.shape[1]:
        raise InputError(
            f"sound is {list(sound.shape)}; the audio VAE takes mono sound [batch, samples], "
            "at least one sample; mix channels down first"
        )
