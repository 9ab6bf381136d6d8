"""A film's captions, titles and speech as texts with times, and burnt into the picture.

A caption without a duration stays until the shot's next one or the next shot begins; one with a
duration may last into the following shots. Captions shown together stand one below the other.

Axes: H W rows and columns.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vidgen.core.errors import InputError, quoted
from vidgen.media.subtitles import Cue
from vidgen.media.types import Frames
from vidgen.story.script import Shot
from vidgen.story.timeline import Timeline

TITLE_S = 3.0
"""Seconds of a title, at most its shot's length."""
_SHARE = {"caption": 1 / 14, "title": 1 / 9}  # of the picture's height, for a line
_LEAST = 12  # pixels of a line; smaller letters can't be read
_WIDTH = 0.9  # of the picture, for a line
_REMEDIES = {"caption": "give captions: track", "title": "leave titles out"}
_OUTLINE = 1 / 10  # of a line's height
_SYSTEM_FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf",
                 "Arial.ttf")
"""Tried if Pillow's own font, mostly ASCII, lacks a character."""

Mask = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True, slots=True)
class Burnt:
    """A text in the picture, from frame `first` up to `last` of the film."""

    text: str
    first: int
    last: int
    kind: Literal["caption", "title"] = "caption"


def captions_of(timeline: Timeline) -> list[Cue]:
    """Return the captions of a film's shots with their times in the film.

    Raises:
        InputError: one begins after its shot's end.
    """
    cues, film_end = list[Cue](), timeline.seconds(timeline.num_frames)
    for placed, following in zip_longest(timeline.shots, timeline.shots[1:]):
        begin, end = timeline.seconds(placed.start), timeline.seconds(placed.end)
        left = end if following is None else timeline.seconds(following.start)
        starts = sorted(each.at for each in placed.shot.caption)
        for each in placed.shot.caption:
            start = begin + each.at
            if start >= end:
                raise InputError(f"{timeline.script.where(placed.shot)}: caption {each.text!r} "
                                 f"begins at {each.at:g} s, but the shot lasts {end - begin:.3f} s "
                                 "in the film; place it earlier")
            following_s = next((begin + at for at in starts if at > each.at), max(left, start))
            following_s = end if following_s == start else following_s
            stop = following_s if each.duration is None else start + each.duration
            cues.append(Cue(each.text, start, min(stop, film_end)))
    return sorted(cues, key=lambda cue: (cue.start_s, cue.end_s))


def titles_of(timeline: Timeline) -> list[Burnt]:
    """Return the film's title over its first shot and the scenes' over theirs, if wanted."""
    script, made, scene = timeline.script, list[Burnt](), None
    if not script.project.finish.titles:
        return made
    for index, placed in enumerate(timeline.shots):
        texts = [script.project.title] if index == 0 else []
        if placed.shot.scene is not None and placed.shot.scene != scene:
            texts.append(script.scenes[placed.shot.scene].title)
        scene = placed.shot.scene
        text = "\n".join(each for each in texts if each)
        first = placed.start + placed.overlap
        if text:
            last = min(placed.end, first + round(TITLE_S * timeline.fps))
            made.append(Burnt(text, first, last, "title"))
    return made


def as_frames(cues: Sequence[Cue], timeline: Timeline) -> list[Burnt]:
    """Return cues by the frames that show them, at least one each."""
    made = []
    for cue in cues:
        first = round(cue.start_s * timeline.fps)
        last = max(first + 1, round(cue.end_s * timeline.fps))
        if first < timeline.num_frames:
            made.append(Burnt(cue.text, first, min(last, timeline.num_frames)))
    return made


