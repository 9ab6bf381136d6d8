"""Building blocks of the causal video VAE: residual blocks, attention, resampling, stages.

Axes: B batch, C channels, T frames, H rows, W columns. Every `forward(x, cache)` maps
[B, C, T, H, W]; without a cache x is a whole clip, with one it is the next chunk of a stream.
Activations stay channels-last in memory, so that frames fold into the batch without copies.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vidgen.ops.attention import attention
from vidgen.ops.conv import (
    CausalConv3d,
    StreamCache,
    clip_of,
    convolve,
    convolve_frames,
    frames_of,
    split_first,
)
from vidgen.ops.norm import ChannelRMSNorm


class ResidualBlock(nn.Module):
    """Two causal 3x3x3 convolutions, each after RMSNorm and SiLU, and a shortcut."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = ChannelRMSNorm(in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels, (3, 3, 3))
        self.norm2 = ChannelRMSNorm(out_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels, (3, 3, 3))
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = CausalConv3d(in_channels, out_channels, (1, 1, 1))

    def forward(self, x: Tensor, cache: StreamCache | None = None) -> Tensor:
        """Map [B, C_in, T, H, W] to [B, C_out, T, H, W]."""
        y = self.conv1.after_norm(self.norm1, x, cache)
        y = self.conv2.after_norm(self.norm2, y, cache)
        return y + self.shortcut(x)


class FrameAttention(nn.Module):
    """Single-head self-attention over the pixels of each frame, with a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelRMSNorm(channels, num_axes=2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, T, H, W] to the same shape."""
        frames = frames_of(x)
        tokens = self.norm(frames).flatten(2).transpose(1, 2)
        qkv = F.linear(tokens, self.to_qkv.weight.flatten(1), self.to_qkv.bias).unsqueeze(1)
        y = attention(*qkv.chunk(3, dim=-1)).squeeze(1)
        y = F.linear(y, self.proj.weight.flatten(1), self.proj.bias).transpose(1, 2)
        return x + clip_of(y.reshape(frames.shape), x.shape[0])


