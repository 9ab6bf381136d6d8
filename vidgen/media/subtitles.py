"""Subtitles as SubRip and WebVTT files, and as text tracks of film files.

Sources: 3GPP TS 26.245 (timed text in MP4, `mov_text`); W3C WebVTT; SubRip as Matroska describes
it (S_TEXT/UTF8).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from html import escape
from itertools import pairwise
from typing import TYPE_CHECKING, cast

from av.subtitles.subtitle import SubtitleSet

if TYPE_CHECKING:
    from av.container import OutputContainer
    from av.subtitles.stream import SubtitleStream

TRACKS = {".mp4": "mov_text", ".mov": "mov_text", ".webm": "webvtt", ".mkv": "subrip"}
"""The codec of a text track, by a file's suffix."""
_MS = Fraction(1, 1000)
_HEADER = (  # libav's encoders read texts as ASS and need its header
    b"[Script Info]\r\nScriptType: v4.00+\r\nPlayResX: 384\r\nPlayResY: 288\r\n\r\n[V4+ Styles]\r\n"
    b"Format: Name, Fontname, Fontsize, PrimaryColour, SecondaryColour, OutlineColour, BackColour, "
    b"Bold, Italic, Underline, StrikeOut, ScaleX, ScaleY, Spacing, Angle, BorderStyle, Outline, "
    b"Shadow, Alignment, MarginL, MarginR, MarginV, Encoding\r\n"
    b"Style: Default,Arial,16,&Hffffff,&Hffffff,&H0,&H0,0,0,0,0,100,100,0,0,1,1,0,2,10,10,10,1\r\n"
    b"\r\n[Events]\r\n"
    b"Format: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text\r\n"
)


@dataclass(frozen=True, slots=True)
class Cue:
    """A subtitle with start and end in seconds, and its speaker if it is spoken."""

    text: str
    start_s: float
    end_s: float
    speaker: str | None = None


def one_at_a_time(cues: Sequence[Cue]) -> list[Cue]:
    """Return cues without overlap: simultaneous ones become one of several lines."""
    times = sorted({time for cue in cues for time in (cue.start_s, cue.end_s)})
    ordered = sorted(cues, key=lambda cue: (cue.start_s, cue.end_s))
    made, active, ahead = list[Cue](), list[Cue](), 0
    for start, end in pairwise(times):
        active = [cue for cue in active if cue.end_s > start]
        while ahead < len(ordered) and ordered[ahead].start_s <= start:
            active.append(ordered[ahead])
            ahead += 1
        text = "\n".join(cue.text for cue in active)
        if text and made and (made[-1].text, made[-1].end_s) == (text, start):
            made[-1] = Cue(text, made[-1].start_s, end)
        elif text:
            made.append(Cue(text, start, end))
    return made


def as_srt(cues: Sequence[Cue]) -> str:
    """Return cues in the format of a SubRip file."""
    parts = (f"{n}\n{_clock(cue.start_s, ',')} --> {_clock(cue.end_s, ',')}\n{_lines(cue.text)}\n"
             for n, cue in enumerate(cues, 1))
    return "\n".join(parts)


def as_webvtt(cues: Sequence[Cue]) -> str:
    """Return cues in the format of a WebVTT file, with the names of speakers."""
    parts = ["WEBVTT\n"]
    for cue in cues:
        text = escape(_lines(cue.text), quote=False)
        voice = f"<v {escape(cue.speaker, quote=False)}>" if cue.speaker else ""
        parts.append(f"{_clock(cue.start_s, '.')} --> {_clock(cue.end_s, '.')}\n{voice}{text}\n")
    return "\n".join(parts)


class TextTrack:
    """A container's text track, written as its picture advances.

    Cues are in order and don't overlap, as from `one_at_a_time`; `suffix` is one of `TRACKS`.
    """

    def __init__(self, cues: Sequence[Cue], suffix: str) -> None:
        self.codec, self._left = TRACKS[suffix], iter(cues)
        self._next: Cue | None = next(self._left, None)

    def begin(self, container: OutputContainer) -> None:
        """Add the stream to a container, before anything is muxed."""
        self._container = container
        self._stream = cast("SubtitleStream", container.add_stream(self.codec))
        self._stream.time_base = _MS
        context = self._stream.codec_context
        context.time_base, context.subtitle_header = _MS, _HEADER
        context.open()

    def advance(self, seconds: float) -> None:
        """Write the cues that start by `seconds`."""
        while self._next is not None and self._next.start_s <= seconds:
            cue, self._next = self._next, next(self._left, None)
            start, end = (round(1000 * time) for time in (cue.start_s, cue.end_s))
            packet = self._stream.codec_context.encode_subtitle(
                SubtitleSet.create(_as_ass(cue.text), 0, end - start, 1000 * start)
            )
            packet.pts = packet.dts = start
            packet.duration, packet.time_base, packet.stream = end - start, _MS, self._stream
            self._container.mux(packet)

    def finish(self) -> None:
        """Write the remaining cues."""
        self.advance(float("inf"))


def _as_ass(text: str) -> bytes:
    # braces and backslashes would be commands; replace them by look-alikes
    plain = text.replace("\\", "\u29f5").replace("{", "\u2774").replace("}", "\u2775")
    return ("0,0,Default,,0,0,0,," + _lines(plain).replace("\n", "\\N")).encode()


def _lines(text: str) -> str:
    """Remove empty lines, which would end a cue."""
    return "\n".join(line.strip() for line in text.splitlines() if line.strip())


def _clock(seconds: float, mark: str) -> str:
    whole, ms = divmod(round(1000 * seconds), 1000)
    minutes, second = divmod(whole, 60)
    return f"{minutes // 60:02}:{minutes % 60:02}:{second:02}{mark}{ms:03}"
