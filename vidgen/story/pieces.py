"""A film in pieces: some are copied as packets, the others made frame by frame and encoded.

A shot that is encoded as the film and shown unchanged is copied from key frame to key frame;
transitions and texts are encoded in segments of their own.

At frame n of a transition over N frames the second shot's share is s = (n + 1) / (N + 1): neither
the first nor the last frame is one shot alone, as those are its neighbours.

Axes: H W rows and columns.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from vidgen.media.types import Frames
from vidgen.story.captions import Burner
from vidgen.story.colours import Colours, ShotFrames
from vidgen.story.timeline import Section, Timeline

_COLOURS = {"fade-black": 0.0, "fade-white": 255.0}


@dataclass(frozen=True, slots=True)
class Piece:
    """Frames `first` up to `last` of the film."""

    first: int
    last: int
    # place in the timeline of the shot whose packets are copied; None: encoded
    shot: int | None = None


def pieces_of(
    timeline: Timeline, burnt: Sequence[tuple[int, int]], parts: Sequence[Sequence[int] | None]
) -> list[Piece]:
    """Cut a film into pieces that are copied and pieces that are encoded.

    `burnt` holds the frames [first, last) that bear texts, in order; `parts` the frames at which
    each shot's packets can be cut, its end included, or None.
    """
    pieces: list[Piece] = []

    def add(piece: Piece) -> None:
        before = pieces[-1] if pieces else None
        if piece.first == piece.last:
            return
        if before is not None and before.shot is None and piece.shot is None:
            pieces[-1] = Piece(before.first, piece.last)
        else:
            pieces.append(piece)

    for section in timeline.sections():
        at, index = section.first, section.shots[0]
        places = parts[index] if section.kind == "cut" else None
        if places is not None:
            start = timeline.shots[index].start
            for first, last in _unmarked(section, burnt):
                inside = [start + place for place in places if first <= start + place <= last]
                if len(inside) > 1:
                    add(Piece(at, inside[0]))
                    add(Piece(inside[0], inside[-1], index))
                    at = inside[-1]
        add(Piece(at, section.last))
    return pieces


def _unmarked(section: Section, burnt: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    at = section.first
    for first, last in burnt[bisect_right(burnt, at, key=lambda each: each[1]) :]:
        if first >= section.last:
            break
        if first > at:
            yield at, first
        at = last
    if at < section.last:
        yield at, section.last


@dataclass
class Reels:
    """The film's frames, made in order; at most two shots are open at a time.

    Attributes:
        seen: colours of each shot's frames that were made while it was shown alone.
    """

    timeline: Timeline  # of the film
    sources: Sequence[ShotFrames]  # the shots' frames
    burner: Burner  # burns texts in
    # called with the number of frames made so far
    on_frames: Callable[[int], None] = lambda _: None
    seen: dict[int, Colours] = field(default_factory=dict)
    _open: dict[int, tuple[Iterator[Frames], int]] = field(default_factory=dict)
    _made: int = 0

    def __post_init__(self) -> None:
        self._ahead = deque(self.timeline.sections())

    def frames(self, first: int, last: int) -> Iterator[Frames]:
        """Yield frames of the film, uint8 [1, H, W, 3] each, after those of the last call.

        Raises:
            InputError: a shot's file that was changed.
        """
        for number in range(first, last):
            while self._ahead[0].last <= number:
                self._ahead.popleft()
            yield self.burner.burn(self._frame(self._ahead[0], number), number)[None]
            self._made += 1
            self.on_frames(self._made)

    def close(self) -> None:
        """Close all files."""
        self._close_before(len(self.sources))

    def _frame(self, section: Section, number: int) -> Frames:
        self._close_before(section.shots[0])
        shown = [self._of_shot(index, number) for index in section.shots]
        share = (number - section.first + 1) / (section.last - section.first + 1)
        kind, _, way = section.kind.rpartition("-")
        if len(shown) == 2:
            return blended(section.kind, shown[0], shown[1], share)
        if way in ("in", "out"):
            return faded(kind, shown[0], share if way == "in" else 1 - share)
        self.seen.setdefault(section.shots[0], Colours()).feed(shown[0])
        return shown[0]

    def _of_shot(self, index: int, number: int) -> Frames:
        wanted = number - self.timeline.shots[index].start
        frames, at = self._open.get(index) or (self.sources[index].frames(), 0)
        for _ in range(at, wanted):
            next(frames)
        self._open[index] = frames, wanted + 1
        return next(frames)

    def _close_before(self, index: int) -> None:
        for earlier in [each for each in self._open if each < index]:
            frames, _ = self._open.pop(earlier)
            frames.close()  # type: ignore[attr-defined]


def blended(kind: str, first: Frames, second: Frames, share: float) -> Frames:
    """Return a frame of a transition between two shots, uint8 [H, W, 3].

    Args:
        kind: "dissolve", "fade-black" or "fade-white" (through the colour), "wipe-left" or
            "wipe-right" (the edge moves that way), "slide-left" or "slide-right" (both shots do).
        first: uint8 [H, W, 3] of the first shot.
        second: uint8 [H, W, 3] of the second shot.
        share: of the second, above 0 and below 1.
    """
    if kind == "dissolve":
        return np.asarray(np.rint(first + share * (second.astype(np.float32) - first)), np.uint8)
    if kind in _COLOURS:
        return faded(kind, first if share < 0.5 else second, abs(1 - 2 * share))
    columns = round(share * first.shape[1])  # of the second
    left = first.shape[1] - columns
    sides = {
        "wipe-left": (first[:, :left], second[:, left:]),
        "wipe-right": (second[:, :columns], first[:, columns:]),
        "slide-left": (first[:, columns:], second[:, :columns]),
        "slide-right": (second[:, left:], first[:, :left])}
    return np.concatenate(sides[kind], axis=1)


def faded(kind: str, frame: Frames, share: float) -> Frames:
    """Return a frame uint8 [H, W, 3] mixed with black or white, of which `share` is left."""
    mixed = share * frame.astype(np.float32) + (1 - share) * _COLOURS[kind]
    return np.asarray(np.rint(mixed), np.uint8)
