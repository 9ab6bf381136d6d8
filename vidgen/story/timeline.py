"""The place of every shot in the film, in whole frames by exact fractions.

Ideal times are sums of the shots' lengths less the transitions', as fractions of a second. Each is
rounded by itself, so every cut, and the whole film, lies within half a frame of its ideal time,
however many shots there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from typing import TypeAlias

from vidgen.core.errors import InputError
from vidgen.media.sound import RATE
from vidgen.story.elements import Transition
from vidgen.story.film import ShotPlan
from vidgen.story.script import Script, Shot
from vidgen.story.store import RenderedShot

CUT = Transition()


Measured: TypeAlias = ShotPlan | RenderedShot
"""A shot and its number of frames."""


@dataclass(frozen=True, slots=True)
class Placed:
    """A shot and its place in the film."""

    shot: Shot
    start: int  # frame of the film that first shows it, in a transition or not
    num_frames: int  # of the film that show it
    overlap: int  # number of these, at its beginning, that it shares with the previous shot
    transition: Transition  # from the previous shot

    @property
    def end(self) -> int:
        """The frame after the shot's last frame in the film."""
        return self.start + self.num_frames


@dataclass(frozen=True, slots=True)
class Section:
    """Frames `first` up to `last` of the film, of one shot or of two in transition."""

    first: int
    last: int
    shots: tuple[int, ...]  # places in the timeline; the second shot takes over from the first
    kind: str = "cut"  # the transition, or "cut" for one shot alone


@dataclass(frozen=True, slots=True)
class Timeline:
    """All shots of a film, in order."""

    script: Script
    fps: Fraction
    shots: tuple[Placed, ...]
    opening: int  # frames in which the film fades in from a colour
    ending: int  # frames in which it fades out to one
    ending_kind: str  # "fade-black" or "fade-white"
    ideal_s: Fraction  # exact length, to which the length in frames is nearest

    @property
    def num_frames(self) -> int:
        """Frames of the whole film."""
        return self.shots[-1].end

    def seconds(self, frame: int) -> float:
        """Return the time at which a frame of the film is shown."""
        return float(frame / self.fps)

    def sample(self, frame: int) -> int:
        """Return the first sample of a frame of the film, at `RATE`."""
        return round(frame / self.fps * RATE)

    @property
    def num_samples(self) -> int:
        """Samples of the whole film, at `RATE`."""
        return self.sample(self.num_frames)

    def faded(self, index: int) -> tuple[int, int]:
        """Return the frames that transitions take at the beginning and at the end of a shot."""
        return (self.shots[index].overlap if index else self.opening,
                self.ending if index == len(self.shots) - 1 else self.shots[index + 1].overlap)

    def sections(self) -> Iterator[Section]:
        """Yield the film's sections, from its beginning to its end."""
        last = len(self.shots) - 1
        for index, placed in enumerate(self.shots):
            begin = placed.start + placed.overlap
            end = placed.end - self.faded(index)[1]
            if placed.overlap:
                yield Section(placed.start, begin, (index - 1, index), placed.transition.type)
            elif index == 0 and self.opening:
                begin += self.opening
                yield Section(0, begin, (0,), f"{placed.transition.type}-in")
            if begin < end:
                yield Section(begin, end, (index,))
            if index == last and self.ending:
                yield Section(end, placed.end, (index,), f"{self.ending_kind}-out")


def lay_out(script: Script, shots: Sequence[Measured], fps: Fraction) -> Timeline:
    """Place shots, in order, in a film of the script's transitions and ending.

    Raises:
        InputError: a transition longer than the shots have frames for.
    """
    placed: list[Placed] = []
    begin = end = Fraction(0)  # ideal, of the shot before, in frames of the film
    for each in shots:
        how = _transition(script, each.shot, is_first=not placed)
        start = end - (_seconds(how) * fps if placed else 0)
        if placed and start < begin:
            raise InputError(
                f"{script.where(each.shot)}: {how.type} of {how.duration:g} s is longer than the "
                f"previous shot, which lasts {float((end - begin) / fps):g} s; shorten it")
        first = _nearest(start)
        overlap = placed[-1].end - first if placed else 0
        placed.append(Placed(each.shot, first, each.num_frames, overlap, how))
        begin, end = start, start + each.num_frames
    ending = script.project.finish.ending
    made = Timeline(
        script, fps, tuple(placed), _nearest(_seconds(placed[0].transition) * fps),
        _nearest(_seconds(ending) * fps), ending.type, end / fps)
    _check_room(made)
    return made


def _transition(script: Script, shot: Shot, *, is_first: bool) -> Transition:
    """Return the transition to a shot; the first shot can only fade in from a colour."""
    how = script.option(shot, "transition") or CUT
    return CUT if is_first and how.type not in ("fade-black", "fade-white") else how


def _seconds(how: Transition) -> Fraction:
    return Fraction(0) if how.type == "cut" else Fraction(str(how.duration))


def _nearest(value: Fraction) -> int:
    return floor(value + Fraction(1, 2))


def _check_room(timeline: Timeline) -> None:
    for index, placed in enumerate(timeline.shots):
        before, after = timeline.faded(index)
        if before + after > placed.num_frames:
            lacking = timeline.seconds(before + after - placed.num_frames)
            raise InputError(
                f"{timeline.script.where(placed.shot)} has {placed.num_frames} frames, fewer than "
                f"the transitions at its beginning ({before}) and end ({after}) take; shorten "
                f"them by {lacking:.3f} s, or make the shot longer")
