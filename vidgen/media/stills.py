"""Formats that Pillow writes: animations without sound, single pictures, a folder of PNGs."""

from __future__ import annotations

import io
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from vidgen.core.runtime import atomic_path, atomic_write
from vidgen.media.encode import Frames

STILL_SUFFIXES = (".gif", ".webp", ".apng", ".png", ".jpg", ".jpeg", "/")
RECIPE_KEY = "vidgen"
RECIPE_FILE = "recipe.json"
_COM = b"\xff\xfe"  # JPEG's comment marker
_COM_MAX = 65_533


def write_stills(
    path: Path, suffix: str, fps: Fraction, num_frames: int, recipe: str | None,
    chunks: Iterator[Frames],
) -> None:
    """Write an animation, a picture or a folder of pictures, atomically.

    Args:
        path: where to.
        suffix: one of `STILL_SUFFIXES`.
        fps: rate of an animation, kept on average where the format counts in 1/100 s.
        num_frames: how many frames will come.
        recipe: text for the metadata.
        chunks: uint8 [t, H, W, 3] each.
    """
    pictures = (Image.fromarray(frame) for chunk in chunks for frame in chunk)
    if suffix == "/":
        with atomic_path(path) as folder:
            folder.mkdir()
            for index, picture in enumerate(pictures):
                picture.save(folder / f"{index:05d}.png")
            if recipe is not None:
                (folder / RECIPE_FILE).write_text(recipe)
        return
    if suffix in (".jpg", ".jpeg"):
        atomic_write(path, _jpeg(next(pictures), recipe or ""))
    else:
        atomic_write(path, _animation(pictures, suffix, fps, num_frames, recipe))


def _animation(
    pictures: Iterator[Image.Image], suffix: str, fps: Fraction, num_frames: int, recipe: str | None
) -> bytes:
    options: dict[str, Any] = {}
    unit = 10 if suffix == ".gif" else 1  # milliseconds a format can count in
    ends = [round(i * 1000 / fps / unit) * unit for i in range(num_frames + 1)]
    if num_frames > 1:
        durations = [late - early for early, late in pairwise(ends)]
        options = {"save_all": True, "duration": durations, "loop": 0}
    if suffix == ".gif":
        pictures = (picture.quantize(256) for picture in pictures)
        options |= {"comment": recipe.encode()} if recipe else {}
    elif suffix == ".webp":
        exif = Image.Exif()
        if recipe is not None:
            exif[ExifTags.Base.ImageDescription] = recipe
        options |= {"quality": 90, "method": 4, "exif": exif}
    elif recipe is not None:
        text = PngInfo()
        text.add_itxt(RECIPE_KEY, recipe)
        options["pnginfo"] = text
    first = next(pictures)
    if num_frames > 1:
        options["append_images"] = list(pictures)  # Pillow goes through them twice
    buffer = io.BytesIO()
    kind = {".gif": "GIF", ".webp": "WEBP"}.get(suffix, "PNG")
    first.save(buffer, kind, **options)
    return buffer.getvalue()


def _jpeg(picture: Image.Image, recipe: str) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=95, subsampling=0)
    data, text = buffer.getvalue(), recipe.encode()
    parts = [text[i : i + _COM_MAX] for i in range(0, len(text), _COM_MAX)]
    comments = b"".join(_COM + (len(part) + 2).to_bytes(2, "big") + part for part in parts)
    return data[:2] + comments + data[2:]
