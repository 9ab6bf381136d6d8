"""Settings of training data: the key `data` of a run, and options of `vidgen data`."""

from __future__ import annotations

import codecs
import encodings.aliases
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, ClassVar, Literal

from vidgen.core.config import ONE
from vidgen.core.errors import InputError, nearest
from vidgen.core.shapes import check_num_frames, check_size, size_for_aspect
from vidgen.core.values import check_number, parse_size

if TYPE_CHECKING:
    from vidgen.weights.folder import ModelFolder

Flaw = Literal["cut", "black", "white", "blank", "frozen"]
NO_CACHE = "none"
MAX_ASPECT = 10


@dataclass(frozen=True)
class FolderConfig:
    """Hold a folder of videos and pictures with captions; a text alone is its path."""

    SHORT: ClassVar[str] = "path"

    path: str  # searched with all its subfolders
    repeats: int = 1  # times that its items occur in an epoch

    def __post_init__(self) -> None:
        check_number("repeats", self.repeats, 1, whole=True)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Hold the sources of clips and pictures, and the shapes to which they are cut."""

    # folders of videos and pictures; a single one needs no list
    folders: tuple[FolderConfig, ...] = field(metadata=ONE)
    cache: str = NO_CACHE  # folder of `vidgen data cache`, or "none": encode in training
    # sizes of buckets, such as 832x480; none: `area` in `aspects`, else the model's own sizes
    sizes: tuple[str, ...] = field(default=(), metadata=ONE)
    # pixels of a frame, in each of the `aspects`, rounded to whole tokens
    area: int | None = None
    aspects: tuple[str, ...] = ("16:9", "4:3", "1:1", "3:4", "9:16")  # ratios such as 16:9
    # lengths of clips, of which each stretch takes the longest that fits; none: the model's own
    frames: tuple[int, ...] = field(default=(), metadata=ONE)
    fps: Fraction | None = None  # frame rate of training clips; None: the model's own
    max_crop: float = 0.35  # share of a frame that may be cropped; more drops the file
    max_enlarge: float = 1.25  # factor by which a frame may be enlarged; more drops the file
    # most items of one file, evenly spread; or "all", one after another
    windows: int | Literal["all"] = 1
    # flaws that no item may have; a file is cut into stretches without them
    avoid: tuple[Flaw, ...] = ("cut", "black", "white", "blank", "frozen")
    # "drop-exact" keeps one of files with the same bytes, "drop" also one of similar files
    duplicates: Literal["keep", "drop-exact", "drop"] = "drop-exact"
    # encoding of caption files; "auto" is UTF-8, or UTF-16 with its byte order mark
    caption_encoding: str = "auto"
    prefix: str = ""  # added before each caption, such as a new word for a subject
    # for files without a caption: "drop" leaves them out, "empty" trains with an empty prompt
    no_caption: Literal["drop", "empty"] = "drop"
    caption_dropout: float = 0.1  # share of items trained with an empty prompt, for guidance
    # share of steps with pictures; None: in proportion to their number
    image_share: float | None = None
    held_out: float = 0.0  # share of files held out for validation, chosen by content
    validation: str | None = None  # a folder with files for validation, instead
    store_dtype: Literal["fp16", "bf16", "fp32"] = "fp16"  # of cached latents and contexts
    seed: int = 0  # of order, captions and dropout

    def __post_init__(self) -> None:
        if not self.folders:
            raise InputError("data.folders is empty; give a folder of videos and pictures")
        for name in ("max_crop", "caption_dropout", "held_out", "image_share"):
            check_number(f"data.{name}", getattr(self, name), 0, 1)
        check_number("data.max_enlarge", self.max_enlarge, 1)
        if self.windows != "all":
            check_number("data.windows", self.windows, 1, whole=True)
        check_number("data.fps", self.fps, 0, 240, above=True)
        if self.sizes and self.area is not None:
            raise InputError("data.sizes and data.area both set the size of frames; give one")
        if self.held_out and self.validation is not None:
            raise InputError("data.held_out and data.validation both set validation data; give one")
        try:
            codecs.lookup("utf-8" if self.caption_encoding == "auto" else self.caption_encoding)
        except LookupError:
            known = {"auto", *encodings.aliases.aliases}
            raise InputError(f"data.caption_encoding is {self.caption_encoding!r}, which is "
                             f"unknown; {nearest(self.caption_encoding, known)}") from None


@dataclass(frozen=True, order=True)
class Bucket:
    """Hold one shape of items; all items of a batch have one bucket."""

    width: int
    height: int
    num_frames: int

    @property
    def label(self) -> str:
        """Text such as 832x480x81, or 832x480 for pictures."""
        length = f"x{self.num_frames}" if self.num_frames > 1 else ""
        return f"{self.width}x{self.height}{length}"


@dataclass(frozen=True)
class Geometry:
    """Hold the shapes of items for a config and a model."""

    sizes: tuple[tuple[int, int], ...]  # (width, height) of buckets
    frames: tuple[int, ...]  # lengths of clips, rising
    fps: Fraction  # of the items
    multiple: int  # pixels per side of a token
    stride_t: int  # frames per latent frame

    @classmethod
    def of(cls, config: DataConfig, folder: ModelFolder) -> Geometry:
        """Return the shapes that a config sets for a model.

        Raises:
            InputError: the model doesn't support a size or length; names the nearest.
        """
        strides = folder.components["vae"].config.strides
        multiple = strides.hw * folder.components["transformer"].config.patch_size
        own = folder.defaults
        sizes = [parse_size(text) for text in config.sizes]
        if config.area is not None:
            aspects = [_aspect(text) for text in config.aspects]
            sizes = [size_for_aspect(a, config.area, multiple)[::-1] for a in aspects]
        sizes = sizes or list(own.sizes or ((own.width, own.height),))
        for width, height in sizes:
            check_size("width", width, multiple)
            check_size("height", height, multiple)
        frames = sorted(set(config.frames or (own.num_frames,)))
        for count in frames:
            check_num_frames(count, strides)
        fps = config.fps or Fraction(own.fps).limit_denominator(1001)
        return cls(tuple(dict.fromkeys(sizes)), tuple(frames), fps, multiple, strides.t)

    def size_for(self, width: int, height: int) -> tuple[int, int]:
        """Return (width, height) of the bucket with the aspect ratio nearest to a frame's."""
        def difference(size: tuple[int, int]) -> float:
            ratio = size[0] * height / (size[1] * width)
            return max(ratio, 1 / ratio)

        return min(self.sizes, key=difference)


def _aspect(text: str) -> float:
    first, colon, second = text.partition(":")
    try:
        ratio = float(first) / float(second if colon else "1")
    except (ValueError, ZeroDivisionError):
        ratio = 0.0
    if not 1 / MAX_ASPECT <= ratio <= MAX_ASPECT:
        raise InputError(f"data.aspects has {text!r}; give ratios of width to height such as "
                         f"16:9, at most {MAX_ASPECT}:1")
    return ratio
