"""The still pictures of a clip that is there: a thumbnail, and a sheet of frames in rows."""

from __future__ import annotations

import io
import math
from pathlib import Path

from PIL import Image

from vidgen.core.runtime import atomic_write
from vidgen.media.video_reader import VideoReader

THUMBNAIL_SIDE, SPRITE_SIDE = 512, 160
SPRITES, COLUMNS = 16, 4


def write_stills(
    video: Path, thumbnail: Path, sheet: Path | None, num_frames: int
) -> None:
    """Write the frame at a third of a clip as WebP and up to 16 frames in rows as JPEG.

    Args:
        video: the clip; one frame of it is in memory at a time.
        thumbnail: where the one goes.
        sheet: where the rows go; None: nowhere.
        num_frames: of the clip.
    """
    count = min(SPRITES, num_frames)
    wanted = {round(index * (num_frames - 1) / max(count - 1, 1)): index for index in range(count)}
    columns = min(COLUMNS, count)
    canvas: Image.Image | None = None
    with VideoReader(video) as reader:
        for number, frame in enumerate(reader):
            if number == num_frames // 3:
                atomic_write(thumbnail, _encoded(Image.fromarray(frame), "WEBP", THUMBNAIL_SIDE))
            if sheet is None and number >= num_frames // 3:
                return
            if sheet is not None and number in wanted:
                small = _scaled(Image.fromarray(frame), SPRITE_SIDE)
                width, height = small.size
                if canvas is None:
                    rows = math.ceil(count / columns)
                    canvas = Image.new("RGB", (columns * width, rows * height))
                index = wanted[number]
                canvas.paste(small, (index % columns * width, index // columns * height))
    if sheet is not None and canvas is not None:
        atomic_write(sheet, _encoded(canvas, "JPEG", max(canvas.size)))


def _scaled(picture: Image.Image, side: int) -> Image.Image:
    """A picture whose longer side is at most this."""
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return picture


def _encoded(picture: Image.Image, kind: str, side: int) -> bytes:
    file = io.BytesIO()
    _scaled(picture, side).save(file, kind, quality=85)
    return file.getvalue()
