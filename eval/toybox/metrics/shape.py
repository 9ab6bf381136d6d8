"""Whether a sprite has its own shape: its drawing, laid over a clip's frames where it fits best.

A judge that was taught on renders also names what has no more than a sprite's colours and
texture; people don't. Here the drawing itself is the ruler: how it correlates with what is shown,
at its best place and size, in front of whatever surrounds it there. Nothing is learned.

Axes: T looks, H W pixel rows and columns, h w those of a drawing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from train.toybox.world.cast import SPRITE_NAMES
from train.toybox.world.render import render
from train.toybox.world.scenes import Scene

SCALES = (0.71, 0.8, 0.89, 1.0, 1.12, 1.26, 1.41)
LOOKS = 4
"""Frames of a clip that are looked at, evenly apart; the better half of them counts."""
ANGLES = 4
"""Drawings of what turns, evenly apart in time."""
TURNING = ("spins", "swings")
_RING = 2  # pixels around a drawing that count, too: without them a patch has any outline
_LEAST = 16  # pixels of a drawing
_FLAT = 1e-3  # squared deviation of what shows nothing
_STRANGER = 23  # places further down the list of sprites


class Drawing(NamedTuple):
    """A sprite as a scene shows it: colours [3, h, w] in [-1, 1] times alpha, alpha [h, w]."""

    color: Tensor
    alpha: Tensor


def drawings_of(scene: Scene, num_frames: int, height: int, width: int) -> list[Drawing]:
    """The scene's sprite as it is drawn: where most of it is seen, of what turns several times.

    Empty where the scene never shows enough of it.
    """
    shown = render([scene], num_frames, height, width)
    masks = shown.masks[0, 0]
    areas = masks.sum((1, 2))
    if scene.actors[0].motion in TURNING:
        moments = torch.linspace(0, num_frames - 1, ANGLES).round().long().tolist()
    else:
        moments = [int(areas.argmax())]
    found = []
    for moment in moments:
        alpha = masks[moment]
        rows, columns = torch.nonzero(alpha > 0.5, as_tuple=True)
        if len(rows) < _LEAST:
            continue
        box = (slice(max(0, int(rows.min()) - _RING), int(rows.max()) + _RING + 1),
               slice(max(0, int(columns.min()) - _RING), int(columns.max()) + _RING + 1))
        found.append(Drawing((shown.video[0, :, moment] * alpha)[:, *box], alpha[box]))
    return found


def stranger(scene: Scene) -> Scene:
    """The same scene of another sprite: what chance makes of the ruler."""
    (actor,) = scene.actors
    first = SPRITE_NAMES.index(actor.sprite) if actor.sprite in SPRITE_NAMES else 0
    return scene.recast(SPRITE_NAMES[(first + _STRANGER) % len(SPRITE_NAMES)])


def shape_fit(video: Tensor, drawings: Sequence[Drawing]) -> float | None:
    """How well the best of a sprite's drawings fits what a clip shows.

    Args:
        video: a clip [3, T, H, W] in [-1, 1].
        drawings: at least one, of the clip's size or smaller.

    Returns:
        Correlation over pixels and colours, at most 1: the mean of the better half of `LOOKS`
        frames. None without drawings.
    """
    if not drawings:
        return None
    moments = ((torch.arange(LOOKS) + 0.5) * video.shape[1] / LOOKS).long()
    looks = _Looks(video[:, moments].transpose(0, 1).float())
    best = torch.stack([
        looks.fit(_resized(drawing, scale)) for drawing in drawings for scale in SCALES
        if max(drawing.alpha.shape[0] / video.shape[2],
               drawing.alpha.shape[1] / video.shape[3]) * scale <= 1
    ]).amax(0)
    return float(best.topk(LOOKS // 2).values.mean())


def _resized(drawing: Drawing, scale: float) -> Drawing:
    both = torch.cat([drawing.color, drawing.alpha[None]])[None]
    size = [max(1, int(side * scale)) for side in drawing.alpha.shape]
    both = F.interpolate(both, size, mode="bilinear", antialias=True, align_corners=False)[0]
    return Drawing(both[:3], both[3])


class _Looks:
    """Frames [T, 3, H, W] that drawings are laid over."""

    def __init__(self, frames: Tensor) -> None:
        self.size = frames.shape[2:]
        squares = frames.square().sum(1, keepdim=True)
        self.spectra = torch.fft.rfft2(torch.cat([frames, squares], dim=1))

    def fit(self, drawing: Drawing) -> Tensor:
        """Correlation of a drawing with each frame at its best place, [T].

        The drawing stands in front of what surrounds it at each place: what its ring shows there,
        on average.
        """
        color, alpha = drawing
        weight = F.max_pool2d(alpha[None, None], 2 * _RING + 1, 1, _RING)[0, 0]
        ring = weight * (1 - alpha)
        total, around = weight.sum(), ring.sum().clamp(min=1e-3)
        in_front = self._slide(weight * color, self.spectra[:, :3]).sum(1)
        ground = self._slide(ring, self.spectra[:, :3]) / around  # [T, 3, rows, columns]
        seen = self._slide(weight, self.spectra)
        flat = (weight * color).sum((1, 2)).view(3, 1, 1) + around * ground
        together = in_front + (around * ground.square() - seen[:, :3] * flat / total).sum(1)
        own = (weight * color.square()).sum() + (
            2 * (ring * color).sum((1, 2)).view(3, 1, 1) * ground
            + (ring * (1 - alpha)).sum() * ground.square() - flat.square() / total
        ).sum(1)
        theirs = seen[:, 3] - seen[:, :3].square().sum(1) / total
        least = _FLAT * total
        return (together / (own.clamp(min=least) * theirs.clamp(min=least)).sqrt()).amax((1, 2))

    def _slide(self, kernel: Tensor, spectra: Tensor) -> Tensor:
        """Sums of frames times a kernel [h, w] or [3, h, w], wherever it lies within them."""
        spectrum = torch.fft.rfft2(kernel, s=self.size)
        sums: Tensor = torch.fft.irfft2(spectra * spectrum.conj(), s=self.size)
        rows, columns = (whole - own + 1 for whole, own
                         in zip(self.size, kernel.shape[-2:], strict=True))
        return sums[..., :rows, :columns]
