"""One file looked at: counted by decoding, its times, colour, shots and flaws.

Axes: H W rows and columns, h w those of a picture made small, K moments of a signature.
"""

from __future__ import annotations

import base64
import io
import zlib
from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
from PIL import Image

from vidgen.core.errors import InputError
from vidgen.media.cells import Array, Look, Looker
from vidgen.media.checks import BLANK, FLAT
from vidgen.media.probe import probe
from vidgen.media.read import PICTURE_SUFFIXES, load_image
from vidgen.media.trackers import STILL, Runs, likeness
from vidgen.media.types import Frames
from vidgen.media.video_reader import VideoReader

PROBE_VERSION = 1
"""Of what is recorded; records of another are made anew."""
LOOKED_AT = 18_000
"""Frames of which each is looked at, 10 minutes at 30 a second. Of as many again it is every
second, of the next 36,000 every fourth, and so on; each is decoded and counted."""
FROZEN_S = 1.0
"""How long nothing may move before it counts."""
SIGNATURE = (8, 12, 12, 3)
"""Moments, rows, columns, colours by which files that look the same are known."""
_THUMBNAILS, _THUMBNAIL_SIDE = 3, 112

Ticks = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Flawed:
    """Frames `first` to `last`, both in, that have a flaw."""

    kind: str
    first: int
    last: int


