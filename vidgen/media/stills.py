"""Output formats written by Pillow: animations without sound, single pictures, a folder of PNGs."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import PIL
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from vidgen.core.runtime import atomic_path
from vidgen.media.manifest import seal
from vidgen.media.provenance import gif_xmp, marks_of, xmp
from vidgen.media.types import ClipInfo, Frames

STILL_SUFFIXES = (".gif", ".webp", ".apng", ".png", ".jpg", ".jpeg", "/")
RECIPE_KEY = "vidgen"
RECIPE_FILE = "recipe.json"
_COM, _APP1 = b"\xff\xfe", b"\xff\xe1"  # JPEG's markers of comments and of XMP
_SEGMENT_MAX = 65_533
_WEBP = {"quality": 90, "method": 4}
_JPEG = {"quality": 95, "subsampling": 0}
_CODECS: dict[str, tuple[str, dict[str, int]]] = {
    ".gif": ("gif", {"colors": 256}), ".webp": ("webp", _WEBP), ".jpg": ("jpeg", _JPEG),
    ".jpeg": ("jpeg", _JPEG),
}


def still_encoder(suffix: str, quality: int | None = None) -> dict[str, Any]:
    """Return the encoder of a suffix, with a quality of 1 to 100 if it has one."""
    codec, options = _CODECS.get(suffix, ("png", {}))
    if quality is not None and "quality" in options:
        options = options | {"quality": quality}
    return {"codec": codec, "options": options, "pillow": PIL.__version__}


def write_stills(
    path: Path, suffix: str, info: ClipInfo, frames: Iterator[Frames],
    recipe: Callable[[], str | None], options: Mapping[str, int],
) -> None:
    """Write frames uint8 [H, W, 3] as an animation, picture or folder of pictures, atomically.

    The frame rate is kept on average if the format counts in 1/100 s. `recipe` returns text for the
    metadata, after the last frame; `options` are those of `still_encoder`.
    """
    pictures = map(Image.fromarray, frames)
    marks = "" if info.recipe is None else xmp(marks_of(info.recipe))
    if suffix == "/":
        with atomic_path(path) as folder:
            folder.mkdir()
            for index, picture in enumerate(pictures):
                picture.save(folder / f"{index:05d}.png", pnginfo=_png_text(None, marks))
            text = recipe()
            if text is not None:
                (folder / RECIPE_FILE).write_text(text)
        return
    with atomic_path(path) as temporary:
        if suffix in (".jpg", ".jpeg"):
            picture = next(pictures)
            temporary.write_bytes(_jpeg(picture, options, recipe() or "", marks))
        else:
            temporary.write_bytes(_animation(pictures, suffix, options, info, recipe, marks))
        if info.recipe is not None:
            seal(temporary, suffix, info.recipe)


def _png_text(recipe: str | None, marks: str) -> PngInfo:
    text = PngInfo()
    if recipe is not None:
        text.add_itxt(RECIPE_KEY, recipe)
    if marks:
        text.add_itxt("XML:com.adobe.xmp", marks)
    return text


def _animation(
    pictures: Iterator[Image.Image], suffix: str, options: Mapping[str, int], info: ClipInfo,
    recipe: Callable[[], str | None], marks: str,
) -> bytes:
    saved: dict[str, Any] = {}
    if suffix == ".gif":
        pictures = (picture.quantize(options["colors"]) for picture in pictures)
    first, *others = pictures  # in memory, since Pillow iterates twice
    text = recipe()
    unit = 10 if suffix == ".gif" else 1  # milliseconds a format can count in
    ends = [round(i * 1000 / info.fps / unit) * unit for i in range(info.num_frames + 1)]
    if info.num_frames > 1:
        durations = [late - early for early, late in pairwise(ends)]
        saved = {"save_all": True, "duration": durations, "loop": 0, "append_images": others}
    if suffix == ".gif":
        saved |= {"comment": text.encode()} if text else {}
    elif suffix == ".webp":
        exif = Image.Exif()
        if text is not None:
            exif[ExifTags.Base.ImageDescription] = text
        saved |= {**options, "exif": exif, "xmp": marks.encode()}
    else:
        saved["pnginfo"] = _png_text(text, marks)
    buffer = io.BytesIO()
    kind = {".gif": "GIF", ".webp": "WEBP"}.get(suffix, "PNG")
    first.save(buffer, kind, **saved)
    data = buffer.getvalue()
    return data[:-1] + gif_xmp(marks) + data[-1:] if suffix == ".gif" and marks else data


def _jpeg(picture: Image.Image, options: Mapping[str, int], recipe: str, marks: str) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", **options)
    data, text = buffer.getvalue(), recipe.encode()
    parts = [(_COM, text[i : i + _SEGMENT_MAX]) for i in range(0, len(text), _SEGMENT_MAX)]
    if marks:
        parts.insert(0, (_APP1, b"http://ns.adobe.com/xap/1.0/\0" + marks.encode()))
    heads = b"".join(mark + (len(part) + 2).to_bytes(2, "big") + part for mark, part in parts)
    return data[:2] + heads + data[2:]
