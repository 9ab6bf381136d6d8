"""What a file is by its first bytes, whatever it is called; anything else is not let in.

Playlists and other formats by which a reader could be led to further files are none of these.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from vidgen.core.errors import InputError

Medium = Literal["picture", "video", "sound"]
_TAKEN = {
    "picture": "PNG, JPEG, WebP or GIF", "video": "MP4, MOV, WebM or MKV",
    "sound": "WAV, FLAC, MP3, Ogg, M4A or a video",
}

_WEBP: tuple[Medium, str] = ("picture", ".webp")
_WAV: tuple[Medium, str] = ("sound", ".wav")
_STARTS: dict[bytes, tuple[Medium, str]] = {
    b"\x89PNG\r\n\x1a\n": ("picture", ".png"), b"\xff\xd8\xff": ("picture", ".jpg"),
    b"GIF87a": ("picture", ".gif"), b"GIF89a": ("picture", ".gif"), b"fLaC": ("sound", ".flac"),
    b"OggS": ("sound", ".ogg"), b"ID3": ("sound", ".mp3"),
}
_FONTS = (b"\0\1\0\0", b"OTTO", b"true")


def sniff(path: Path, option: str, *media: Medium) -> tuple[Medium, str]:
    """A file's medium and suffix.

    Args:
        path: of the file.
        option: that it was given by, for the message.
        media: that are taken there.

    Raises:
        InputError: it is none of them.
    """
    with path.open("rb") as file:
        head = file.read(64)
    found = _kind(head)
    if found is not None and found[0] == "video" and "video" not in media and "sound" in media:
        found = "sound", found[1]
    if found is None or found[0] not in media:
        taken = "; ".join(_TAKEN[medium] for medium in media)
        kind = f"of another kind ({found[1]})" if found else "of another kind"
        what = kind if head else "empty"
        raise InputError(f"{option} is {what}; give {taken}")
    return found


def is_font(path: Path) -> bool:
    """Whether a file is TrueType or OpenType."""
    with path.open("rb") as file:
        return file.read(4) in _FONTS


def _kind(head: bytes) -> tuple[Medium, str] | None:
    for start, found in _STARTS.items():
        if head.startswith(start):
            return found
    if head[:4] == b"RIFF":
        return {b"WEBP": _WEBP, b"WAVE": _WAV}.get(head[8:12])
    if head[4:8] == b"ftyp":
        return ("sound", ".m4a") if head[8:11] == b"M4A" else ("video", ".mp4")
    if head.startswith(b"\x1a\x45\xdf\xa3"):
        return "video", ".webm" if b"webm" in head else ".mkv"
    is_mpeg_sound = len(head) > 1 and head[0] == 0xFF and head[1] & 0xE6 == 0xE2
    return ("sound", ".mp3") if is_mpeg_sound else None
