"""Settings of training data: the `data` part of a run, and `vidgen data`'s options."""

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
    """A folder of videos and pictures with captions; written as text alone it is its path."""

    SHORT: ClassVar[str] = "path"

    path: str  # the folder; it is searched with all below it
    repeats: int = 1  # how often its items stand in an epoch

    def __post_init__(self) -> None:
        check_number("repeats", self.repeats, 1, whole=True)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The clips and pictures to learn from, and the shapes that they are cut to.

    Raises:
        InputError: a value that can't be, by name.
    """

    # of videos and pictures; a single one needs no list
    folders: tuple[FolderConfig, ...] = field(metadata=ONE)
    cache: str = NO_CACHE  # folder that `vidgen data cache` made, or "none": encode while training
    # of buckets, such as 832x480; none: `area` in `aspects`, else the model's own sizes
    sizes: tuple[str, ...] = field(default=(), metadata=ONE)
    # pixels of a picture, of which `aspects` make sizes in steps of a token
    area: int | None = None
    aspects: tuple[str, ...] = ("16:9", "4:3", "1:1", "3:4", "9:16")  # ratios such as 16:9
    # lengths of clips; a stretch takes the longest that fits. None: the model's own.
    frames: tuple[int, ...] = field(default=(), metadata=ONE)
    fps: Fraction | None = None  # rate at which clips are shown to the model; None: its own
    max_crop: float = 0.35  # share of a picture that may be cut off; more drops the file
    max_enlarge: float = 1.25  # factor by which a picture may be enlarged; more drops the file
    # most items of one file, evenly spread; or "all", side by side
    windows: int | Literal["all"] = 1
    # what no item may hold. A file is cut into stretches around it.
    avoid: tuple[Flaw, ...] = ("cut", "black", "white", "blank", "frozen")
    # "drop-exact" keeps one of files with the same bytes, "drop" also one of those that look the
    # same
    duplicates: Literal["keep", "drop-exact", "drop"] = "drop-exact"
    # of captions' files; "auto" knows UTF-8 and -16 and guesses the others
    caption_encoding: str = "auto"
    prefix: str = ""  # put before each caption, such as a new word for a subject
    # "drop" leaves out what has none, "empty" learns it under an empty prompt
    no_caption: Literal["drop", "empty"] = "drop"
    caption_dropout: float = 0.1  # share of items that see an empty prompt, for guidance
    # share of steps that are of pictures; None: as many as there are
    image_share: float | None = None
    held_out: float = 0.0  # share of files that is kept for validation, chosen by their content
    validation: str | None = None  # a folder for validation instead
    store_dtype: Literal["fp16", "bf16", "fp32"] = "fp16"  # of cached latents and contexts
    seed: int = 0  # of what is drawn: order, captions, dropout

    def __post_init__(self) -> None:
        if not self.folders:
            raise InputError("data.folders is empty; name a folder of videos and pictures")
        for name in ("max_crop", "caption_dropout", "held_out", "image_share"):
            check_number(f"data.{name}", getattr(self, name), 0, 1)
        check_number("data.max_enlarge", self.max_enlarge, 1)
        if self.windows != "all":
            check_number("data.windows", self.windows, 1, whole=True)
        check_number("data.fps", self.fps, 0, 240, above=True)
        if self.sizes and self.area is not None:
            raise InputError("data.sizes and data.area both say how large pictures are; give one")
        if self.held_out and self.validation is not None:
            raise InputError("data.held_out and data.validation both say what validates; give one")
        try:
            codecs.lookup("utf-8" if self.caption_encoding == "auto" else self.caption_encoding)
        except LookupError:
            known = {"auto", *encodings.aliases.aliases}
            raise InputError(f"data.caption_encoding is {self.caption_encoding!r}, which is "
                             f"unknown; {nearest(self.caption_encoding, known)}") from None


@dataclass(frozen=True, order=True)
class Bucket:
    """One shape of items; a batch is of one bucket."""

    width: int
    height: int
    num_frames: int

    @property
    def label(self) -> str:
        """Such as 832x480x81, or 832x480 for pictures."""
        length = f"x{self.num_frames}" if self.num_frames > 1 else ""
        return f"{self.width}x{self.height}{length}"


@dataclass(frozen=True)
class Geometry:
    """Shapes that a model's clips can have here."""

    sizes: tuple[tuple[int, int], ...]  # (width, height) of buckets
    frames: tuple[int, ...]  # lengths of clips, rising
    fps: Fraction  # rate at which they are shown
    multiple: int  # pixels a side of one token
    stride_t: int  # frames that one latent frame stands for

    @classmethod
    def of(cls, config: DataConfig, folder: ModelFolder) -> Geometry:
        """Return the shapes that a config asks for of a model.

        Raises:
            InputError: sizes or lengths that the model can't have; the nearest are named.
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
        """Return (width, height) of the bucket whose aspect is nearest to a picture's."""
        def off(size: tuple[int, int]) -> float:
            ratio = size[0] * height / (size[1] * width)
            return max(ratio, 1 / ratio)

        return min(self.sizes, key=off)


def _aspect(text: str) -> float:
    first, colon, second = text.partition(":")
    try:
        ratio = float(first) / float(second if colon else "1")
    except (ValueError, ZeroDivisionError):
        ratio = 0.0
    if not 1 / MAX_ASPECT <= ratio <= MAX_ASPECT:
        raise InputError(f"data.aspects holds {text!r}; give ratios of width and height such as "
                         f"16:9, {MAX_ASPECT}:1 at most")
    return ratio
