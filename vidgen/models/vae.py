"""A causal 3D video VAE: one class for Wan 2.1, Wan 2.2 and the toybox model.

The first latent frame is a single video frame, each later one has `strides.t` frames, and no frame
depends on later ones. A still is therefore a clip of one frame, and clips of any length are encoded
and decoded as a stream, in constant memory.

Axes: B batch, C latent channels, T frames, H rows, W columns, F latent frames, h w latent rows and
columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from copy import copy
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from vidgen.core.errors import InputError
from vidgen.core.shapes import Strides, latent_shape
from vidgen.models.vae_blocks import Downsample, DownStage, MidBlock, Upsample, UpStage
from vidgen.ops.conv import CausalConv3d, StreamCache, channels_last
from vidgen.ops.latents import (
    NormalizedLatents,
    check_positive,
    check_statistics,
    patchify_pixels,
    unpatchify_pixels,
)
from vidgen.ops.norm import ChannelRMSNorm

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class VAEConfig:
    """Architecture of a `CausalVAE`.

    Args:
        latent_channels: C.
        encoder_dim: width that `channel_mults` multiply in the encoder.
        decoder_dim: width that `channel_mults` multiply in the decoder.
        channel_mults: one per stage, from pixels to latents; all stages except the last halve rows
            and columns.
        num_blocks: residual blocks per stage of the encoder; the decoder's stages have one more.
        temporal_downsample: for each stage except the last, from pixels to latents, True if it also
            halves the number of frames.
        patch_size: side of the squares of pixels that are first moved into channels.
        stage_shortcuts: True for parameter-free shortcuts around whole stages (Wan 2.2).
        latents_mean: [C], subtracted from latents to normalise them; None: zeros.
        latents_std: [C], divides them after that; None: ones.

    Raises:
        ValueError: invalid or inconsistent values.
    """

    latent_channels: int
    encoder_dim: int
    decoder_dim: int
    channel_mults: tuple[int, ...]
    num_blocks: int
    temporal_downsample: tuple[bool, ...]
    patch_size: int = 1
    stage_shortcuts: bool = False
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check_positive(self, "latent_channels", "encoder_dim", "decoder_dim", "num_blocks",
                       "patch_size")
        if not self.channel_mults or min(self.channel_mults) < 1:
            raise ValueError(f"channel_mults must be positive, not {self.channel_mults}")
        if len(self.temporal_downsample) != len(self.channel_mults) - 1:
            raise ValueError(
                f"temporal_downsample has {len(self.temporal_downsample)} entries, "
                f"but {len(self.channel_mults)} stages need {len(self.channel_mults) - 1}"
            )
        check_statistics(self)
        if self.latents_std is not None and min(self.latents_std) <= 0:
            raise ValueError(f"latents_std must be positive, not {min(self.latents_std)}")
        if self.stage_shortcuts:
            self._check_shortcuts()
        odd = [m for m in self.channel_mults[1:] if self.decoder_dim * m % 2]
        if odd and not self.stage_shortcuts:
            raise ValueError(
                "upsampling halves the width, but "
                f"decoder_dim {self.decoder_dim} times {odd[0]} is odd"
            )

    def _check_shortcuts(self) -> None:
        """Raise ValueError for indivisible widths: shortcuts average or repeat whole channels."""
        mults, factors = self.channel_mults, {None: 1, "spatial": 4, "spacetime": 8}
        down = zip((1, *mults), mults, self.resamples, strict=False)
        up = zip((mults[-1], *mults[:0:-1]), mults[:0:-1], self.resamples[-2::-1], strict=False)
        wrong = [(i, o) for i, o, resample in down if i * factors[resample] % o]
        wrong += [(i, o) for i, o, resample in up if o * factors[resample] % i]
        if wrong:
            raise ValueError(
                f"stage shortcuts can't go from {wrong[0][0]} to {wrong[0][1]} times the width: "
                f"change channel_mults {mults}"
            )

    @property
    def num_stages(self) -> int:
        """Number of stages of the encoder, and of the decoder."""
        return len(self.channel_mults)

    @property
    def strides(self) -> Strides:
        """Video frames per latent frame, and pixels per latent pixel."""
        return Strides(t=2 ** sum(self.temporal_downsample),
                       hw=self.patch_size * 2 ** (self.num_stages - 1))

    def steady_stages(self, rate: int) -> tuple[bool, ...]:
        """Return True for each stage, from pixels to latents, that keeps the number of frames.

        `rate` is `at_rate`'s.

        Raises:
            InputError: this architecture doesn't support the rate.
        """
        if rate == 1:
            return (False,) * self.num_stages
        if self.stage_shortcuts:
            raise InputError(f"temporal_upsampling is {rate}, but a VAE with stage shortcuts has "
                             "one rate; give 1")
        rates = [2**n for n in range(self.strides.t.bit_length())]
        if rate not in rates:
            raise InputError(f"temporal_upsampling is {rate}; a VAE of {self.strides.t} frames a "
                             f"latent frame can take {', '.join(map(str, rates))}")
        left, steady = rates.index(rate), []
        for temporal in (*self.temporal_downsample, False):
            steady.append(temporal and left > 0)
            left -= temporal
        return tuple(steady)

    @property
    def resamples(self) -> tuple[str | None, ...]:
        """Downsampling at the end of each encoder stage: "spatial", "spacetime", or None."""
        return *("spacetime" if t else "spatial" for t in self.temporal_downsample), None


class Encoder(nn.Module):
    """Network from patches of pixels to the mean and log-variance of latents."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.encoder_dim * m for m in (1, *config.channel_mults)]
        self.conv_in = CausalConv3d(3 * config.patch_size**2, widths[0], (3, 3, 3))
        self.stages = nn.ModuleList(
            DownStage(i, o, config.num_blocks, resample, shortcut=config.stage_shortcuts)
            for i, o, resample in zip(widths[:-1], widths[1:], config.resamples, strict=True)
        )
        self.mid = MidBlock(widths[-1])
        self.norm_out = ChannelRMSNorm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], 2 * config.latent_channels, (3, 3, 3))
        self.to_moments = CausalConv3d(2 * config.latent_channels, 2 * config.latent_channels,
                                       (1, 1, 1))

    def forward(self, x: Tensor, cache: StreamCache | None = None) -> Tensor:
        """Map [B, 3 * p * p, T, H / p, W / p] to [B, 2 * C, F, h, w], mean and log-variance."""
        x = self.conv_in(x, cache)
        for stage in self.stages:
            x = stage(x, cache)
        return self.leave(x, cache)

    def leave(self, x: Tensor, cache: StreamCache | None = None) -> Tensor:
        """Map features of the last stage [B, D, F, h, w] to moments."""
        x = self.conv_out.after_norm(self.norm_out, self.mid(x, cache), cache)
        return self.to_moments(x)