class MidBlock(nn.Module):
    """Residual block, attention within each frame, residual block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block1 = ResidualBlock(channels, channels)
        self.attention = FrameAttention(channels)
        self.block2 = ResidualBlock(channels, channels)

    def forward(self, x: Tensor, cache: StreamCache | None = None) -> Tensor:
        """Map [B, C, T, H, W] to the same shape."""
        return self.block2(self.attention(self.block1(x, cache)), cache)


class Downsample(nn.Module):
    """Convolutions that halve rows and columns and, if `temporal`, frames.

    The clip's first frame is kept separately: 1 + 2k frames become 1 + k. With `keeps_frames` the
    number of frames stays, and the mean of two neighbours replaces the frame between them.
    """

    cache_key: str = ""
    keeps_frames: bool = False

    def __init__(self, channels: int, *, temporal: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)
        self.time_conv: nn.Conv3d | None = None
        if temporal:
            self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1))

    def forward(self, x: Tensor, cache: StreamCache | None = None) -> Tensor:
        """Map [B, C, T, H, W] to [B, C, T', H / 2, W / 2]."""
        padded = F.pad(frames_of(x), (0, 1, 0, 1))
        x = clip_of(convolve_frames(padded, self.conv.weight, self.conv.bias, stride=2), x.shape[0])
        if self.time_conv is None:
            return x
        before = None if cache is None else cache.tensors.get(self.cache_key)
        if cache is not None:
            cache.tensors[self.cache_key] = x[:, :, -1:].clone()
        if before is not None:
            return self._halve_frames(torch.cat([before, x], 2))
        if x.shape[2] == 1:
            return x
        return torch.cat([split_first(x)[0], self._halve_frames(x)], 2)

    def _halve_frames(self, x: Tensor) -> Tensor:
        assert self.time_conv is not None
        return convolve(self.time_conv, _with_middles(x) if self.keeps_frames else x)


def _with_middles(x: Tensor) -> Tensor:
    """Insert the mean of two neighbours between them, from 1 + k frames to 1 + 2k."""
    first, rest = split_first(x)
    frames = x.permute(0, 2, 3, 4, 1)
    middles = (frames[:, :-1] + frames[:, 1:]) / 2
    pairs = torch.stack([middles, rest.permute(0, 2, 3, 4, 1)], dim=2)  # [B, k, 2, H, W, C]
    return torch.cat([first, pairs.flatten(1, 2).permute(0, 4, 1, 2, 3)], 2)


class Upsample(nn.Module):
    """Double frames if `temporal`, then rows and columns (nearest, then a 3x3 convolution).

    The clip's first frame is kept separately: 1 + k frames become 1 + 2k. With `keeps_frames` the
    number of frames stays, and only the later one of each pair is computed.
    """

    keeps_frames: bool = False

    def __init__(self, in_channels: int, out_channels: int, *, temporal: bool) -> None:
        super().__init__()
        self.time_conv = CausalConv3d(in_channels, 2 * in_channels, (3, 1, 1)) if temporal else None
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor, cache: StreamCache | None = None) -> Tensor:
        """Map [B, C_in, T, H, W] to [B, C_out, T', 2H, 2W]."""
        if self.time_conv is not None:
            first = cache is None or cache.position == 0
            if not first:
                x = self._double_frames(x, cache)
            elif x.shape[2] > 1:
                alone, rest = split_first(x)
                x = torch.cat([alone, self._double_frames(rest, cache)], 2)
        return clip_of(self._double_pixels(frames_of(x)), x.shape[0])

    def _double_frames(self, x: Tensor, cache: StreamCache | None) -> Tensor:
        """Map each frame to two, one from each half of the channels of `time_conv`."""
        assert self.time_conv is not None
        y = self.time_conv(x, cache).permute(0, 2, 3, 4, 1)
        if self.keeps_frames:
            return y.chunk(2, dim=-1)[1].permute(0, 4, 1, 2, 3)
        pairs = torch.stack(y.chunk(2, dim=-1), dim=2)  # [B, T, 2, H, W, C]
        return pairs.flatten(1, 2).permute(0, 4, 1, 2, 3)

    def _double_pixels(self, x: Tensor) -> Tensor:
        """Upsample and convolve in one pass: [N, C, H, W] to [N, C_out, 2H, 2W].

        A 3x3 kernel on pixels repeated 2x2 reads only 2x2 different ones, so each of the four
        output phases is a 2x2 convolution of the small image with summed taps: 16 products
        instead of 36, and no enlarged image in memory. All four run as one convolution.
        """
        weight = _fold(_fold(self.conv.weight))  # [row phase, column phase, O, C, 2, 2]
        bias = None if self.conv.bias is None else self.conv.bias.repeat(4)
        y = convolve_frames(x, weight.flatten(0, 2), bias, padding=1).permute(0, 2, 3, 1)
        a, b, c, d = y.chunk(4, dim=-1)
        even = torch.stack([a[:, :-1, :-1], b[:, :-1, 1:]], dim=3)
        odd = torch.stack([c[:, 1:, :-1], d[:, 1:, 1:]], dim=3)
        return torch.stack([even, odd], dim=2).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


def _fold(weight: Tensor) -> Tensor:
    """Sum axis 3's three taps on repeated pixels to two on the pixels, for each phase (axis 0)."""
    a, b, c = weight.unbind(3)
    return torch.stack([torch.stack([a, b + c], 3), torch.stack([a + b, c], 3)])


