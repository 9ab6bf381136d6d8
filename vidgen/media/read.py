"""Reading of picture files; unsupported ones are refused.

Axes: H W rows and columns.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from vidgen.core.errors import InputError
from vidgen.media.types import Frames

if TYPE_CHECKING:
    from vidgen.core.values import Fit, Picture

MIN_SIDE = 16
MAX_PIXELS = 64_000_000
PICTURE_SUFFIXES = (".gif", ".webp", ".apng", ".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")


@contextmanager
def decoding(what: str, remedy: str, problem: str = "is damaged") -> Iterator[None]:
    """Convert errors of Pillow and libav on damaged bytes to InputError."""
    try:
        yield
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise InputError(
            f"{what} is not a picture in a known format; give PNG, JPEG or WebP"
        ) from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{what} has more than {MAX_PIXELS} pixels; scale it down") from error
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise InputError(f"{what} {problem}: {reason[:200]}; {remedy}") from error


def load_image(picture: Picture) -> tuple[Frames, list[str]]:
    """Return a picture, given as a file or uint8 [H, W, 3], in its displayed orientation.

    Returns:
        uint8 [H, W, 3] sRGB, and a note for each conversion: orientation, transparency, CMYK, 16
        bits, an animation's other frames.

    Raises:
        InputError: missing, a folder, damaged, not a picture, too small or too large.
    """
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise InputError(
                f"picture is {picture.dtype} {list(picture.shape)}; give uint8 [H, W, 3]"
            )
        _check_size("picture", (picture.shape[1], picture.shape[0]))
        return picture, []
    with _opened(picture) as image:
        is_deep = any("16" in _raw_mode(tile) for tile in image.tile)
        image.load()
        return _as_rgb(image, is_deep)


def is_clip(path: str | os.PathLike[str]) -> bool:
    """Return whether a file is a film or an animation of several frames, without decoding it."""
    if Path(path).suffix.lower() not in PICTURE_SUFFIXES:
        return True
    with _opened(path) as image:
        return getattr(image, "n_frames", 1) > 1


def check_image(path: str | os.PathLike[str]) -> None:
    """Raise InputError if a file's header shows that it can't be a first frame."""
    with _opened(path):
        pass


@contextmanager
def _opened(picture: str | os.PathLike[str]) -> Iterator[ImageFile.ImageFile]:
    """Open a picture's file and check the size in its header, without decoding."""
    path = existing_file(picture, "image")
    with decoding(f"image {path}", "save it again"), Image.open(path) as image:
        _check_size(f"image {path}", image.size)
        yield image


def _raw_mode(tile: Any) -> str:
    """Return the sample format of a part of a file, such as "RGB;16B"."""
    arguments = tile[3]
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)


def existing_file(path: str | os.PathLike[str], what: str) -> Path:
    """Return a file that can be read.

    Raises:
        InputError: missing, a folder, or not readable; the message begins with `what`.
    """
    found = Path(path)
    if not found.exists():
        if "://" in os.fspath(path):
            raise InputError(f"{what} {path} is a URL; download it and give the file")
        raise InputError(f"{what} {found} does not exist")
    if found.is_dir():
        raise InputError(f"{what} {found} is a folder; give a file")
    if not os.access(found, os.R_OK):
        raise InputError(f"{what} {found} can't be read: permission denied")
    return found


def _check_size(what: str, size: tuple[int, int]) -> None:
    width, height = size
    if min(size) < MIN_SIDE:
        raise InputError(
            f"{what} is {width}x{height}; each side must have at least {MIN_SIDE} pixels"
        )
    check_area(what, size)


def check_area(what: str, size: tuple[int, int]) -> None:
    """Raise InputError for a size of more than `MAX_PIXELS`."""
    width, height = size
    if width * height > MAX_PIXELS:
        raise InputError(f"{what} is {width}x{height}; scale it to {MAX_PIXELS} pixels at most")


def _as_rgb(image: Image.Image, is_deep: bool) -> tuple[Frames, list[str]]:
    notes = []
    if getattr(image, "n_frames", 1) > 1:
        notes.append(f"only the first of {getattr(image, 'n_frames', 0)} frames is used")
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        notes.append("rotated by its EXIF orientation")
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        image, is_deep = _of_eight_bits(image, is_deep)
    if is_deep:
        notes.append("16 bits per channel reduced to 8")
    if image.mode == "CMYK":
        notes.append("CMYK converted to RGB without a colour profile")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        if layer.getchannel("A").getextrema() != (255, 255):
            notes.append("transparent parts composited over white")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return np.array(image.convert("RGB")), notes


def _of_eight_bits(image: Image.Image, is_deep: bool) -> tuple[Image.Image, bool]:
    """Return a picture of large values in 8 bits, and whether they had 16; Pillow would clip."""
    values = np.asarray(image, dtype=np.float64)
    low, high = float(values.min()), float(values.max())
    if image.mode == "F" or not 0 <= low <= high <= 65535:
        raise InputError(f"its values range from {low:g} to {high:g}, so white is unknown; save it "
                         "with 8 or 16 bits per channel")
    is_deep = is_deep or image.mode != "I" or image.format == "PNG" or high > 255
    values *= 255 / 65535 if is_deep else 1
    return Image.fromarray(values.round().astype(np.uint8)), is_deep


def fit(
    picture: Frames, height: int, width: int, mode: Fit = "crop", border: int = 0
) -> Frames:
    """Resize a picture uint8 [H, W, 3] without stretching, by Lanczos resampling.

    "crop" fills the size and keeps the middle; "pad" keeps all, within a `border` of a grey value,
    0 to 255. A picture of this size is returned as is.
    """
    if picture.shape[:2] == (height, width):
        return picture
    image, size = Image.fromarray(picture), (width, height)
    if mode == "crop":
        image = ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    else:
        image = ImageOps.pad(image, size, Image.Resampling.LANCZOS, color=(border,) * 3)
    return np.array(image)


def pictures_in(folder: str | os.PathLike[str]) -> list[Path]:
    """Return the PNGs of a folder, sorted by name; raise InputError if it has none."""
    found = sorted(Path(folder).glob("*.png"))
    if not found:
        raise InputError(f"folder {folder} holds no PNGs; give a file, or a folder of pictures")
    return found
