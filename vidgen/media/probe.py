"""Metadata of media files: streams, tags, and vidgen's recipe."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from PIL import ExifTags, Image

from vidgen.core.errors import InputError
from vidgen.media.read import PICTURE_SUFFIXES, decoding, existing_file
from vidgen.media.stills import RECIPE_FILE, RECIPE_KEY
from vidgen.media.video_reader import VideoReader

# H.273's code points, by their usual names; 2 is unspecified.
_PRIMARIES = {1: "bt709", 5: "bt470bg", 6: "smpte170m", 9: "bt2020", 12: "display-p3"}
_TRANSFERS = {1: "bt709", 4: "gamma22", 5: "gamma28", 6: "smpte170m", 8: "linear", 13: "srgb",
              14: "bt2020-10", 15: "bt2020-12", 16: "pq", 18: "hlg"}
_MATRICES = {0: "rgb", 1: "bt709", 5: "bt470bg", 6: "smpte170m", 9: "bt2020nc", 10: "bt2020c"}


def probe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return a media file's format, size, duration, bit rate, streams and tags as JSON data.

    Raises:
        InputError: missing, or not a media file.
    """
    found = existing_file(path, "file")
    facts: dict[str, Any] = {"path": str(found), "bytes": found.stat().st_size}
    if found.suffix.lower() in PICTURE_SUFFIXES:
        with VideoReader(found) as reader, Image.open(found) as image:
            count, kind = getattr(image, "n_frames", 1), str(image.format).lower()
            stream: dict[str, Any] = {"type": "picture", "codec": kind}
            stream |= {"width": reader.size[0], "height": reader.size[1]}
            if count > 1:
                stream |= {"fps": str(reader.fps), "num_frames": count}
                facts["duration_s"] = float(count / reader.fps)
        return facts | {"format": kind, "streams": [stream]}
    with open_container(found) as container:
        if container.duration is not None:
            facts["duration_s"] = container.duration / av.time_base
        if container.bit_rate:
            facts["bits_per_s"] = container.bit_rate
        tags = {k: v for k, v in container.metadata.items() if k.lower() != RECIPE_KEY}
        streams = [_describe(stream) for stream in container.streams]
        return facts | {"format": container.format.name, "streams": streams, "metadata": tags}


@contextmanager
def open_container(
    path: Path, what: str = "", remedy: str = "give a video or sound file",
    problem: str = "is not a media file",
) -> Iterator[av.container.InputContainer]:
    """Open a media file with libav, with tags of any encoding; raise errors as `decoding` does."""
    with (decoding(what or str(path), remedy, problem),
          av.open(str(path), metadata_errors="replace") as container):
        yield container


def _describe(stream: Any) -> dict[str, Any]:
    context = stream.codec_context
    facts = {"type": stream.type, "codec": context.name if context else None}
    if stream.type == "video":
        facts |= {"width": context.width, "height": context.height, "pix_fmt": context.pix_fmt}
        facts |= {"fps": str(stream.average_rate), "num_frames": stream.frames or None}
        is_rgb = str(context.pix_fmt).startswith(("rgb", "bgr", "gbr"))
        facts |= {"primaries": _PRIMARIES.get(int(context.color_primaries)),
                  "transfer": _TRANSFERS.get(int(context.color_trc)),
                  "matrix": "rgb" if is_rgb else _MATRICES.get(int(context.colorspace)),
                  "range": {1: "limited", 2: "full"}.get(int(context.color_range))}
    elif stream.type == "audio":
        facts |= {"rate": stream.rate, "channels": stream.channels, "layout": stream.layout.name}
    return facts


def read_recipe(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Return the recipe that vidgen wrote into a file or a folder of pictures, or None.

    Raises:
        InputError: missing, not a media file, or a recipe that is not JSON.
    """
    if Path(path).is_dir():
        file = Path(path, RECIPE_FILE)
        text = file.read_text("utf-8", "replace") if file.is_file() else None
    else:
        found = existing_file(path, "file")
        text = _picture_recipe(found)
        if not text:
            with open_container(found) as container:  # Matroska's tags come back in capitals
                text = {k.lower(): v for k, v in container.metadata.items()}.get(RECIPE_KEY)
    try:
        recipe = None if text is None else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the recipe in {path} is damaged: {error}") from None
    return recipe if isinstance(recipe, dict) else None


def _picture_recipe(path: Path) -> str | None:
    try:
        with Image.open(path) as image:
            if image.format == "PNG":
                return image.info.get(RECIPE_KEY)
            if image.format == "WEBP":
                text = image.getexif().get(ExifTags.Base.ImageDescription, "")
            elif image.format == "JPEG":
                parts = [data for name, data in getattr(image, "applist", ()) if name == "COM"]
                text = b"".join(parts).decode()
            else:
                text = image.info.get("comment", b"").decode()
    except Exception:  # not a picture, which is no error here; Pillow raises anything
        return None
    # other programs write comments, too
    return text if isinstance(text, str) and text.startswith("{") else None


def recipe_rate(recipe: Mapping[str, Any] | None) -> Fraction | None:
    """Return the frame rate in a recipe; None if it has no valid one."""
    plan = (recipe or {}).get("plan")
    try:
        rate = Fraction(plan["fps"])  # type: ignore[index]
    except (KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError):
        return None
    return rate if rate > 0 else None
