"""Clips of a camera that pans over a texture, and who listens while they are measured."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np

from tests.textures import texture
from vidgen.media.types import ClipInfo
from vidgen.media.write import write_clip

FPS = Fraction(12)
SIZE = 64


def pan(seed: int, count: int = 9, size: int = SIZE) -> np.ndarray:
    """[count, size, size, 3], two pixels further each frame."""
    wide = texture(size, size + 2 * count, seed)
    return np.stack([wide[:, 2 * t : 2 * t + size] for t in range(count)])


def save(path: Path, frames: np.ndarray, recipe: dict | None = None, fps: Fraction = FPS) -> None:
    """Write a clip."""
    size = frames.shape[2], frames.shape[1]
    write_clip(path, [frames], ClipInfo(fps, size, len(frames), recipe=recipe))


def quiet(event: dict) -> None:
    """Takes what a run tells: notes and progress."""
    assert event["event"] in ("note", "progress")
