"""Contact sheets: many pictures on one, with a label under each."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vidgen.core.runtime import atomic_write
from vidgen.media.types import Frames

_GAP, _LABEL = 4, 14


def contact_sheet(
    frames: Sequence[Frames], path: str | Path, *, columns: int, labels: Sequence[str] = ()
) -> Path:
    """Write pictures in rows as a PNG.

    Args:
        frames: uint8 [H, W, 3] each, of any size.
        path: the PNG, replaced if it exists.
        columns: pictures in a row.
        labels: a line under each picture; fewer than pictures, or none, is fine. Over empty ones
            behind it in its row a label goes on.

    Returns:
        The path written.
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
            text, behind = labels[index], labels[index + 1 : (index // columns + 1) * columns]
            empty = next((n for n, each in enumerate(behind) if each), len(behind))
            while text and draw.textlength(text, font) > width + empty * step_x:
                text = text[:-1]
            draw.text((x, y + height), text, "black", font)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    atomic_write(path, buffer.getvalue())
    return Path(path)
