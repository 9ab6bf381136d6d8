"""A visible label burnt into frames: white text on a dark plate.

GB 45438-2025 requires it on the opening of a clip for 2 seconds at least, in letters of 5% of the
short side at least; the font is the one that comes with Pillow.

Axes: t frames, H W rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from fractions import Fraction

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vidgen.media.types import Frames

TEXTS = ("AI generated", "AI")
"""The label, and its short form for narrow pictures."""
SECONDS = 2
_SHARE = 0.055  # of the short side, a little over 5% against rounding
_LEAST = 8  # pixels; smaller capitals can't be read
_DARK, _LIGHT = 16.0, 255.0
_COVER = 0.8  # opacity of the plate: contrast stays over 9:1 even on white


def labelled(
    chunks: Iterable[Frames], size: tuple[int, int], fps: Fraction, *, start: int = 0
) -> Iterator[Frames]:
    """Yield chunks uint8 [t, H, W, 3] with a label burnt into the first 2 seconds, as copies.

    Chunks after the label's end pass unchanged. `start` is the index of the first frame.
    """
    end = label_end(fps)
    patch = _draw(size) if start < end else None
    for chunk in chunks:
        count = min(max(end - start, 0), len(chunk))
        start += len(chunk)
        if count and patch is not None:
            frames = np.array(chunk)
            _blend(frames[:count], patch, size)
            yield frames
        else:
            yield chunk


def label_end(fps: Fraction) -> int:
    """Return the number of frames that show the label."""
    return math.ceil(SECONDS * fps)


def letter_height(size: tuple[int, int]) -> int:
    """Return the least height of a label's capitals in a picture of (width, height), in pixels."""
    return max(math.ceil(_SHARE * min(size)), _LEAST)


def _blend(frames: Frames, patch: tuple[np.ndarray, np.ndarray], size: tuple[int, int]) -> None:
    """Lay a patch over the lower right corner, in place."""
    cover, light = patch
    height, width = cover.shape
    margin = min(size) // 40
    top, left = size[1] - height - margin, size[0] - width - margin
    place = frames[:, max(top, 0) : top + height, max(left, 0) : left + width]
    mixed = place * (1 - cover[..., None]) + light[..., None]
    place[:] = mixed.round().astype(np.uint8)


def _draw(size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return float [h, w] each: the opacity of a plate with text, and its premultiplied luma."""
    font = _font(letter_height(size))
    text = next((text for text in TEXTS if _plate(font, text)[0] <= size[0]), TEXTS[-1])
    width, height = _plate(font, text)
    image = Image.new("L", (width, height))
    left, top, right, bottom = font.getbbox(text)
    place = ((width - right - left) / 2, (height - bottom - top) / 2)
    ImageDraw.Draw(image).text(place, text, fill=255, font=font)
    ink = np.asarray(image, np.float64) / 255
    cover = ink + (1 - ink) * _COVER
    light = ink * _LIGHT + (1 - ink) * _COVER * _DARK
    corner = (slice(None, size[1]), slice(None, size[0]))
    return cover[corner], light[corner]


def _plate(font: ImageFont.FreeTypeFont, text: str) -> tuple[int, int]:
    """Return (width, height) of a text with half a capital's height around it."""
    left, top, right, bottom = font.getbbox(text)
    border = _capital(font) // 2 * 2
    return math.ceil(right - left) + border, math.ceil(bottom - top) + border


def _capital(font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> int:
    _, top, _, bottom = font.getbbox("A")
    return math.floor(bottom - top)


def _font(height: int) -> ImageFont.FreeTypeFont:
    """Return Pillow's own font, with capitals of at least a height in pixels."""
    fonts = map(ImageFont.load_default, range(height, 4 * height))
    font = next(font for font in fonts if _capital(font) >= height)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    return font
