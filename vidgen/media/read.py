"""Pictures, video and recipes out of files, exactly; what can't be honoured is refused.

Axes: H W rows and columns, t frames.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter
from PIL import ExifTags, Image, ImageFile, ImageOps, ImageSequence, UnidentifiedImageError

from vidgen.core.errors import InputError
from vidgen.media.encode import Frames
from vidgen.media.stills import RECIPE_FILE, RECIPE_KEY

if TYPE_CHECKING:
    from vidgen.core.values import Picture

MIN_SIDE = 16
MAX_PIXELS = 64_000_000
PICTURE_SUFFIXES = (".gif", ".webp", ".apng", ".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")

# H.273's code points, by their usual names; 2 is unspecified.
_PRIMARIES = {1: "bt709", 5: "bt470bg", 6: "smpte170m", 9: "bt2020", 12: "display-p3"}
_TRANSFERS = {1: "bt709", 4: "gamma22", 5: "gamma28", 6: "smpte170m", 8: "linear", 13: "srgb",
              14: "bt2020-10", 15: "bt2020-12", 16: "pq", 18: "hlg"}
_MATRICES = {0: "rgb", 1: "bt709", 5: "bt470bg", 6: "smpte170m", 9: "bt2020nc", 10: "bt2020c"}


@contextmanager
def decoding(what: str, remedy: str, problem: str = "is damaged") -> Iterator[None]:
    """Pillow and libav raise whatever damaged bytes lead them to; here it becomes one error."""
    try:
        yield
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise InputError(
            f"{what} is no picture in a known format; give PNG, JPEG or WebP"
        ) from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{what} has more than {MAX_PIXELS} pixels; scale it down") from error
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise InputError(f"{what} {problem}: {reason[:200]}; {remedy}") from error


def load_image(picture: Picture) -> tuple[Frames, list[str]]:
    """Read a picture as people see it.

    Args:
        picture: a file, or uint8 [H, W, 3].

    Returns:
        uint8 [H, W, 3] sRGB, and a note for each thing that had to be interpreted: orientation,
        transparency, CMYK, 16 bits, an animation's other frames.

    Raises:
        InputError: missing, a folder, damaged, no picture, too small or too large.
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
    """Whether a file is a film, or an animation of several frames; told without decoding it."""
    if Path(path).suffix.lower() not in PICTURE_SUFFIXES:
        return True
    with _opened(path) as image:
        return getattr(image, "n_frames", 1) > 1


def check_image(path: str | os.PathLike[str]) -> None:
    """Raise InputError for what by its header can't be a picture to begin with; decodes nothing."""
    with _opened(path):
        pass


@contextmanager
def _opened(picture: str | os.PathLike[str]) -> Iterator[ImageFile.ImageFile]:
    """A picture's file, whose size is judged by its header before anything is decoded."""
    path = existing_file(picture, "image")
    with decoding(f"image {path}", "save it again"), Image.open(path) as image:
        _check_size(f"image {path}", image.size)
        yield image


def _raw_mode(tile: Any) -> str:
    """How samples lie in a part of a file, such as "RGB;16B"; its sizes say nothing of that."""
    arguments = tile[3]
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)


def existing_file(path: str | os.PathLike[str], what: str) -> Path:
    """A file that can be read.

    Raises:
        InputError: missing, a folder, or not permitted; names `what` it is to be.
    """
    found = Path(path)
    if not found.exists():
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
    _check_area(what, size)


def _check_area(what: str, size: tuple[int, int]) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise InputError(f"{what} is {width}x{height}; scale it to {MAX_PIXELS} pixels at most")


def _as_rgb(image: Image.Image, is_deep: bool) -> tuple[Frames, list[str]]:
    notes = []
    if getattr(image, "n_frames", 1) > 1:
        notes.append(f"of {getattr(image, 'n_frames', 0)} frames the first is taken")
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        notes.append("turned as its EXIF orientation says")
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        image, is_deep = _of_eight_bits(image, is_deep)
    if is_deep:
        notes.append("16 bits a channel reduced to 8")
    if image.mode == "CMYK":
        notes.append("CMYK turned into RGB without a colour profile")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        if layer.getchannel("A").getextrema() != (255, 255):
            notes.append("transparent parts laid over white")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return np.array(image.convert("RGB")), notes


def _of_eight_bits(image: Image.Image, is_deep: bool) -> tuple[Image.Image, bool]:
    """A picture of large numbers in 8 bits, and whether they were 16; Pillow would clip at 255."""
    values = np.asarray(image, dtype=np.float64)
    low, high = float(values.min()), float(values.max())
    if image.mode == "F" or not 0 <= low <= high <= 65535:
        raise InputError(f"its values are from {low:g} to {high:g}, of which white can't be told; "
                         "save it with 8 or 16 bits a channel")
    is_deep = is_deep or image.mode != "I" or image.format == "PNG" or high > 255
    values *= 255 / 65535 if is_deep else 1
    return Image.fromarray(values.round().astype(np.uint8)), is_deep