class MeanDown(nn.Module):
    """Shortcut around a downsampling stage: space-time to depth, then means of channel groups."""

    def __init__(self, in_channels: int, out_channels: int, factor_t: int, factor_hw: int) -> None:
        super().__init__()
        self.out_channels, self.factor_t, self.factor_hw = out_channels, factor_t, factor_hw
        assert in_channels * factor_t * factor_hw**2 % out_channels == 0

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C_in, T, H, W] to [B, C_out, T', H / factor_hw, W / factor_hw]."""
        t, s = self.factor_t, self.factor_hw
        x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % t, 0))
        x = rearrange(x, "B C (T t) (H s) (W r) -> B (C t s r) T H W", t=t, s=s, r=s)
        mean: Tensor = x.unflatten(1, (self.out_channels, -1)).mean(2)
        return mean


class RepeatUp(nn.Module):
    """Shortcut around an upsampling stage: repeated channels, then depth to space-time."""

    def __init__(self, in_channels: int, out_channels: int, factor_t: int, factor_hw: int) -> None:
        super().__init__()
        self.out_channels, self.factor_t, self.factor_hw = out_channels, factor_t, factor_hw
        self.repeats = out_channels * factor_t * factor_hw**2 // in_channels

    def forward(self, x: Tensor, *, first: bool) -> Tensor:
        """Map [B, C_in, T, H, W] to [B, C_out, T', H * factor_hw, W * factor_hw].

        With `first`, x starts the clip, whose first frame gives one frame only.
        """
        t, s = self.factor_t, self.factor_hw
        x = x.repeat_interleave(self.repeats, dim=1)
        x = rearrange(x, "B (C t s r) T H W -> B C (T t) (H s) (W r)", t=t, s=s, r=s)
        return x[:, :, t - 1 :] if first else x


class DownStage(nn.Module):
    """Residual blocks, then downsampling: "spatial", "spacetime" or None.

    With `shortcut` a parameter-free shortcut goes around the stage (Wan 2.2).
    """

    def __init__(
        self, in_channels: int, out_channels: int, num_blocks: int, resample: str | None, *,
        shortcut: bool,
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.blocks = nn.ModuleList(map(ResidualBlock, widths[:-1], widths[1:]))
        temporal = resample == "spacetime"
        self.downsample = Downsample(out_channels, temporal=temporal) if resample else None
        self.shortcut: MeanDown | None = None
        if shortcut:
            self.shortcut = MeanDown(in_channels, out_channels, 1 + temporal, 2 if resample else 1)

    def forward(self, x: Tensor, cache: StreamCache | None = None) -> Tensor:
        """Map [B, C_in, T, H, W] to [B, C_out, T', H', W']."""
        y = x
        for block in self.blocks:
            y = block(y, cache)
        if self.downsample is not None:
            y = self.downsample(y, cache)
        return y if self.shortcut is None else y + self.shortcut(x)


class UpStage(nn.Module):
    """Residual blocks, then upsampling: "spatial", "spacetime" or None.

    Upsampling halves the width (Wan 2.1). With `shortcut` it keeps the width, and a parameter-free
    shortcut goes around the stage (Wan 2.2).
    """

    def __init__(
        self, in_channels: int, out_channels: int, num_blocks: int, resample: str | None, *,
        shortcut: bool,
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.blocks = nn.ModuleList(map(ResidualBlock, widths[:-1], widths[1:]))
        temporal = resample == "spacetime"
        self.upsample: Upsample | None = None
        self.shortcut: RepeatUp | None = None
        if resample:
            width = out_channels if shortcut else out_channels // 2
            self.upsample = Upsample(out_channels, width, temporal=temporal)
            if shortcut:
                self.shortcut = RepeatUp(in_channels, out_channels, 1 + temporal, 2)

    def forward(self, x: Tensor, cache: StreamCache | None = None) -> Tensor:
        """Map [B, C_in, T, H, W] to [B, C_out', T', H', W']."""
        y = x
        for block in self.blocks:
            y = block(y, cache)
        if self.upsample is not None:
            y = self.upsample(y, cache)
        if self.shortcut is not None:
            y = y + self.shortcut(x, first=cache is None or cache.position == 0)
        return y
