"""Labelled grids of clips and contact sheets of pictures."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vidgen.core.runtime import atomic_write
from vidgen.media.read import fit
from vidgen.media.types import ClipInfo, Frames
from vidgen.media.video_reader import VideoReader

MAX_SIDE = 3840
"""Largest total side of the clips in pixels, near the limit of H.264's common levels."""
_GAP, _LABEL, _MAX_LABEL = 4, 14, 200


@dataclass(frozen=True)
class Grid:
    """A grid of labelled clips of any sizes, frame rates and lengths, `columns` per row.

    A shorter clip holds its last frame; a label that is too wide is cut.
    """

    paths: Sequence[Path]
    labels: Sequence[str]
    columns: int

    @cached_property
    def info(self) -> ClipInfo:
        """Description of the grid: even size, highest frame rate and longest duration."""
        fps = max(fps for fps, _, _ in self._facts)
        seconds = max(seconds for _, _, seconds in self._facts)
        height, width = self._layout[0].shape[:2]
        return ClipInfo(fps, (width, height), max(1, round(seconds * fps)))

    def frames(self) -> Iterator[Frames]:
        """Yield the grid's frames, uint8 [1, H, W, 3] each."""
        background, corners, (width, height) = self._layout
        shown = [self._resampled(path, width, height) for path in self.paths]
        for pictures in zip(*shown, strict=True):
            sheet = background.copy()
            for (x, y), picture in zip(corners, pictures, strict=True):
                sheet[y : y + height, x : x + width] = picture
            yield sheet[None]

    def still(self) -> Frames:
        """Return the grid's middle frame, uint8 [H, W, 3]."""
        middle = self.info.num_frames // 2
        return next(frame[0] for index, frame in enumerate(self.frames()) if index == middle)

    @cached_property
    def _facts(self) -> list[tuple[Fraction, tuple[int, int], Fraction]]:
        """Frame rate, (width, height) and duration in seconds of each clip."""
        facts = []
        for path in self.paths:
            with VideoReader(path) as reader:
                facts.append((reader.fps, reader.size, sum(1 for _ in reader) / reader.fps))
        return facts

    @cached_property
    def _layout(self) -> tuple[Frames, list[tuple[int, int]], tuple[int, int]]:
        """Background with labels, corner (x, y) of each clip on it, (width, height) of a clip."""
        rows = math.ceil(len(self.paths) / self.columns)
        width, height = (max(size[side] for _, size, _ in self._facts) for side in (0, 1))
        scale = min(1.0, MAX_SIDE / (self.columns * width), MAX_SIDE / (rows * height))
        width, height = max(16, int(width * scale)), max(16, int(height * scale))
        label = max(_LABEL, height // 16)
        font, corners = ImageFont.load_default(label - 3), []
        longest = max(math.ceil(font.getlength(text)) for text in self.labels)
        across = max(width, min(longest, _MAX_LABEL)) + _GAP  # labels may be wider than a clip
        down = height + label + _GAP
        wide, high = _GAP + self.columns * across, _GAP + rows * down
        sheet = Image.new("RGB", (wide + wide % 2, high + high % 2), "white")
        draw = ImageDraw.Draw(sheet)
        for index, text in enumerate(self.labels):
            x, y = _GAP + index % self.columns * across, _GAP + index // self.columns * down
            length = len(text)
            while font.getlength(text[:length]) > across - _GAP:
                length -= 1
            draw.text((x, y), text[:length], "black", font)
            corners.append((x, y + label))
        return np.array(sheet), corners, (width, height)

    def _resampled(self, path: Path, width: int, height: int) -> Iterator[Frames]:
        info, wanted, picture = self.info, 0, None
        with VideoReader(path) as reader:
            for shown, frame in enumerate(reader):
                picture = fit(frame, height, width, "pad", border=255)
                while wanted < info.num_frames and wanted * reader.fps / info.fps < shown + 1:
                    yield picture
                    wanted += 1
        for _ in range(wanted, info.num_frames):
            assert picture is not None
            yield picture


def contact_sheet(
    frames: Sequence[Frames], path: str | Path, *, columns: int, labels: Sequence[str] = ()
) -> Path:
    """Write pictures uint8 [H, W, 3] of any size in rows to a PNG; return its path.

    `labels` are drawn under the first pictures, one line each. A label may extend over empty ones
    that follow it in its row.
    """
    width = max(frame.shape[1] for frame in frames)
    height = max(frame.shape[0] for frame in frames)
    step_x, step_y = width + _GAP, height + _GAP + (_LABEL if labels else 0)
    rows = math.ceil(len(frames) / columns)
    sheet = Image.new("RGB", (columns * step_x + _GAP, rows * step_y + _GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_LABEL - 3)
    for index, frame in enumerate(frames):
        x, y = _GAP + index % columns * step_x, _GAP + index // columns * step_y
        sheet.paste(Image.fromarray(frame), (x, y))
        if index < len(labels):
            text, after = labels[index], labels[index + 1 : (index // columns + 1) * columns]
            empty = next((n for n, each in enumerate(after) if each), len(after))
            while text and draw.textlength(text, font) > width + empty * step_x:
                text = text[:-1]
            draw.text((x, y + height), text, "black", font)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    atomic_write(path, buffer.getvalue())
    return Path(path)