class Burner:
    """Burns texts into frames: white with a dark outline, legible on any background.

    Args:
        size: (width, height) of the frames.
        font: TrueType or OpenType file; None: Pillow's own, or a system font where it lacks a sign.

    Attributes:
        font: the file that is used; None for Pillow's own.
        ranges: frames [first, last) that bear a text, in order; no two touch.

    Raises:
        InputError: a font that can't be read, or that lacks a sign of a text.
    """

    def __init__(self, texts: Sequence[Burnt], size: tuple[int, int], font: Path | None) -> None:
        self.texts, self.size, self.font = sorted(texts, key=lambda each: each.first), size, font
        self._find_font()
        self._font = lru_cache(lambda kind: _opened(self.font, round(
            0.85 * self._heights(kind)[0])))
        self._drawn = lru_cache(maxsize=8)(self._draw)
        self.ranges: list[tuple[int, int]] = []
        self._groups: list[list[Burnt]] = []
        for each in self.texts:
            if self.ranges and each.first <= self.ranges[-1][1]:
                self.ranges[-1] = self.ranges[-1][0], max(self.ranges[-1][1], each.last)
                self._groups[-1].append(each)
            else:
                self.ranges.append((each.first, each.last))
                self._groups.append([each])

    def burn(self, frame: Frames, number: int) -> Frames:
        """Return a film's frame uint8 [H, W, 3] by its number, with its texts."""
        group = bisect_right(self.ranges, number, key=lambda each: each[1])
        near = self._groups[group] if group < len(self._groups) else ()
        seen = [each for each in near if each.first <= number < each.last]
        for kind in ("caption", "title"):
            text = "\n".join(each.text for each in seen if each.kind == kind)
            if text:
                top, cover, light = self._drawn(text, kind)
                frame = np.array(frame)
                rows = frame[top : top + len(cover)]
                rows[:] = np.rint(rows * (1 - cover[..., None]) + light[..., None])
        return frame

    def check_room(self, timeline: Timeline) -> None:
        """Raise InputError if texts that are shown together have more lines than the picture."""
        seen = list[Burnt]()
        for first, fresh in groupby(self.texts, key=lambda each: each.first):
            seen = [*(each for each in seen if each.last > first), *fresh]
            for kind, remedy in _REMEDIES.items():
                texts = [each.text for each in seen if each.kind == kind] or [""]
                lines, room = self._lines("\n".join(texts), kind), self._room(kind)
                if len(lines) > room:
                    shown = " and ".join(map(quoted, texts))
                    shot = _shot_at(first, texts[-1], timeline)
                    raise InputError(
                        f"{timeline.script.where(shot)}: the {kind} {shown} "
                        f"takes {len(lines)} lines, but a picture of {self.size[0]}x{self.size[1]} "
                        f"has room for {room}; shorten it, make the picture larger, or {remedy}")

    def _draw(self, text: str, kind: str) -> tuple[int, Mask, Mask]:
        """Return a text's first row, its cover and its light, [h, W] each."""
        (width, height), lines = self.size, self._lines(text, kind)
        line, outline = self._heights(kind)
        font = self._font(kind)
        rows = len(lines) * line + 2 * outline
        ink, dark = (Image.new("L", (width, rows)) for _ in range(2))
        for number, words in enumerate(lines):
            place = width / 2, outline + (number + 0.5) * line
            ImageDraw.Draw(ink).text(place, words, 255, font, anchor="mm")
            ImageDraw.Draw(dark).text(place, words, 255, font, anchor="mm", stroke_width=outline,
                                      stroke_fill=255)
        light, shade = (np.asarray(image, np.float32) / 255 for image in (ink, dark))
        top = (height - rows) // 2 if kind == "title" else height - rows - height // 20
        cover = np.maximum(light, 0.85 * shade, dtype=np.float32)
        return max(0, top), cover, np.asarray(255 * light, np.float32)

    def _heights(self, kind: str) -> tuple[int, int]:
        line = max(_LEAST, round(_SHARE[kind] * self.size[1]))
        return line, max(1, round(_OUTLINE * line))

    def _room(self, kind: str) -> int:
        line, outline = self._heights(kind)
        return max(1, (self.size[1] - 2 * outline) // line)

    def _lines(self, text: str, kind: str) -> list[str]:
        font, width = self._font(kind), _WIDTH * self.size[0]
        return [part for each in text.splitlines() for part in _wrapped(each, font, width)]

    def _find_font(self) -> None:
        first, tried = self.font, [self.font]
        if first is None:
            tried += [path for name in _SYSTEM_FONTS if (path := _system_font(name))]
        lacking = None
        for self.font in tried:
            lacking = self._lacking()
            if lacking is None:
                return
        self.font = first
        sign, text = lacking or ("", "")
        raise InputError(f"{first or 'no font here'} has {'no' if first else 'the'} sign {sign!r} "
                         f"of the text {text!r}; name a font that has it as project.finish.font, "
                         "or give captions: track")

    def _lacking(self) -> tuple[str, str] | None:
        font = _opened(self.font, 20)
        missing = _mask(font, "\U0010ffff")
        signs = {sign: each.text for each in self.texts for sign in each.text}
        return next(((sign, text) for sign, text in signs.items()
                     if not sign.isspace() and _mask(font, sign) == missing), None)


def _shot_at(first: int, text: str, timeline: Timeline) -> Shot:
    """Return the shot whose text begins at a frame of the film; a transition shows two."""
    shown = [each.shot for each in timeline.shots if each.start <= first <= each.end]
    own = (shot for shot in shown if text in [each.text for each in shot.caption])
    return next(own, shown[-1])


def _opened(font: Path | None, points: int) -> ImageFont.FreeTypeFont:
    if font is None:
        own = ImageFont.load_default(points)
        assert isinstance(own, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
        return own
    try:
        return ImageFont.truetype(font, points)
    except OSError as error:
        raise InputError(f"font {font} can't be read: {error}; give a TrueType or OpenType "
                         "file") from error


def _system_font(name: str) -> Path | None:
    try:
        return Path(str(ImageFont.truetype(name, 20).path))
    except OSError:
        return None


def _mask(font: ImageFont.FreeTypeFont, sign: str) -> bytes:
    return bytes(font.getmask(sign))


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    lines, line = list[str](), ""
    for word in text.split():
        joined = f"{line} {word}".strip()
        if font.getlength(joined) <= width:
            line = joined
            continue
        lines += [line] if line else []
        while font.getlength(word) > width and len(word) > 1:
            count = max(1, math.floor(len(word) * width / font.getlength(word)))
            while count > 1 and font.getlength(word[:count]) > width:
                count -= 1
            lines.append(word[:count])
            word = word[count:]  # noqa: PLW2901
        line = word
    return [*lines, line] if line else lines
