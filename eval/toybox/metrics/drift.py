"""What chaining windows does to a picture: drift of its looks, flicker at the joins, its sprite.

Axes: T frames, H W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from eval.toybox.judge import NOTHING, Judge
from train.toybox.world.scenes import Scene

LOOKS = ("brightness", "contrast", "saturation", "sharpness")
LUMA = (0.2126, 0.7152, 0.0722)  # ITU-R BT.709, eq. 3.2


@dataclass(frozen=True)
class Windows:
    """How a clip is chained.

    Attributes:
        size: latent frames of a window.
        overlap: of them that a window shares with the one before.
        count: windows.
        stride_t: frames of a latent frame, but for the first.
    """

    size: int
    overlap: int
    count: int
    stride_t: int

    @property
    def length(self) -> int:
        """Frames of the first window."""
        return 1 + (self.size - 1) * self.stride_t

    @property
    def num_frames(self) -> int:
        """Frames of the whole clip."""
        return self.length + (self.count - 1) * self._step

    @property
    def joins(self) -> list[int]:
        """Frames before which a new window's first frame stands."""
        return [self.length + k * self._step for k in range(self.count - 1)]

    @property
    def _step(self) -> int:
        return (self.size - self.overlap) * self.stride_t


def looks(video: Tensor) -> dict[str, Tensor]:
    """`LOOKS` of each frame [T] of a video [1, 3, T, H, W] in [-1, 1], in units of the range."""
    colours = (video[0] + 1) / 2
    luma = (colours * colours.new_tensor(LUMA).view(3, 1, 1, 1)).sum(0)
    inner = luma[:, 1:-1, 1:-1]
    around = luma[:, 2:, 1:-1] + luma[:, :-2, 1:-1] + luma[:, 1:-1, 2:] + luma[:, 1:-1, :-2]
    values = (
        luma.mean((1, 2)), luma.std((1, 2)),
        (colours.amax(0) - colours.amin(0)).mean((1, 2)), (inner - around / 4).abs().mean((1, 2)),
    )  # fmt: skip
    return dict(zip(LOOKS, values, strict=True))


def measure_drift(
    video: Tensor, windows: Windows, scene: Scene, judge: Judge
) -> dict[str, Any]:
    """How the last window of a clip [1, 3, T, H, W] in [-1, 1] differs from its first.

    Returns:
        Of `LOOKS` the mean of the last window less that of the first, in units of the range;
        `joins`, the mean change over a join by that over other latent frames' beginnings; `same`,
        whether the judge names the same sprite in both; `right`, whether the last window shows the
        scene's sprites.
    """
    length, step = windows.length, windows.stride_t
    figures: dict[str, Any] = {
        name: float(values[-length:].mean() - values[:length].mean())
        for name, values in looks(video).items()
    }
    change = (video[0, :, 1:] - video[0, :, :-1]).abs().mean((0, 2, 3)) / 2
    joins = [frame - 1 for frame in windows.joins]
    others = [i for i in range(length - 1, len(change)) if i % step == 0 and i not in joins]
    figures["joins"] = float(change[joins].mean() / change[others].mean().clamp(min=1e-4))
    device = next(judge.parameters()).device
    ends = video[:, :, :length], video[:, :, -length:]
    first, last = (judge.verdicts(part.to(device))[0] for part in ends)
    figures["same"] = first.sprite == last.sprite != NOTHING
    figures["right"] = last.shows([actor.sprite for actor in scene.actors])
    return figures