def fit(
    picture: Frames, height: int, width: int, mode: Literal["crop", "pad"] = "crop",
    border: int = 0, centring: tuple[float, float] = (0.5, 0.5),
) -> Frames:
    """Bring a picture to a size without stretching it.

    Args:
        picture: uint8 [H, W, 3].
        height: rows wanted.
        width: columns wanted.
        mode: "crop" fills the size and cuts what sticks out; "pad" keeps all.
        border: grey value, 0 to 255, around what "pad" keeps.
        centring: which part "crop" keeps, from 0 (left, top) to 1 (right, bottom).

    Returns:
        uint8 [height, width, 3], Lanczos resampled; the picture itself if it fits already.
    """
    if picture.shape[:2] == (height, width):
        return picture
    image, size = Image.fromarray(picture), (width, height)
    if mode == "crop":
        image = ImageOps.fit(image, size, Image.Resampling.LANCZOS, centering=centring)
    else:
        image = ImageOps.pad(image, size, Image.Resampling.LANCZOS, color=(border,) * 3)
    return np.array(image)


class VideoReader:
    """A film, animation or picture, frame by frame at constant memory; each iteration starts anew.

    Attributes:
        fps: exact average rate; 25 for a single picture.
        size: (width, height) as shown, after any rotation, in square pixels.
        stated_frames: as many as the file says that it has, or None; one that was cut off has
            fewer, and libav needn't mind.

    Raises:
        InputError: missing, no video, or damaged.
    """

    _square = True  # scale pixels that are wider or higher than that

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = existing_file(path, "video")
        self._what, self._stack = f"video {self.path}", ExitStack()
        with self._stack, decoding(self._what, "give a video file", "can't be read"):
            self._open()
            first = next(self._decode(), None)
            if first is None:
                raise ValueError("no frame in it can be decoded")
            self.size = first.shape[1], first.shape[0]
            self._stack = self._stack.pop_all()  # stays open

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __iter__(self) -> Iterator[Frames]:
        """Frames uint8 [H, W, 3] from the first to the last."""
        width, height = self.size
        with decoding(self._what, "save it again"):
            for frame in self._decode():  # where the size changes midway, the first one stays
                yield fit(frame, height, width, "pad")

    def _open(self) -> None:
        self._image: Image.Image | None = None
        self._aspect = Fraction(1)
        if self.path.suffix.lower() in PICTURE_SUFFIXES:
            self._image = self._stack.enter_context(Image.open(self.path))
            _check_area(self._what, self._image.size)
            self.fps, self.stated_frames = _animation_fps(self._image), None
            return
        self._container = self._stack.enter_context(
            av.open(str(self.path), metadata_errors="replace")
        )
        streams = [stream for stream in self._container.streams.video
                   if not stream.disposition & Disposition.attached_pic]  # a cover is no film
        if not streams:
            raise ValueError("it has no picture")
        if self._container.format.name == "tty":  # libav would draw any text file as pictures
            raise ValueError("it is text")
        stream = self._stream = streams[0]
        coded = stream.codec_context.width, stream.codec_context.height
        self._aspect = Fraction(stream.sample_aspect_ratio or 1)
        _check_area(self._what, _squared(*coded, self._aspect) or coded)
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # for sizes told later
        stream.thread_type = "AUTO"
        self.fps = Fraction(stream.average_rate or stream.guessed_rate or 25)
        self.stated_frames = _stated_frames(self._container, stream, self.fps)

    def _decode(self) -> Iterator[Frames]:
        if self._image is not None:
            for still in ImageSequence.Iterator(self._image):
                yield np.array(still.convert("RGB"))
            return
        reformatter = VideoReformatter()
        self._container.seek(0)
        aspect = self._aspect if self._square else Fraction(1)
        for frame in self._container.decode(self._stream):
            yield to_rgb(frame, reformatter, _squared(frame.width, frame.height, aspect))

    @property
    def is_plain(self) -> bool:
        """Whether its frames are evenly shown, in square pixels."""
        return self._aspect == 1 and self.places is None

    @cached_property
    def places(self) -> list[int] | None:
        """Where frames are shown, in steps of `1 / fps`, if not evenly; None if evenly."""
        with decoding(self._what, "save it again"):
            at = self._times()
        places = [round((time - at[0]) * self.fps) for time in at]
        uneven = any(abs(place - index) > 1 for index, place in enumerate(places))
        return places if uneven else None

    def length(self) -> int:
        """How many frames there are, or would be if they were evenly shown; decodes them all."""
        count = sum(1 for _ in self)
        return count if self.places is None else self.places[-1] + 1

    def _times(self) -> list[Fraction]:
        """Seconds at which frames are shown, in order; empty where the file doesn't tell."""
        if self._image is not None:
            lengths = [Fraction(round(still.info.get("duration", 0)), 1000)
                       for still in ImageSequence.Iterator(self._image)]
            return [sum(lengths[:n], Fraction()) for n in range(len(lengths))]
        self._container.seek(0)
        told = [packet.pts for packet in self._container.demux(self._stream) if packet.size]
        ticks = sorted(pts for pts in told if pts is not None)
        tick_s = Fraction(self._stream.time_base or 1)
        return [pts * tick_s for pts in ticks] if len(ticks) == len(told) else []