@dataclass(frozen=True)
class FileFacts:
    """What a file holds, found by decoding all of it."""

    # why nothing can be learned from it, or None; then the rest is of no use
    problem: str | None = None
    kind: Literal["video", "picture"] = "video"  # a single frame is a picture
    num_frames: int = 0  # decoded, not told
    tick_s: Fraction = Fraction(1)  # seconds of a tick, exact
    lengths: str = ""  # of frames in ticks, packed; see `times`
    fps: Fraction = Fraction(0)  # frames over duration, exact where the file's times are
    is_variable: bool = False  # whether frames follow each other unevenly
    size: tuple[int, int] = (0, 0)  # (width, height) as shown
    rotation: int = 0  # degrees by which it is turned for showing
    pixel_aspect: Fraction = Fraction(1)  # width of a pixel over its height
    codec: str = ""  # as libav or Pillow name them
    pix_fmt: str = ""
    # `range`, `primaries`, `transfer`, `matrix`, where the file says
    colour: dict[str, str | None] = field(default_factory=dict)
    cuts: tuple[tuple[int, int], ...] = ()  # (last frame of a shot, first of the next)
    flaws: tuple[Flawed, ...] = ()  # stretches that are black, white, blank, frozen or damaged
    num_repeats: int = 0  # frames that are equal to the one before, of those looked at
    look_step: int = 1  # of how many frames one was looked at, at the sparsest
    # small pictures of 8 moments, by which near duplicates are found, in base64
    signature: str = ""
    thumbnails: tuple[str, ...] = ()  # JPEGs of its beginning, middle and end, in base64
    notes: tuple[str, ...] = ()  # what is odd but no problem

    @property
    def is_hdr(self) -> bool:
        """Whether its values mean light beyond a screen's white (ITU-R BT.2100)."""
        return self.colour.get("transfer") in ("pq", "hlg")

    @property
    def duration_s(self) -> float:
        """From the first frame's showing to the last one's end."""
        return float(self.times[-1] * self.tick_s) if self.num_frames > 1 else 0.0

    @cached_property
    def times(self) -> Ticks:
        """When each frame is shown, in ticks from the first on, and when the last one ends."""
        lengths = np.frombuffer(zlib.decompress(base64.b64decode(self.lengths)), dtype="<u4")
        return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])

    def small_pictures(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The signature, uint8 [K, h, w, 3]."""
        return np.frombuffer(base64.b64decode(self.signature), np.uint8).reshape(SIGNATURE)


def probe_file(path: Path) -> FileFacts:
    """Decode a file once, from its first frame to its last.

    A file that can't be used is no error: its `problem` says why.
    """
    try:
        if path.stat().st_size == 0:
            return FileFacts(problem="is empty: 0 bytes")
        if is_still(path):
            return _probe_picture(path)
        return _probe_video(path)
    except (InputError, OSError) as error:
        return FileFacts(problem=_without_path(str(error), path))


def _without_path(text: str, path: Path) -> str:
    for word in ("video", "image", "file"):
        text = text.removeprefix(f"{word} ")
    return text.removeprefix(str(path)).strip()


def is_still(path: Path) -> bool:
    """Whether a file is a picture that doesn't move."""
    if path.suffix.lower() not in PICTURE_SUFFIXES:
        return False
    try:
        with Image.open(path) as image:
            return getattr(image, "n_frames", 1) == 1
    except Exception:  # load_image will say what it is
        return True


def _probe_picture(path: Path) -> FileFacts:
    pixels, notes = load_image(path)
    height, width, _ = pixels.shape
    flat = _flat(Looker(height, width).look(pixels))
    with Image.open(path) as image:
        codec, mode = str(image.format).lower(), image.mode
    return FileFacts(
        kind="picture", num_frames=1, lengths=_packed([1]), size=(width, height), codec=codec,
        pix_fmt=mode, flaws=tuple(Flawed(kind, 0, 0) for kind, has in flat.items() if has),
        signature=_signature([pixels]), thumbnails=(_thumbnail(pixels),), notes=tuple(notes))


def _probe_video(path: Path) -> FileFacts:
    with VideoReader(path, square=False) as reader:
        stream: dict[str, Any] = next(
            (s for s in probe(path)["streams"] if s["type"] in ("video", "picture")), {})
        seen = _Watcher(reader)
        try:
            for frame in reader.timed():
                seen.feed(frame)
        except InputError as error:
            problem = _without_path(str(error), path)
            return FileFacts(problem=f"{problem} ({seen.num_frames} frames were decoded)")
        return seen.facts(stream)


class _Watcher:
    """Gathers facts while frames pass, in memory that grows by 12 bytes a frame."""

    def __init__(self, reader: VideoReader) -> None:
        self._reader, self.num_frames = reader, 0
        self._looker, self._anchored = (Looker(*reader.small_shape) for _ in range(2))
        self._ticks, self._last_length = array("q"), 0
        self._cuts = Cuts()
        fps = float(reader.fps)
        self._runs = {kind: Runs(fps) for kind in ("black", "white", "blank")}
        self._runs["frozen"] = Runs(fps, max(2, round(FROZEN_S * fps)))
        for runs in self._runs.values():
            runs.spans.longest = 1_000_000
        self._damaged = Runs(fps)
        self._kept: list[tuple[int, Frames]] = []
        self._keep_step = 1
        self._num_repeats = self._rotation = 0
        self._is_interlaced, self._step = False, 1

    def feed(self, frame: Any) -> None:
        index, self.num_frames = self.num_frames, self.num_frames + 1
        self._ticks.append(frame.ticks)
        self._last_length, self._rotation = frame.length, frame.rotation
        self._is_interlaced |= frame.is_interlaced
        self._damaged.feed(index, frame.is_damaged, 1.0)
        self._step = 1 << (index // LOOKED_AT).bit_length()
        if index % self._step:
            return
        small = self._reader.small(frame)
        look = self._looker.look(small)
        self._cuts.feed(index, look.color)
        has = _flat(look) | {"frozen": self._stands_still(small)}
        for kind, runs in self._runs.items():
            runs.feed(index, has[kind], 1.0)
        self._num_repeats += look.moved is not None and float(look.moved.max()) < 0.1
        if index % self._keep_step == 0:
            self._kept.append((index, small))
        if len(self._kept) > 64:  # half as dense from here on
            self._keep_step *= 2
            self._kept = [each for each in self._kept if each[0] % self._keep_step == 0]

    def _stands_still(self, small: Frames) -> bool:
        """Whether a frame is still what it was when last something moved, be it ever so slowly."""
        anchor = self._anchored.before
        moved = self._anchored.look(small).moved
        if moved is None or float(moved.max()) >= STILL:
            return False
        self._anchored.before = anchor
        return True

    def facts(self, stream: dict[str, Any]) -> FileFacts:
        self._cuts.finish()
        for runs in (*self._runs.values(), self._damaged):
            runs.finish()
        lengths = np.diff(self._ticks).tolist()
        usual = round(float(np.median(lengths))) if lengths else 1
        lengths.append(self._last_length or usual)
        spans = {kind: runs.spans.found for kind, runs in self._runs.items()}
        spans["damaged"] = self._damaged.spans.found
        flaws = [Flawed(kind, max(0, span.first - (kind == "frozen")), span.last)
                 for kind, found in spans.items() for span in found]
        kept = [picture for _, picture in self._kept]
        return FileFacts(
            kind="video" if self.num_frames > 1 else "picture",
            num_frames=self.num_frames, tick_s=self._reader.tick_s, lengths=_packed(lengths),
            fps=self._rate(lengths), is_variable=_is_variable(lengths[:-1]),
            size=self._reader.size, rotation=self._rotation,
            pixel_aspect=self._reader.pixel_aspect, codec=str(stream.get("codec")),
            pix_fmt=str(stream.get("pix_fmt")),
            colour={k: stream.get(k) for k in ("range", "primaries", "transfer", "matrix")},
            cuts=tuple(self._cuts.found), flaws=tuple(flaws), num_repeats=self._num_repeats,
            look_step=self._step, signature=_signature(kept),
            thumbnails=tuple(map(_thumbnail, _spread(kept, min(_THUMBNAILS, len(kept))))),
            notes=tuple(self._notes(lengths)))

    def _rate(self, lengths: list[int]) -> Fraction:
        if self.num_frames == 1:
            return Fraction(self._reader.fps)
        rate = self.num_frames / (sum(lengths) * self._reader.tick_s)
        told = Fraction(self._reader.fps)
        off = abs(float(rate / told) - 1) * self.num_frames
        return told if off < 0.5 and not _is_variable(lengths[:-1]) else rate

    def _notes(self, lengths: list[int]) -> list[str]:
        notes, told = [], self._reader.header_frames
        if told is not None and told != self.num_frames:
            notes.append(f"its head tells of {told} frames, {self.num_frames} can be decoded")
        header_s, found_s = self._reader.header_s, sum(lengths) * self._reader.tick_s
        if header_s is not None and found_s < 0.9 * header_s:
            notes.append(f"it ends early: its head tells of {float(header_s):.2f} s, "
                         f"{float(found_s):.2f} s can be decoded")
        if self._is_interlaced:
            notes.append("it is interlaced: frames hold two moments, line by line")
        if self.num_frames == 1:
            notes.append("a film of one frame, taken as a picture")
        if self._rotation % 90:
            notes.append(f"it is turned by {self._rotation} degrees, which is rounded to 90s")
        if self._step > 1:
            notes.append(f"it is long: at its end 1 of {self._step} frames was looked at")
        if self._num_repeats > 0.2 * self.num_frames:
            notes.append(f"{self._num_repeats / self.num_frames:.0%} of the frames repeat the one "
                         "before; its real rate may be lower")
        return notes


def _is_variable(lengths: list[int]) -> bool:
    """Whether frames last differently by more than the rounding of times to ticks."""
    if len(lengths) < 2:
        return False
    spread, mean = max(lengths) - min(lengths), sum(lengths) / len(lengths)
    return spread > 1 or spread > 0.25 * mean


def _flat(look: Look) -> dict[str, bool]:
    return {"black": look.dark >= FLAT, "white": look.bright >= FLAT, "blank": look.spread < BLANK}


def _packed(lengths: list[int]) -> str:
    raw = np.asarray(lengths, dtype="<u4").tobytes()
    return base64.b64encode(zlib.compress(raw, 6)).decode()


def _spread(pictures: Sequence[Frames], count: int) -> list[Frames]:
    places = np.linspace(0, len(pictures) - 1, count).round().astype(int)
    return [pictures[place] for place in places]


def _signature(pictures: Sequence[Frames]) -> str:
    count, height, width, _ = SIGNATURE
    small = [np.asarray(Image.fromarray(each).resize((width, height), Image.Resampling.BOX))
             for each in _spread(pictures, count)]
    return base64.b64encode(np.stack(small).tobytes()).decode()


def _thumbnail(picture: Frames) -> str:
    image = Image.fromarray(picture)
    image.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE), Image.Resampling.BOX)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=70)
    return base64.b64encode(buffer.getvalue()).decode()


