"""Convolutions that are causal in time, with a cache for streams, and plain ones.

Axes: B batch, C channels, T frames, H rows, W columns, N frames of clips that follow each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidgen.ops import native
from vidgen.ops.norm import ChannelRMSNorm

LONG_SUM = 256
"""Number of products above which summing them in one float32 chain has too large an error."""


@dataclass
class StreamCache:
    """State of a causal network between two chunks of one stream, of constant size.

    Attributes:
        tensors: last input frames of each module, by module name.
        position: number of latent frames processed so far.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    position: int = 0

    def copy(self) -> StreamCache:
        """Return an independent cache; tensors are never written in place, so they are shared."""
        return StreamCache(dict(self.tensors), self.position)


def frames_of(x: Tensor) -> Tensor:
    """Map [B, C, T, H, W] to [B * T, C, H, W]; a view where x lies channels-last."""
    frames = x.transpose(1, 2).flatten(0, 1)
    return channels_last(frames) if plain_inference(x) else frames


def clip_of(frames: Tensor, batch: int) -> Tensor:
    """Map [B * T, C, H, W] to a view [B, C, T, H, W]; undoes `frames_of`."""
    clip: Tensor = frames.unflatten(0, (batch, -1))
    return clip.transpose(1, 2)


def split_first(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return views of the first frame and the other frames of x [B, C, T, H, W].

    Split on the channels-last axes, since autograd pads the gradient in the layout of the split.
    """
    first, rest = x.permute(0, 2, 3, 4, 1).split([1, x.shape[2] - 1], dim=1)
    return first.permute(0, 4, 1, 2, 3), rest.permute(0, 4, 1, 2, 3)


def channels_last(x: Tensor) -> Tensor:
    """Return x [B, C, ...] channels-last in memory, with the strides of that layout.

    PyTorch infers the layout from strides, even from those of axes of size 1; a convolution that
    infers another one copies its input and returns that layout.
    """
    x = x.movedim(1, -1).contiguous()
    strides = [1]
    for size in reversed(x.shape[1:]):
        strides.insert(0, strides[0] * size)
    return x.as_strided(x.shape, strides).movedim(-1, 1)


@lru_cache(maxsize=1)
def _dtypes() -> tuple[torch.dtype, ...]:
    """Return the dtypes that oneDNN convolves here; bfloat16 takes a CPU that supports it."""
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.float32, torch.bfloat16
    return (torch.float32,)


def plain_inference(x: Tensor) -> bool:
    """Return whether x is in an inference pass on the CPU, where the layout can be chosen."""
    return (
        x.device.type == "cpu"
        and x.dtype in _dtypes()
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
    )


def convolve(layer: nn.Conv3d, x: Tensor) -> Tensor:
    """Return `layer(x)`, by oneDNN where possible.

    `F.conv3d` doesn't use it for one small clip in float32, and takes four to ten times as long.
    """
    assert not isinstance(layer.padding, str), layer.padding
    if plain_inference(x):
        return infer(x, layer.weight, layer.bias, layer.stride, layer.padding)
    if layer.kernel_size[0] == 1:  # oneDNN's gradient of one frame alone breaks memory with AMX
        weight, padding = layer.weight[:, :, 0], layer.padding[1:]
        y = F.conv2d(frames_of(x), weight, layer.bias, layer.stride[1:], padding)
        return clip_of(y, x.shape[0])
    return F.conv3d(x, layer.weight, layer.bias, layer.stride, layer.padding)


def convolve_frames(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, stride: int = 1, padding: int = 0
) -> Tensor:
    """Return `F.conv2d` of frames [N, C, H, W], by oneDNN where possible."""
    if not plain_inference(x):
        return F.conv2d(x, weight, bias, stride, padding)
    return infer(x, weight, bias, (stride, stride), (padding, padding))


def infer(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """Convolve channels-last, where `plain_inference` holds.

    With channels last oneDNN adds up all products of an output in one chain, whose float32 error is
    2.7 times that of sums of short chains, as in our kernel and in oneDNN's other layout. (bfloat16
    rounds its inputs by far more than either.)
    """
    if x.dtype == torch.float32 and weight[0].numel() > LONG_SUM:
        if (made := _by_kernel(x, weight, bias, stride, padding)) is not None:
            return made
        x, weight = x.contiguous(), weight.contiguous()
    else:
        x = channels_last(x)
    ones = (1,) * len(stride)
    return channels_last(torch.mkldnn_convolution(x, weight, bias, padding, stride, ones, 1))


def _by_kernel(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int]
) -> Tensor | None:
    """Convolve x [B, C, T, H, W] or [B, C, H, W] by our own kernel; None where it can't."""
    num_taps, frames = weight[0, 0].numel(), x.dim() == 4
    if num_taps > native.MAX_TAPS or not (frames or padding[0] == 0) or native.kernels(x) is None:
        return None
    sizes = [
        (size + 2 * pad - taps) // step + 1
        for size, taps, step, pad in zip(
            x.shape[2:], weight.shape[2:], stride, padding, strict=True
        )
    ]
    x, weight, once = channels_last(x), weight.contiguous(), (1,) * frames
    out = x.new_empty(len(x), *sizes, len(weight)).movedim(-1, 1)
    scratch = x.new_empty(num_taps * (x.shape[1] + 1) * -(-len(weight) // 64) * 64)
    shape = (
        len(x), *once, *x.shape[2:], x.shape[1], *once, *sizes, len(weight),
        *once, *weight.shape[2:], *once, *stride, *padding[-2:],
    )
    native.call("convolve", x.dtype, x, weight, bias, out, scratch, shape)
    return out


class CausalConv3d(nn.Conv3d):
    """Convolution that is causal in time: output frame t depends on input frames up to t.

    `kernel_size` is (frames, rows, columns), odd. Zeros precede the first frame; rows and columns
    are padded to keep their size.
    """

    cache_key: str = ""
    padding: tuple[int, ...]

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: tuple[int, int, int]
    ) -> None:
        _, rows, columns = kernel_size
        super().__init__(
            in_channels, out_channels, kernel_size, padding=(0, rows // 2, columns // 2)
        )

    @property
    def num_history(self) -> int:
        """Frames before the current one that an output frame sees."""
        return self.kernel_size[0] - 1

    def forward(self, x: Tensor, cache: StreamCache | None = None) -> Tensor:
        """Convolve x [B, C, T, H, W]; with a cache, x follows the frames of earlier calls."""
        if not self.num_history:
            return convolve(self, x)
        before = None if cache is None else cache.tensors.get(self.cache_key)
        if cache is not None:
            cache.tensors[self.cache_key] = self._history(x, before)
        if before is None and x.shape[2] == 1:
            return self._single(x)
        if before is None:
            return convolve(self, F.pad(x, (0, 0, 0, 0, self.num_history, 0)))
        return convolve(self, torch.cat([before, x], 2))

    def after_norm(
        self, norm: ChannelRMSNorm, x: Tensor, cache: StreamCache | None = None
    ) -> Tensor:
        """Return `self(norm.silu(x), cache)`, without a copy of the normed frames."""
        before = None if cache is None else cache.tensors.get(self.cache_key)
        alone = before is None and x.shape[2] == 1
        if alone or not self.num_history or not norm.can_write(x):
            made: Tensor = self(norm.silu(x), cache)
            return made
        B, C, T, H, W = x.shape
        whole = x.new_empty(B, self.num_history + T, H, W, C).permute(0, 4, 1, 2, 3)
        if before is None:
            whole[:, :, : self.num_history].zero_()
        else:
            whole[:, :, : self.num_history].copy_(before)
        norm.write_silu(x, whole[:, :, self.num_history :])
        if cache is not None:
            cache.tensors[self.cache_key] = whole[:, :, -self.num_history :].clone()
        return convolve(self, whole)

    def _single(self, x: Tensor) -> Tensor:
        """Convolve a clip's first frame alone: earlier temporal taps would multiply zeros."""
        taps = self.weight[:, :, -1]
        y = convolve_frames(frames_of(x), taps, self.bias, padding=self.padding[1])
        return clip_of(y, y.shape[0])

    def _history(self, x: Tensor, before: Tensor | None) -> Tensor:
        """Return the last `num_history` input frames; a copy where a view would hold a chunk."""
        if x.shape[2] >= self.num_history:
            return x[:, :, -self.num_history :].clone()
        if before is None:
            return F.pad(x, (0, 0, 0, 0, self.num_history - x.shape[2], 0))
        return torch.cat([before[:, :, x.shape[2] :], x], 2)


def conv_block(dim: int, out: int, stride: int = 1) -> nn.Sequential:
    """Return a 3x3 convolution, batch norm and ReLU."""
    layers = nn.Conv2d(dim, out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()
    return nn.Sequential(*layers)


class Residual(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016, Fig. 2)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.first = conv_block(dim, dim)
        self.second = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, dim, H, W] to the same shape."""
        return F.relu(x + self.norm(self.second(self.first(x))))
