"""A causal VAE for sound: short spectra to few latents a second, and back through an inverse STFT.

Encoder and decoder work on the same grid of frames: frame t covers `window` samples from `hop * t`
on, and `frames_per_token` frames make a latent. So latent k depends on samples before
`samples_per_token * (k + 1) + lookahead` alone, its own samples are finished by latents up to k,
and sound of any length streams through in constant memory.

The layout of blocks and head is Vocos' (Siuzdak 2024, fig. 1): ConvNeXt blocks at the frames' rate,
then magnitude and phase of each frame's spectrum.

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
from vidgen.models.latents import NormalizedLatents
from vidgen.ops.conv import StreamCache

_SAMPLES, _FRAMES = "samples", "frames"  # what a stream keeps besides the convolutions' history
_LOUDEST, _QUIET = 6.0, -2.0  # logs of a spectrum's magnitude: the largest, the first ones
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
        self.embed = nn.Linear(2 * config.num_bins, dim)
        self.frames = _Stack(dim, config.encoder_layers[0], config)
        self.gather = nn.Linear(per_token * dim, dim)
        self.tokens = _Stack(dim, config.encoder_layers[1], config)
        self.norm = nn.LayerNorm(dim)
        self.to_moments = nn.Linear(dim, 2 * config.latent_channels)

    def forward(self, x: Tensor, per_token: int, cache: StreamCache | None = None) -> Tensor:
        """[B, T, 2 * bins] -> [B, K, 2 * C], mean and log-variance."""
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
        self.head = nn.Linear(dim, 2 * config.num_bins)
        with torch.no_grad():  # quiet frames that ring in their middle, where the window is open
            self.head.bias[: config.num_bins] = _QUIET
            self.head.bias[config.num_bins :] = math.pi * (torch.arange(config.num_bins) % 2)

    def forward(self, x: Tensor, per_token: int, cache: StreamCache | None = None) -> Tensor:
        """[B, K, C] -> [B, T, 2 * bins], log-magnitude and phase, float32.

        The head computes in float32: bf16 would round phases to a thirtieth of a radian.
        """
        x = self.spread(self.tokens(self.from_latents(x), cache))
        x = self.frames(x.unflatten(2, (per_token, -1)).flatten(1, 2), cache)
        x = self.norm(x)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.head.weight.float(), self.head.bias.float())


class AudioVAE(NormalizedLatents, nn.Module):
    """Sound [B, N], mono in [-1, 1], <-> latents [B, C, K]."""

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
        return self._encode(self._fill(sound), None)

    def decode_raw(self, latents: Tensor, num_samples: int | None = None) -> Tensor:
        """Sound [B, N] of latents [B, C, K] as encoded, cut to `num_samples` where given."""
        return self._decode(latents, None)[:, :num_samples]

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
        for chunk in sound:
            _check_sound(chunk)
            held = cache.tensors.pop(_SAMPLES, None)
            held = chunk if held is None else torch.cat([held, chunk], 1)
            if (ready := (held.shape[1] - ahead) // size) > 0:
                yield self._next_tokens(held[:, : ready * size + ahead], ready, cache)
                held = held[:, ready * size :]
            cache.tensors[_SAMPLES] = held.clone()
        held = cache.tensors.pop(_SAMPLES, None) if ends else None
        if held is not None and held.shape[1]:
            count = self.config.num_tokens(held.shape[1])
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
            sound = self._decode(self.denormalize(piece), cache)
            cache.position += piece.shape[2]
            yield sound

    def _next_tokens(self, sound: Tensor, count: int, cache: StreamCache) -> Tensor:
        mean, _ = self._encode(sound, cache)
        cache.position += count
        return self.normalize(mean)

    def _fill(self, sound: Tensor) -> Tensor:
        """Let silence follow until the last latent and what it looks ahead to are full."""
        tokens = self.config.num_tokens(sound.shape[1])
        whole = tokens * self.config.samples_per_token + self.config.lookahead
        return F.pad(sound, (0, whole - sound.shape[1]))

    def _encode(self, sound: Tensor, cache: StreamCache | None) -> tuple[Tensor, Tensor]:
        """Moments of sound [B, K * samples_per_token + lookahead]."""
        config = self.config
        frames = sound.float().unfold(1, config.window, config.hop) * self._window(sound.device)
        spectra = torch.view_as_real(torch.fft.rfft(frames))
        power = spectra.square().sum(-1, keepdim=True)
        spectra = spectra * (power + 1e-8) ** ((config.compression - 1) / 2)
        x = spectra.flatten(2).to(self.encoder.embed.weight.dtype)
        moments = self.encoder(x, config.frames_per_token, cache).transpose(1, 2)
        mean, logvar = moments.chunk(2, dim=1)
        return mean, logvar

    def _decode(self, latents: Tensor, cache: StreamCache | None) -> Tensor:
        x = latents.transpose(1, 2).to(self.decoder.head.weight.dtype)
        logs, phase = self.decoder(x, self.config.frames_per_token, cache).chunk(2, dim=2)
        spectra = torch.polar(logs.clamp(max=_LOUDEST).exp(), phase)
        frames = torch.fft.irfft(spectra, self.config.window) * self._window(latents.device)
        return self._overlap(frames, cache)

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


def _check_sound(sound: Tensor) -> None:
    """Refuse what is no mono sound."""
    if sound.dim() != 2 or not sound.shape[1]:
        raise InputError(
            f"sound is {list(sound.shape)}; the audio VAE takes mono sound [batch, samples], "
            "at least one sample; mix channels down first"
        )