class Decoder(nn.Module):
    """Network from latents to patches of pixels."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        mults = config.channel_mults[::-1]
        outs = [config.decoder_dim * m for m in mults]
        halved = 1 if config.stage_shortcuts else 2
        ins = [outs[0], *(width // halved for width in outs[:-1])]
        resamples = (*config.resamples[-2::-1], None)
        self.from_latents = CausalConv3d(config.latent_channels, config.latent_channels, (1, 1, 1))
        self.conv_in = CausalConv3d(config.latent_channels, outs[0], (3, 3, 3))
        self.mid = MidBlock(outs[0])
        self.stages = nn.ModuleList(
            UpStage(i, o, config.num_blocks + 1, resample, shortcut=config.stage_shortcuts)
            for i, o, resample in zip(ins, outs, resamples, strict=True)
        )
        self.norm_out = ChannelRMSNorm(outs[-1])
        self.conv_out = CausalConv3d(outs[-1], 3 * config.patch_size**2, (3, 3, 3))

    def forward(self, x: Tensor, cache: StreamCache | None = None) -> Tensor:
        """Map [B, C, F, h, w] to [B, 3 * p * p, T, H / p, W / p]."""
        x = self.enter(x, cache)
        for stage in self.stages:
            x = stage(x, cache)
        return self.conv_out.after_norm(self.norm_out, x, cache)

    def enter(self, x: Tensor, cache: StreamCache | None = None) -> Tensor:
        """Map latents to features for the first stage [B, D, F, h, w]."""
        return self.mid(self.conv_in(self.from_latents(x), cache), cache)


def by_decoder(steady: tuple[bool, ...]) -> tuple[bool, ...]:
    """Reorder flags of the encoder's stages for the decoder's stages that invert them."""
    return *steady[-2::-1], False


def _view(module: Module) -> Module:
    """Copy a module and its submodules, but share parameters, buffers and hooks."""
    view = copy(module)
    view._modules = {name: _view(child) for name, child in module.named_children()}
    return view


class CausalVAE(NormalizedLatents, nn.Module):
    """A VAE between video [B, 3, T, H, W] in [-1, 1] and latents [B, C, F, h, w]."""

    config: VAEConfig
    rate: int = 1

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        for name, module in self.named_modules():
            if hasattr(module, "cache_key"):
                module.cache_key = name

    @property
    def strides(self) -> Strides:
        """Frames and pixels per latent frame and latent pixel."""
        return self.config.strides.at_rate(self.rate)

    def at_rate(self, rate: int) -> CausalVAE:
        """Return a view of this VAE, with the same weights, whose latent frames are closer in time.

        A latent frame of the view has strides.t / rate video frames; `rate` is a power of two up to
        strides.t. The stages next to the pixels keep the number of frames.

        Raises:
            InputError: this VAE doesn't support the rate.
        """
        steady = self.config.steady_stages(rate)
        if rate == self.rate:
            return self
        view = _view(self)
        view.rate = rate
        stages, flags = (*view.encoder.stages, *view.decoder.stages), (*steady, *by_decoder(steady))
        for stage, keeps in zip(stages, flags, strict=True):
            for module in stage.children():
                if isinstance(module, Downsample | Upsample):
                    module.keeps_frames = keeps
        return view

    def encode_moments(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance [B, C, F, h, w] of the latents, not normalised.

        `video` is [B, 3, T, H, W] in [-1, 1], T = 1 mod strides.t, H and W multiples of strides.hw.

        Raises:
            InputError: the clip's size or length doesn't match the strides.
        """
        B, _, T, H, W = video.shape
        latent_shape(T, H, W, self.strides, self.config.latent_channels, batch=B)
        mean, logvar = self._encode(video, None).chunk(2, dim=1)
        return mean, logvar

    def decode_raw(self, latents: Tensor) -> Tensor:
        """Decode latents [B, C, F, h, w], not normalised, to video [B, 3, T, H, W], not clamped."""
        return self._decode(latents, None)

    def encode(self, video: Tensor) -> Tensor:
        """Return the posterior's mode, normalised, [B, C, F, h, w]; see `encode_moments`."""
        return self.normalize(self.encode_moments(video)[0])

    def decode(self, latents: Tensor) -> Tensor:
        """Decode normalised latents [B, C, F, h, w] to video [B, 3, T, H, W], not clamped."""
        return self.decode_raw(self.denormalize(latents))

    def _encode(self, video: Tensor, cache: StreamCache | None) -> Tensor:
        x = patchify_pixels(video, self.config.patch_size)
        return self.encoder(channels_last(x), cache)

    def _decode(self, latents: Tensor, cache: StreamCache | None) -> Tensor:
        patches = self.decoder(channels_last(latents), cache)
        return unpatchify_pixels(patches, self.config.patch_size)

    @torch.no_grad()
    def stream_encode(
        self, frames: Iterable[Tensor], cache: StreamCache | None = None
    ) -> Iterator[Tensor]:
        """Yield the normalised latent frames [B, C, 1, h, w] of a clip, in constant memory.

        Args:
            frames: chunks [B, 3, t, H, W] in [-1, 1] of any lengths t.
            cache: continues an earlier stream, and is updated; None: start a new clip.

        Raises:
            InputError: the last frames don't fill a latent frame.
        """
        cache = StreamCache() if cache is None else cache
        for chunk in self.groups(frames, cache.position):
            moments = self._encode(chunk, cache)
            cache.position += 1
            yield self.normalize(moments.chunk(2, dim=1)[0])

    def groups(self, frames: Iterable[Tensor], position: int = 0) -> Iterator[Tensor]:
        """Regroup chunks of frames by latent frame; yield [B, 3, n, H, W] for each.

        `position` is the number of earlier latent frames. See `stream_encode` for errors.
        """
        held: list[Tensor] = []
        each = self.strides.t
        for chunk in frames:
            held.extend(chunk.unbind(2))
            while len(held) >= (need := each if position else 1):
                group = torch.stack(held[:need], 2)
                del held[:need]
                position += 1
                yield group
        if held:
            raise InputError(f"{len(held)} frames are left over at the end: a clip needs 1 frame "
                             f"plus a multiple of {each}")

    @torch.no_grad()
    def stream_decode(
        self, latents: Tensor | Iterable[Tensor], cache: StreamCache | None = None
    ) -> Iterator[Tensor]:
        """Yield the video [B, 3, t, H, W] of each latent frame, not clamped, in constant memory.

        The first latent frame gives one frame, each later one `strides.t`.

        Args:
            latents: normalised, [B, C, F, h, w], as a whole or in pieces.
            cache: continues an earlier stream, and is updated; None: start a new clip.
        """
        cache = StreamCache() if cache is None else cache
        for piece in (latents,) if isinstance(latents, Tensor) else latents:
            for frame in piece.split(1, dim=2):
                video = self._decode(self.denormalize(frame), cache)
                cache.position += 1
                yield video

    def receptive_frames(self) -> int:
        """Return the number of latent frames on which one's pixels depend, including itself.

        Trace a frame far from the clip's start back through the decoder to the earliest latent
        frame that it depends on; the result is the largest over all frames of a latent frame.
        """
        t, far = self.strides.t, 10_000
        earliest = min(self._earliest_latent(far * t - phase) for phase in range(t))
        return far - earliest + 1

    def _earliest_latent(self, frame: int) -> int:
        inside = {m.time_conv for m in self.decoder.modules() if isinstance(m, Upsample)}
        for module in reversed([*self.decoder.modules()]):
            if isinstance(module, Upsample) and module.time_conv is not None:
                frame = frame if module.keeps_frames else 1 + (frame - 1) // 2
                frame -= module.time_conv.num_history
            elif isinstance(module, CausalConv3d) and module not in inside:
                frame -= module.num_history
        return frame
