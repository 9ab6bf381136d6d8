"""Comparison of a film's last frame with the one in its recipe.

Programs that cut, mirror or colour a film often keep its metadata, with latents that no longer
match the picture.
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np

from vidgen.media.cells import Array, Looker
from vidgen.media.probe import read_recipe
from vidgen.media.read import existing_file
from vidgen.media.video_reader import VideoReader

ENDING = "ending"
"""Key in the recipe of the last frame's cells, in base64."""
LIMIT = 8.0
"""Difference of the last frame's cells from the recipe's, as a root mean square in levels. In
24 renders other encoders change it by 3 to 5 (H.264 at CRF 35, VP9 at 50), at worst by 7 (MPEG-4);
a mirrored frame differs by 9 or more, a hue turned by 20 degrees by 10, another moment by 20."""


@dataclass(frozen=True)
class Ending:
    """Description of a film and its last frame.

    Attributes:
        fps: exact average rate.
        size: (width, height) as shown.
        num_frames: number of frames at a constant frame rate.
        is_plain: whether the frame rate is constant and pixels are square.
        recipe: read-only, or None.
        cells: [y, x, 3] mean colours of the last frame, by `Looker`.
    """

    fps: Fraction
    size: tuple[int, int]
    num_frames: int
    is_plain: bool
    recipe: Mapping[str, Any] | None
    cells: Array

    def frames_at(self, fps: Fraction) -> int:
        """Return the number of frames after conversion to a frame rate by `video_frames`."""
        return max(1, round(self.num_frames * fps / self.fps))

    @property
    def matches_recipe(self) -> bool:
        """Whether the last frame matches the recipe's; True if the recipe has none."""
        return self.recipe is None or ending_distance(self.recipe, self.cells) <= LIMIT


def ending_distance(recipe: Mapping[str, Any], cells: Array) -> float:
    """Return the root mean square distance of last frame's cells from a recipe's, in levels.

    It is 0 if the recipe has none, 255 if its entry is damaged or of another shape.
    """
    known = recipe.get(ENDING)
    if known is None:
        return 0.0
    try:
        levels = np.frombuffer(base64.b64decode(known, validate=True), np.uint8)
    except (binascii.Error, TypeError, ValueError):
        return 255.0
    if levels.size != cells.size:
        return 255.0
    return float(np.sqrt(np.square(levels.reshape(cells.shape) - cells).mean()))


def ending_text(cells: Array) -> str:
    """Return the last frame's cells [y, x, 3], 0 to 255, in base64 for a recipe."""
    return base64.b64encode(cells.round().clip(0, 255).astype(np.uint8).tobytes()).decode()


def read_ending(path: str | os.PathLike[str]) -> Ending:
    """Return the end of a film, animation or picture; decode it once, until the file changes.

    Raises:
        InputError: missing, no video, or damaged.
    """
    stat = existing_file(path, "video").stat()
    return _read(os.fspath(path), stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=8)
def _read(path: str, _time_ns: int, _size: int) -> Ending:
    with VideoReader(path) as reader:
        num_frames, last = reader.ending()
        cells = Looker(*last.shape[:2]).look(last).color
        return Ending(reader.fps, reader.size, num_frames, reader.is_plain, read_recipe(path),
                      cells)
