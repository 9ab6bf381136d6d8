"""Convolutions that are causal in time, and the cache that lets them run in a stream.

Axes: B batch, C channels, T frames, H rows, W columns.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class StreamCache:
    """What a causal network remembers between two chunks of one stream; its size is constant.

    Plain tensors under stable names, so a cache can be kept, copied or saved, and the stream goes
    on from `position` later.

    Attributes:
        tensors: module name -> the last frames of that module's input.
        position: latent frames done so far.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    position: int = 0

    def copy(self) -> StreamCache:
        """A cache that goes its own way; tensors are never written in place, so they are shared."""
        return StreamCache(dict(self.tensors), self.position)


def frames_of(x: Tensor) -> Tensor:
    """[B, C, T, H, W] -> [B * T, C, H, W]; a view where x lies channels-last."""
    return x.transpose(1, 2).flatten(0, 1)


def clip_of(frames: Tensor, batch: int) -> Tensor:
    """[B * T, C, H, W] -> [B, C, T, H, W], the inverse of `frames_of`; always a view."""
    return frames.unflatten(0, (batch, -1)).transpose(1, 2)


def split_first(x: Tensor) -> tuple[Tensor, Tensor]:
    """First frame and other frames of x [B, C, T, H, W], views.

    Cut on the channels-last axes, since autograd fills what is cut off in the layout it was cut in.
    """
    first, rest = x.permute(0, 2, 3, 4, 1).split([1, x.shape[2] - 1], dim=1)
    return first.permute(0, 4, 1, 2, 3), rest.permute(0, 4, 1, 2, 3)


def _takes_slow_path(x: Tensor) -> bool:
    """Whether `F.conv3d` would pass oneDNN by, as it does for one small clip in float32.

    Its own loop takes four to ten times as long there, and returns another memory layout.
    """
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.shape[0] == 1
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
    )


class CausalConv3d(nn.Conv3d):
    """Convolution whose output frame t sees input frames up to t: zeros stand before the first.

    Args:
        in_channels: C of the input.
        out_channels: C of the output.
        kernel_size: (frames, rows, columns), odd; rows and columns are padded to keep their size.
    """

    cache_key: str = ""

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
            return super().forward(x)
        before = None if cache is None else cache.tensors.get(self.cache_key)
        if cache is not None:
            cache.tensors[self.cache_key] = self._history(x, before)
        if before is None and x.shape[2] == 1:
            return self._single(x)
        if before is None:
            x = F.pad(x, (0, 0, 0, 0, self.num_history, 0))
        else:
            x = torch.cat([before, x], 2)
        if _takes_slow_path(x):
            ones = (1, 1, 1)
            return torch.mkldnn_convolution(
                x, self.weight, self.bias, self.padding, self.stride, ones, 1
            )
        return super().forward(x)

    def _single(self, x: Tensor) -> Tensor:
        """One frame after nothing: all but the last temporal tap would multiply zeros."""
        y = F.conv2d(x.squeeze(2), self.weight[:, :, -1], self.bias, padding=self.padding[1:])
        return y.unsqueeze(2)

    def _history(self, x: Tensor, before: Tensor | None) -> Tensor:
        """The last `num_history` input frames; a copy where a view would keep a chunk alive."""
        if x.shape[2] >= self.num_history:
            return x[:, :, -self.num_history :].clone()
        if before is None:
            return F.pad(x, (0, 0, 0, 0, self.num_history - x.shape[2], 0))
        return torch.cat([before[:, :, x.shape[2] :], x], 2)

    @torch.no_grad()
    def forget_history(self) -> None:
        """Zero the taps on earlier frames: each output frame then depends on its own frame only."""
        self.weight[:, :, :-1] = 0
