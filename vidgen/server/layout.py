"""A job's folder: its inputs and outputs, and detection of media by their first bytes.

    videos/ID/ and films/ID/
        inputs/             files of the request; a film's script, too
        video.mp4, film.mp4 the result; it appears once it is complete
        thumbnail.webp, recipe.json
        film.html, film.srt, film.vtt, film.shots/
        shots/ID.mp4, shots/ID.webp; shots/ID.SEED.mp4 of each of several takes

Playlists and other formats that could lead a reader to further files are refused.

All processes of the service import this module, so it must not import torch or libav.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from vidgen.core.errors import InputError, OptionError
from vidgen.core.request import NO_AUDIO, OWN_AUDIO
from vidgen.core.runtime import link
from vidgen.server.schema import FilmRequest
from vidgen.server.types import Kind, Upload

INPUTS, SHOTS, FILM_SHOTS = "inputs", "shots", "film.shots"
VIDEO, FILM = "video.mp4", "film.mp4"
THUMBNAIL, RECIPE = "thumbnail.webp", "recipe.json"
STORYBOARD = "film.html"
_FILES = ("image", "last_image", "mask", "video", "prefix", "audio")
_FILE = re.compile(r"\w[\w .-]{0,99}")
_FORMATS = {".yaml": "yaml", ".yml": "yaml", ".json": "json"}
Medium = Literal["picture", "video", "sound", "font"]
_TAKEN = {
    "picture": "PNG, JPEG, WebP or GIF", "video": "MP4, MOV, WebM or MKV",
    "sound": "WAV, FLAC, MP3, Ogg, M4A or a video", "font": "TrueType or OpenType",
}
_STARTS: dict[bytes, tuple[Medium, str]] = {
    rb"\x89PNG\r\n\x1a\n": ("picture", ".png"), rb"\xff\xd8\xff": ("picture", ".jpg"),
    rb"GIF8[79]a": ("picture", ".gif"), rb"RIFF.{4}WEBP": ("picture", ".webp"),
    rb".{4}ftypM4A": ("sound", ".m4a"), rb".{4}ftyp": ("video", ".mp4"),
    rb"\x1a\x45\xdf\xa3.*webm": ("video", ".webm"), rb"\x1a\x45\xdf\xa3": ("video", ".mkv"),
    rb"RIFF.{4}WAVE": ("sound", ".wav"), rb"fLaC": ("sound", ".flac"), rb"OggS": ("sound", ".ogg"),
    rb"ID3|\xff[\xe2\xe3\xea\xeb\xf2\xf3\xfa\xfb]": ("sound", ".mp3"),
    rb"\x00\x01\x00\x00|OTTO|true": ("font", ".ttf"),
}
"""Media and suffixes by patterns of a file's first bytes; the first match counts."""
CONTENTS: dict[Kind, dict[str, str]] = {
    "video": {"video": VIDEO, "thumbnail": THUMBNAIL, "recipe": RECIPE},
    "film": {"video": FILM, "thumbnail": THUMBNAIL, "storyboard": STORYBOARD, "vtt": "film.vtt",
             "srt": "film.srt"},
}
"""Files of each kind of job, by variant."""
MEDIA_TYPES = {
    ".mp4": "video/mp4", ".webp": "image/webp", ".json": "application/json", ".html": "text/html",
    ".vtt": "text/vtt", ".srt": "application/x-subrip",
}
"""Media types of the files, by suffix."""


def lay_down(body: FilmRequest, folder: Path) -> Path:
    """Move a film's script and its files to the job's folder; return the script's path.

    Raises:
        InputError: a file has an invalid name or an unsupported type.
    """
    inputs = folder / INPUTS
    for upload in body.files or ():
        if not isinstance(upload, Upload):
            raise OptionError("files must be files, in multipart/form-data", "files")
        name = upload.name
        if not _FILE.fullmatch(name) or Path(name).stem == "script":
            raise InputError(f"a file has the name {name[:100]!r}; use letters, digits, spaces, . "
                             "_ and -, but not script")
        sniff(upload.path, f"file {name!r}", "picture", "video", "sound", "font")
        upload.path.replace(inputs / name)
    kind: str = body.format
    text = body.script
    if isinstance(text, Upload):
        kind = _FORMATS.get(Path(text.name).suffix.lower(), kind)
        text.path.replace(inputs / f"script.{kind}")
        return inputs / f"script.{kind}"
    if isinstance(text, dict):
        kind, text = "json", json.dumps(text, ensure_ascii=False)
    if not isinstance(text, str) or not text.strip():
        raise OptionError("script is empty; give it as an object, as text, or as a file", "script")
    (inputs / f"script.{kind}").write_text(text, encoding="utf-8")
    return inputs / f"script.{kind}"


def files_of(folder: Path, options: Mapping[str, Any]) -> dict[str, str]:
    """Return the paths of the input files in a clip's options, by option."""
    return {name: str(folder / options[name]) for name in _FILES
            if options.get(name) not in (None, NO_AUDIO, OWN_AUDIO)}


def take_over(before: Path, folder: Path) -> None:
    """Link an earlier film's shots and inputs into a new film's folder, except existing ones."""
    for name in (INPUTS, FILM_SHOTS):
        (folder / name).mkdir(exist_ok=True)
        for path in (before / name).glob("*"):
            target = folder / name / path.name
            is_script = name == INPUTS and path.stem == "script"
            if path.is_file() and not is_script and not target.exists():
                with suppress(FileNotFoundError):  # the earlier film may be running
                    link(path, target)


def shot_file(folder: Path, shot: str, seed: int | None = None) -> Path:
    """Return the file of a film's shot, or of its take with a seed."""
    return folder / SHOTS / (f"{shot}.mp4" if seed is None else f"{shot}.{seed}.mp4")


def without_folders(text: str, data: Path) -> str:
    """Return a message for clients, with the service's folders removed from paths."""
    return re.sub(rf"{re.escape(str(data))}/(?:(?:videos|films)/\w+/(?:{INPUTS}/)?)?", "", text)


def sniff(path: Path, option: str, *media: Medium) -> tuple[Medium, str]:
    """Return a file's medium and suffix, by its first bytes.

    Raises:
        InputError: it is none of `media`; the message names the `option`.
    """
    with path.open("rb") as file:
        head = file.read(64)
    found = next((kind for start, kind in _STARTS.items() if re.match(start, head, re.DOTALL)),
                 None)
    if found is not None and found[0] == "video" and "video" not in media and "sound" in media:
        found = "sound", found[1]
    if found is None or found[0] not in media:
        what = "of another type" + (f" ({found[1]})" if found else "") if head else "empty"
        raise InputError(f"{option} is {what}; give {'; '.join(_TAKEN[each] for each in media)}")
    return found
