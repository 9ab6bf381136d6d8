"""A film's texts: captions, titles and what is said, with their times, and burnt into the picture.

Rules: a caption without a duration stays until the shot's next one begins, else to the shot's end;
one with a duration may go on over the following shots, to the film's end at most. Captions that
are there at the same time stand one below the other.

Axes: H W rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vidgen.core.errors import InputError
from vidgen.media.encode import Frames
from vidgen.media.subtitles import Cue
from vidgen.story.script import Script
from vidgen.story.timeline import Timeline

TITLE_S = 3.0
"""How long a title stays, its shot's length at most."""
_SHARE = {"caption": 1 / 14, "title": 1 / 9}  # of the picture's height, for a line
_LEAST = 9  # pixels of a line; smaller letters can't be read
_WIDTH = 0.9  # of the picture, for a line
_OUTLINE = 1 / 10  # of a line's height

Mask = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True, slots=True)
class Burnt:
    """A text in the picture, from frame `first` up to `last` of the film."""

    text: str
    first: int
    last: int
    kind: Literal["caption", "title"] = "caption"


def captions_of(script: Script, timeline: Timeline) -> list[Cue]:
    """The captions of a film's shots with their times in the film.

    Raises:
        InputError: one that begins behind its shot's end.
    """
    cues, film_end = list[Cue](), timeline.seconds(timeline.num_frames)
    for placed in timeline.shots:
        begin, end = timeline.seconds(placed.start), timeline.seconds(placed.end)
        starts = sorted(each.at for each in placed.shot.caption)
        for each in placed.shot.caption:
            start = begin + each.at
            if start >= end:
                raise InputError(
                    f"{script.where(placed.shot)}: caption {each.text!r} begins at {each.at:g} s, "
                    f"but the shot lasts {end - begin:.3f} s in the film; place it earlier"
                )
            behind = next((begin + at for at in starts if at > each.at), end)
            stop = behind if each.duration is None else start + each.duration
            cues.append(Cue(each.text, start, min(stop, film_end)))
    return sorted(cues, key=lambda cue: (cue.start_s, cue.end_s))


def titles_of(script: Script, timeline: Timeline) -> list[Burnt]:
    """The film's title over its first shot, the scenes' over theirs; both over the first together.

    None where the script wants no titles.
    """
    made, scene = list[Burnt](), None
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
    """Cues by the frames in which they are seen, each in one at least."""
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
        texts: in order of their beginning.
        size: (width, height) of the frames.
        font: a TrueType or OpenType file; None is Pillow's own.

    Raises:
        InputError: a font that can't be read, or one without a sign that a text has.
    """

    def __init__(self, texts: Sequence[Burnt], size: tuple[int, int], font: Path | None) -> None:
        self.texts, self.size, self.font = sorted(texts, key=lambda each: each.first), size, font
        for each in self.texts:
            self._check_signs(each.text)
        self._drawn = lru_cache(maxsize=8)(self._draw)

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """Frames [first, last) that bear a text, in order, none of which touch."""
        joined: list[tuple[int, int]] = []
        for each in self.texts:
            if joined and each.first <= joined[-1][1]:
                joined[-1] = joined[-1][0], max(joined[-1][1], each.last)
            else:
                joined.append((each.first, each.last))
        return joined

    def burn(self, frame: Frames, number: int) -> Frames:
        """A film's frame uint8 [H, W, 3] by its number, with what is to be read in it."""
        seen = [each for each in self.texts if each.first <= number < each.last]
        for kind in ("caption", "title"):
            text = "\n".join(each.text for each in seen if each.kind == kind)
            if text:
                frame = self._laid(frame, *self._drawn(text, kind))
        return frame

    def _laid(self, frame: Frames, top: int, cover: Mask, light: Mask) -> Frames:
        made = np.array(frame)
        rows = made[top : top + len(cover)]
        rows[:] = np.rint(rows * (1 - cover[..., None]) + light[..., None]).astype(np.uint8)
        return made

    def _draw(self, text: str, kind: str) -> tuple[int, Mask, Mask]:
        """First row, how much a text hides there, and the light that it adds, [h, W] each."""
        width, height = self.size
        line = max(_LEAST, round(_SHARE[kind] * height))
        font, outline = self._open(round(0.8 * line)), max(1, round(_OUTLINE * line))
        lines = [part for each in text.splitlines()
                 for part in _wrapped(each, font, _WIDTH * width)]
        lines = lines[: max(1, (height - 2 * outline) // line)]
        rows = len(lines) * line + 2 * outline
        ink, dark = (Image.new("L", (width, rows)) for _ in range(2))
        for number, words in enumerate(lines):
            place = width / 2, outline + (number + 0.5) * line
            ImageDraw.Draw(ink).text(place, words, 255, font, anchor="mm")
            ImageDraw.Draw(dark).text(place, words, 255, font, anchor="mm", stroke_width=outline,
                                      stroke_fill=255)
        light, shade = (np.asarray(image, np.float32) / 255 for image in (ink, dark))
        margin = height // 20
        top = (height - rows) // 2 if kind == "title" else height - rows - margin
        return max(0, top), np.maximum(light, 0.85 * shade), 255 * light

    def _open(self, points: int) -> ImageFont.FreeTypeFont:
        if self.font is None:
            font = ImageFont.load_default(points)
            assert isinstance(font, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
            return font
        try:
            return ImageFont.truetype(self.font, points)
        except OSError as error:
            raise InputError(f"font {self.font} can't be read: {error}; give a TrueType or "
                             "OpenType file") from error

    def _check_signs(self, text: str) -> None:
        font = self._open(20)
        missing = _mask(font, "\U0010ffff")
        for sign in dict.fromkeys(text):
            if not sign.isspace() and _mask(font, sign) == missing:
                name = self.font or "Pillow's own font"
                raise InputError(f"{name} has no sign {sign!r} of the text {text!r}; give another "
                                 "as project.finish.font, or captions: track")


def _mask(font: ImageFont.FreeTypeFont, sign: str) -> bytes:
    return bytes(font.getmask(sign))


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """A text in lines that fit a width; a word that doesn't fit alone is parted."""
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
