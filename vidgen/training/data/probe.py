"""Facts about a file from decoding it once: frames, times, colour, shots and flaws.

Axes: H W rows and columns, h w those of a picture made small, K moments of a signature.
"""

from __future__ import annotations

import base64
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
from PIL import Image

from vidgen.core.errors import InputError
from vidgen.core.runtime import sha256_file
from vidgen.media.cells import Array, Look, Looker
from vidgen.media.checks import BLANK, FLAT
from vidgen.media.probe import probe
from vidgen.media.read import PICTURE_SUFFIXES, load_image
from vidgen.media.trackers import STILL, Runs, likeness
from vidgen.media.types import Frames
from vidgen.media.video_reader import TimedFrame, VideoReader

PROBE_VERSION = 4
"""Version of `FileFacts`; stored facts of other versions are made again."""
FROZEN_S = 1.0
"""Seconds without motion from which a stretch counts as frozen."""
SIGNATURE = (8, 12, 12, 3)
"""Shape [K, h, w, 3] of the signature that finds similar files."""

Ticks = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Flawed:
    """Hold a flaw of the frames `first` to `last`, both included."""

    kind: str
    first: int
    last: int


@dataclass(frozen=True)
class FileFacts:
    """Hold the facts about a file, found by decoding all of it."""

    sha256: str = ""  # of the file's bytes
    # reason why the file is unusable, or None; with a reason the other facts are undefined
    problem: str | None = None
    kind: Literal["video", "picture"] = "video"  # a single frame is a picture
    num_frames: int = 0  # decoded ones
    tick_s: Fraction = Fraction(1)  # seconds of a tick, exact
    lengths: str = ""  # durations of frames in ticks, packed; see `times`
    fps: Fraction = Fraction(0)  # frames over duration, exact if the file's times are
    is_variable: bool = False  # whether durations of frames vary
    size: tuple[int, int] = (0, 0)  # (width, height) as shown
    rotation: int = 0  # degrees by which frames are rotated for display
    pixel_aspect: Fraction = Fraction(1)  # width of a pixel over its height
    codec: str = ""  # as libav or Pillow name them
    pix_fmt: str = ""
    # `range`, `primaries`, `transfer`, `matrix`, where the file has them
    colour: dict[str, str | None] = field(default_factory=dict)
    cuts: tuple[tuple[int, int], ...] = ()  # (last frame of a shot, first frame of the next)
    flaws: tuple[Flawed, ...] = ()  # stretches that are black, white, blank, frozen or damaged
    num_repeats: int = 0  # frames equal to the previous one
    # 8 small pictures, which find near duplicates, in base64
    signature: str = ""
    notes: tuple[str, ...] = ()  # oddities that don't matter

    @property
    def is_hdr(self) -> bool:
        """True if the transfer function is PQ or HLG (ITU-R BT.2100)."""
        return self.colour.get("transfer") in ("pq", "hlg")

    @property
    def duration_s(self) -> float:
        """Seconds from the first frame's start to the last one's end; 0 for a picture."""
        return float(self.times[-1] * self.tick_s) if self.num_frames > 1 else 0.0

    @cached_property
    def times(self) -> Ticks:
        """Start of each frame in ticks after the first one's, and the end of the last one."""
        lengths = np.frombuffer(zlib.decompress(base64.b64decode(self.lengths)), "<u4")
        return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])

    def small_pictures(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return the signature as uint8 [K, h, w, 3]."""
        return np.frombuffer(base64.b64decode(self.signature), np.uint8).reshape(SIGNATURE)


def probe_file(path: Path) -> FileFacts:
    """Return the facts about a file, which is decoded once.

    An unusable file is no error: `problem` has the reason.
    """
    sha256 = ""
    try:
        sha256 = sha256_file(path)
        if path.stat().st_size == 0:
            return FileFacts(sha256, "is empty: 0 bytes")
        facts = _probe_picture(path) if is_still(path) else _probe_video(path)
        return replace(facts, sha256=sha256)
    except (InputError, OSError) as error:
        return FileFacts(sha256, _without_path(str(error), path))


def _without_path(text: str, path: Path) -> str:
    for word in ("video", "image", "file"):
        text = text.removeprefix(f"{word} ")
    return text.removeprefix(str(path)).strip()


def is_still(path: Path) -> bool:
    """Return True for a picture without animation."""
    if path.suffix.lower() not in PICTURE_SUFFIXES:
        return False
    try:
        with Image.open(path) as image:
            return getattr(image, "n_frames", 1) == 1
    except Exception:  # load_image reports the error
        return True


def _probe_picture(path: Path) -> FileFacts:
    pixels, notes = load_image(path)
    height, width, _ = pixels.shape
    flat = _flat(Looker(height, width).look(pixels))
    with Image.open(path) as image:
        codec, mode = str(image.format).lower(), image.mode
    return FileFacts(
        kind="picture", num_frames=1, lengths=packed([1]), size=(width, height), codec=codec,
        pix_fmt=mode, flaws=tuple(Flawed(kind, 0, 0) for kind, has in flat.items() if has),
        signature=_signature([pixels]), notes=tuple(notes))


def _probe_video(path: Path) -> FileFacts:
    with VideoReader(path, square=False) as reader:
        stream: dict[str, Any] = next(
            (s for s in probe(path)["streams"] if s["type"] in ("video", "picture")), {})
        seen = _Seen(reader)
        try:
            for frame in reader.timed():
                seen.add(frame)
        except InputError as error:
            raise InputError(f"{error} ({len(seen.ticks)} frames were decoded)") from None
        return seen.facts(stream)


class _Seen:
    """A collector of facts from frames in order, with a few numbers a frame."""

    def __init__(self, reader: VideoReader) -> None:
        self._reader, self.ticks = reader, list[int]()
        self._looker, self._anchored = (Looker(*reader.small_shape) for _ in range(2))
        self._colors: deque[Array] = deque(maxlen=AROUND)
        # of each frame: the flaws, and the mean changes of cells since the last AROUND ones and
        # the likeness to the last
        self._flaws, self._alike = list[tuple[str, ...]](), [1.0]
        self._changes = list[tuple[float, ...]]()
        self._kept, self._keep_step = list[Frames](), 1
        self._num_repeats, self._is_interlaced = 0, False

    def add(self, frame: TimedFrame) -> None:
        index = len(self.ticks)
        self.ticks.append(frame.ticks)
        self._last, self._is_interlaced = frame, self._is_interlaced or frame.is_interlaced
        small = self._reader.small(frame)
        look = self._looker.look(small)
        self._changes.append(tuple(float(np.abs(look.color - c).mean()) for c in self._colors))
        if self._colors:
            self._alike.append(likeness(*(c.transpose(2, 0, 1)
                                          for c in (self._colors[0], look.color))))
        self._colors.appendleft(look.color)
        has = _flat(look) | {"frozen": self._stands_still(small), "damaged": frame.is_damaged}
        self._flaws.append(tuple(kind for kind, is_here in has.items() if is_here))
        self._num_repeats += look.moved is not None and float(look.moved.max()) < 0.1
        if index % self._keep_step == 0:
            self._kept.append(small)
        if len(self._kept) > 64:  # keep every second one, and half as many of those to come
            self._kept, self._keep_step = self._kept[::2], 2 * self._keep_step

    def _stands_still(self, small: Frames) -> bool:
        """Return True without motion since the frame of the last motion, however slow."""
        anchor = self._anchored.before
        moved = self._anchored.look(small).moved
        if moved is None or float(moved.max()) >= STILL:
            return False
        self._anchored.before = anchor
        return True

    def _find_flaws(self) -> Iterator[Flawed]:
        fps = float(self._reader.fps)
        for kind in ("black", "white", "blank", "damaged", "frozen"):
            is_frozen = kind == "frozen"
            runs = Runs(fps, max(2, round(FROZEN_S * fps)) if is_frozen else 1)
            runs.spans.longest = len(self.ticks)
            for index, flaws in enumerate(self._flaws):
                runs.feed(index, kind in flaws, 1.0)
            runs.finish()
            for span in runs.spans.found:
                yield Flawed(kind, max(0, span.first - is_frozen), span.last)

    def facts(self, stream: dict[str, Any]) -> FileFacts:
        reader, count, between = self._reader, len(self.ticks), np.diff(self.ticks).tolist()
        lengths = [*between, self._last.length or round(float(np.median(between or [1])))]
        spread = max(between, default=0) - min(between, default=0)
        # more than times rounded to ticks can vary
        is_variable = spread > 1 or spread > 0.25 * sum(between) / max(len(between), 1)
        fps = rate = Fraction(reader.fps)
        if count > 1:
            rate = count / (sum(lengths) * reader.tick_s)
        if is_variable or abs(float(rate / fps) - 1) * count >= 0.5:
            fps = rate
        return FileFacts(
            kind="video" if count > 1 else "picture", num_frames=count, tick_s=reader.tick_s,
            lengths=packed(lengths), fps=fps, is_variable=is_variable, size=reader.size,
            rotation=self._last.rotation, pixel_aspect=reader.pixel_aspect,
            codec=str(stream.get("codec")), pix_fmt=str(stream.get("pix_fmt")),
            colour={k: stream.get(k) for k in ("range", "primaries", "transfer", "matrix")},
            cuts=tuple(find_cuts(self._changes, self._alike)), flaws=tuple(self._find_flaws()),
            num_repeats=self._num_repeats, signature=_signature(self._kept),
            notes=tuple(self._notes(sum(lengths))))

    def _notes(self, ticks: int) -> Iterator[str]:
        count, reader = len(self.ticks), self._reader
        if reader.header_frames not in (None, count):
            yield f"its header has {reader.header_frames} frames, but {count} can be decoded"
        found_s = ticks * reader.tick_s
        if reader.header_s is not None and found_s < 0.9 * reader.header_s:
            yield (f"it ends early: its header has {float(reader.header_s):.2f} s, but "
                   f"{float(found_s):.2f} s can be decoded")
        if self._is_interlaced:
            yield "it is interlaced: frames mix two moments"
        if count == 1:
            yield "a video of one frame, used as a picture"
        if self._last.rotation % 90:
            yield f"its rotation of {self._last.rotation} degrees is rounded to a multiple of 90"
        if self._num_repeats > 0.2 * count:
            yield (f"{self._num_repeats / count:.0%} of the frames repeat the previous one; its "
                   "real frame rate may be lower")


def _flat(look: Look) -> dict[str, bool]:
    return {"black": look.dark >= FLAT, "white": look.bright >= FLAT, "blank": look.spread < BLANK}


def packed(lengths: Sequence[int]) -> str:
    """Pack durations of frames in ticks as `FileFacts.lengths`."""
    return base64.b64encode(zlib.compress(np.asarray(lengths, "<u4").tobytes())).decode()


def _signature(pictures: Sequence[Frames]) -> str:
    count, height, width, _ = SIGNATURE
    places = np.linspace(0, len(pictures) - 1, count).round().astype(int)
    small = [Image.fromarray(pictures[place]).resize((width, height), Image.Resampling.BOX)
             for place in places]
    return base64.b64encode(np.stack(list(map(np.asarray, small))).tobytes()).decode()


STEP, SLIGHT = 10.0, 2.5
"""Least mean change of cells at a cut, in levels of 0 to 255: for similar pictures, and for
unrelated ones."""
STANDS_OUT, STANDS_OUT_UNLIKE = 4.0, 2.0
"""Least ratio to the median change around it, for the same two cases; 1 is a steady camera move."""
UNLIKE = 0.4
"""Correlation of cells below which two pictures are unrelated."""
AROUND = 4
"""Number of frames before and after with which a change is compared."""


def find_cuts(changes: Sequence[Sequence[float]], alike: Sequence[float]) -> Iterator[
        tuple[int, int]]:
    """Yield (last frame of a shot, first of the next).

    Args:
        changes: of each frame, the mean changes of its cells, 0 to 255, since the one before it,
            the second before it, and so on up to `AROUND`.
        alike: of each frame, the correlation of its cells with those of the one before it.
    """
    for here in range(1, len(changes)):
        change, *since_earlier = changes[here]
        step, times = (STEP, STANDS_OUT) if alike[here] >= UNLIKE else (SLIGHT, STANDS_OUT_UNLIKE)
        if change < step:
            continue
        after = changes[here + 1 : here + 1 + AROUND]
        around = [each[0] for each in (*changes[max(1, here + 1 - AROUND) : here], *after)]
        if around and change < times * max(median(around), 0.25):
            continue
        back = [each[lag] for lag, each in enumerate(after[: AROUND - 1], 1)]
        if all(each >= change / 3 for each in (*since_earlier, *back)):  # else a flash
            yield here - 1, here