STEP, SLIGHT = 10.0, 2.5
"""Mean change of the cells in levels that a cut has: where the pictures are somewhat alike, and
where they have nothing to do with each other."""
STANDS_OUT, STANDS_OUT_UNLIKE = 4.0, 2.0
"""Times the median change around it, for the same two cases. A steady camera move has 1."""
UNLIKE = 0.4
"""Correlation of the cells below which two pictures have nothing to do with each other."""
AROUND = 4
"""Looks before and behind that a change is compared with."""


@dataclass(frozen=True)
class _Seen:
    index: int
    color: Array
    change: float
    alike: float


class Cuts:
    """Finds cuts: `found` has (last frame seen of the one shot, first of the next), in order."""

    def __init__(self) -> None:
        self.found: list[tuple[int, int]] = []
        self._seen: deque[_Seen] = deque(maxlen=2 * AROUND + 1)

    def feed(self, index: int, color: Array) -> None:
        """Go on with a frame's cells [y, x, 3], 0 to 255; frames may be left out between."""
        change, alike = 0.0, 1.0
        if self._seen:
            last = self._seen[-1].color
            change = float(np.abs(color - last).mean())
            alike = likeness(last.transpose(2, 0, 1), color.transpose(2, 0, 1))
        self._seen.append(_Seen(index, color, change, alike))
        if len(self._seen) > AROUND:
            self._judge(len(self._seen) - 1 - AROUND)

    def finish(self) -> None:
        """Judge the last changes, too."""
        for position in range(max(0, len(self._seen) - AROUND), len(self._seen)):
            self._judge(position)

    def _judge(self, position: int) -> None:
        seen = list(self._seen)
        here = seen[position]
        is_alike = here.alike >= UNLIKE
        if position == 0 or here.change < (STEP if is_alike else SLIGHT):
            return
        times = STANDS_OUT if is_alike else STANDS_OUT_UNLIKE
        around = [each.change for each in seen[max(1, position - AROUND) :] if each is not here]
        if around and here.change < times * max(median(around), 0.25):
            return
        back = [(seen[position - 1], later) for later in seen[position + 1 : position + AROUND]]
        back += [(earlier, here) for earlier in seen[max(0, position - AROUND) : position - 1]]
        if any(float(np.abs(a.color - b.color).mean()) < here.change / 3 for a, b in back):
            return  # into a flash, or out of it
        self.found.append((seen[position - 1].index, here.index))