def _squared(width: int, height: int, aspect: Fraction) -> tuple[int, int] | None:
    """The size in which pixels of an aspect are square, the longer way; None as it is."""
    if aspect == 1:
        return None
    return (round(width * aspect), height) if aspect > 1 else (width, round(height / aspect))


def _stated_frames(
    container: av.container.InputContainer, stream: Any, fps: Fraction
) -> int | None:
    """How many frames a file says it has: by its own count, or by how long it is."""
    if stream.frames:
        return int(stream.frames)
    if container.duration is None or len(container.streams) > 1:  # sound may be longer
        return None
    return round(container.duration * fps / av.time_base)


def _animation_fps(image: Image.Image) -> Fraction:
    durations = []
    for frame in ImageSequence.Iterator(image):
        frame.load()  # WebP tells a frame's duration only then
        durations.append(frame.info.get("duration", 0))
    total = Fraction(sum(durations)).limit_denominator(1000)
    return len(durations) * 1000 / total if total else Fraction(25)


def to_rgb(
    frame: av.VideoFrame, reformatter: VideoReformatter, size: tuple[int, int] | None = None
) -> Frames:
    """A decoded frame as people see it: uint8 [H, W, 3], turned as its rotation says.

    Args:
        frame: of any pixel format.
        reformatter: kept between frames.
        size: (width, height) before rotation to scale it to, smaller ones by means over areas;
            None: its own.
    """
    exact = Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
    is_yuv = frame.format.name.startswith("yuv")
    # Untagged video of more than 576 lines is BT.709 by convention, smaller BT.601.
    untagged = Colorspace.ITU709 if frame.height > 576 else Colorspace.ITU601
    source = untagged if frame.colorspace in (0, 2) else None
    scaling = None
    if size is not None and size[0] <= frame.width and size[1] <= frame.height:
        scaling = Interpolation.AREA | exact
    elif is_yuv or size is not None:
        scaling = Interpolation.BICUBIC | exact
    width, height = size or (None, None)
    rgb = reformatter.reformat(
        frame,
        width=width,
        height=height,
        format="rgb24",
        src_colorspace=source if is_yuv else None,
        interpolation=scaling,
    ).to_ndarray()
    return np.ascontiguousarray(np.rot90(cast("Frames", rgb), frame.rotation // 90))


def read_frames(path: str | os.PathLike[str]) -> Iterator[Frames]:
    """Frames uint8 [H, W, 3] of a film, an animation, a picture, or a folder of PNGs by name.

    Raises:
        InputError: missing, damaged, or a folder without pictures.
    """
    if Path(path).is_dir():
        for file in pictures_in(path):
            yield load_image(file)[0]
        return
    with VideoReader(path) as reader:
        yield from reader


def told_rate(recipe: Mapping[str, Any] | None) -> Fraction | None:
    """The frame rate that a recipe tells; None where it tells none that a clip can have."""
    plan = (recipe or {}).get("plan")
    try:
        rate = Fraction(plan["fps"])  # type: ignore[index]
    except (KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError):
        return None
    return rate if rate > 0 else None


def pictures_in(folder: str | os.PathLike[str]) -> list[Path]:
    """The PNGs of a folder, sorted by name.

    Raises:
        InputError: there are none.
    """
    found = sorted(Path(folder).glob("*.png"))
    if not found:
        raise InputError(f"folder {folder} holds no PNGs; give a file, or a folder of pictures")
    return found


def probe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a media file holds: format, bytes, duration, bit rate, streams with their colour, tags.

    Raises:
        InputError: missing, or no media file.
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
    problem: str = "is no media file",
) -> Iterator[av.container.InputContainer]:
    """A media file of libav's, whose texts may be anything; the words are those of `decoding`."""
    with (
        decoding(what or str(path), remedy, problem),
        av.open(str(path), metadata_errors="replace") as container,
    ):
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
    """The recipe that vidgen put into a file or a folder of pictures, or None if there is none.

    Raises:
        InputError: missing, no media file, or a recipe that is no JSON.
    """
    if Path(path).is_dir():
        file = Path(path, RECIPE_FILE)
        text = file.read_text("utf-8", "replace") if file.is_file() else None
    else:
        found = existing_file(path, "file")
        text = _picture_recipe(found) or _container_recipe(found)
    try:
        recipe = None if text is None else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the recipe in {path} is damaged: {error}") from None
    return recipe if isinstance(recipe, dict) else None


def _container_recipe(path: Path) -> str | None:
    with open_container(path) as container:
        # Matroska's tags come back in capitals.
        return {k.lower(): v for k, v in container.metadata.items()}.get(RECIPE_KEY)


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
    except Exception:  # no picture, which is no mistake here; Pillow raises anything
        return None
    # Other programs comment, too.
    return text if isinstance(text, str) and text.startswith("{") else None
