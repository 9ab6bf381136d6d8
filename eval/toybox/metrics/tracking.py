"""Where a clip's sprite is and what it looks like, frame by frame, by the judge's FrameNet alone.

What a generated clip does is told from pictures one by one, so that a path is judged apart from the
judge's own opinion on motion.

Axes: B clips, T frames, K sprites, h w cells of `CELL` pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from eval.toybox.judge import SEEN, Judge, to_frame_size
from train.toybox.world.motion import Camera, Clock, camera_track, frame_sides
from train.toybox.world.scenes import Scene

Array = NDArray[np.float64]

_BLUR = 3  # cells around the surest place by which the sprite is found
_REACH = 3  # cells that a sprite reaches to either side of it at most
_FRAMES = 64  # looked at together


@dataclass(frozen=True)
class Sighting:
    """One clip's sprite.

    Attributes:
        seen: [T] bool, whether any sprite is seen.
        x: [T] of its middle, in shares of the frame's width, from the left.
        y: [T] likewise of the height, from the top.
        extent: [T] square root of the area it covers, in shares of the frame's.
        names: [T, K] how likely it is each sprite; rows sum to 1.
    """

    seen: NDArray[np.bool_]
    x: Array
    y: Array
    extent: Array
    names: Array


@torch.no_grad()
def sightings(judge: Judge, video: Tensor) -> list[Sighting]:
    """Find the sprite in every frame of clips [B, 3, T, H, W] in [-1, 1]; of two the surer one."""
    return [_sighting(judge, clip) for clip in video.unbind(0)]


def asked_camera(
    scene: Scene, num_frames: int, height: int, width: int, fps: float
) -> tuple[Camera, tuple[float, float]]:
    """The camera that a scene asks for, [T] each, and the frame's sides in world units."""
    clock, sides = Clock(num_frames, fps), frame_sides(height, width)
    moments = clock.progress(np.arange(num_frames, dtype=np.float64))
    return camera_track(scene, sides, moments), sides


def _sighting(judge: Judge, clip: Tensor) -> Sighting:
    frames = to_frame_size(clip.transpose(0, 1).float().clamp(-1, 1))
    looks = [judge.frames(part) for part in frames.split(_FRAMES)]
    cells = torch.cat([look.cells for look in looks]).double().cpu().softmax(1)
    sprites = torch.cat([look.sprites for look in looks]).double().cpu()
    here = 1 - cells[:, -1]  # [T, h, w]
    x, y, area = _middles(here)
    high, wide = here.shape[1:]
    return Sighting(
        (sprites.amax(1).sigmoid() >= SEEN).numpy(), (x / wide).numpy(), (y / high).numpy(),
        (area / (high * wide)).sqrt().numpy(), sprites.softmax(1).numpy(),
    )


def _middles(here: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Middle (x, y) in cells and area in cells of what is seen around each frame's surest place."""
    high, wide = here.shape[1:]
    blurred = F.avg_pool2d(here[:, None], _BLUR, 1, _BLUR // 2)[:, 0]
    best = blurred.flatten(1).argmax(1)
    rows, columns = torch.arange(high), torch.arange(wide)
    near_y = (rows - (best // wide)[:, None]).abs() <= _REACH
    near_x = (columns - (best % wide)[:, None]).abs() <= _REACH
    weights = here * near_y[:, :, None] * near_x[:, None]
    area = weights.sum((1, 2)).clamp(min=1e-9)
    x = (weights.sum(1) * (columns + 0.5)).sum(1) / area
    y = (weights.sum(2) * (rows + 0.5)).sum(1) / area
    return x, y, area


