"""Where a job's files lie, below its folder; and how what comes in gets there.

    videos/ID/ and films/ID/
        inputs/             what came with the request; of a film its script, too
        video.mp4, film.mp4 what was made; it appears when it is whole
        thumbnail.webp, spritesheet.jpg, recipe.json
        film.html, film.srt, film.vtt, film.shots/
        shots/ID.mp4, shots/ID.webp, shots/ID.SEED.mp4 of each take where there are several

Imported by all processes of the service, so it needs neither torch nor libav.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from vidgen.core.errors import InputError
from vidgen.server.body import Upload
from vidgen.server.schema import FilmAsk
from vidgen.server.sniff import is_font, sniff

INPUTS, SHOTS, FILM_SHOTS = "inputs", "shots", "film.shots"
VIDEO, FILM = "video.mp4", "film.mp4"
THUMBNAIL, SPRITESHEET, RECIPE = "thumbnail.webp", "spritesheet.jpg", "recipe.json"
STORYBOARD = "film.html"
_FILE = re.compile(r"\w[\w .-]{0,99}")
_FORMATS = {".yaml": "yaml", ".yml": "yaml", ".json": "json", ".txt": "txt"}


def link(source: Path, target: Path) -> None:
    """The same file under another name, without its bytes twice where the disk can do that."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def lay_down(ask: FilmAsk, folder: Path) -> Path:
    """Put a film's script and the files that it names into its job's folder.

    Returns:
        The script.

    Raises:
        InputError: a name that is none, or a file that isn't taken.
    """
    inputs = folder / INPUTS
    for upload in ask.files or ():
        if not isinstance(upload, Upload):
            raise InputError("files must be files, in multipart/form-data")
        _check_file(upload)
        upload.path.replace(inputs / upload.name)
    kind: str = ask.format
    text = ask.script
    if isinstance(text, Upload):
        kind = _FORMATS.get(Path(text.name).suffix.lower(), kind)
        text.path.replace(inputs / f"script.{kind}")
        return inputs / f"script.{kind}"
    if isinstance(text, dict):
        kind, text = "json", json.dumps(text, ensure_ascii=False)
    if not isinstance(text, str) or not text.strip():
        raise InputError("script is empty; give it as an object, as text, or as a file")
    (inputs / f"script.{kind}").write_text(text, encoding="utf-8")
    return inputs / f"script.{kind}"


def take_over(before: Path, folder: Path) -> None:
    """Have an earlier film's shots and files in a new film's folder, but for those that it has."""
    for name in (INPUTS, FILM_SHOTS):
        (folder / name).mkdir(exist_ok=True)
        for path in (before / name).glob("*"):
            target = folder / name / path.name
            is_script = name == INPUTS and path.stem == "script"
            if path.is_file() and not is_script and not target.exists():
                with suppress(FileNotFoundError):  # the earlier film may be at work
                    link(path, target)


def _check_file(upload: Upload) -> None:
    name = upload.name
    if not _FILE.fullmatch(name) or Path(name).stem == "script":
        raise InputError(f"a file is called {name[:100]!r}; give letters, digits, spaces, . _ and "
                         "-, and not script")
    if not is_font(upload.path):
        sniff(upload.path, f"file {name!r}", "picture", "video", "sound")


def shot_file(folder: Path, shot: str, seed: int | None = None) -> Path:
    """Where a film's shot lies, or the take of a seed where it has several."""
    return folder / SHOTS / (f"{shot}.mp4" if seed is None else f"{shot}.{seed}.mp4")


def content_of(folder: Path, kind: str, variant: str) -> tuple[Path, str] | None:
    """Where a variant of what was made lies, and its type; None where there is no such variant."""
    files: dict[str, tuple[str, str]] = {
        "video": (FILM if kind == "film" else VIDEO, "video/mp4"),
        "thumbnail": (THUMBNAIL, "image/webp"), "spritesheet": (SPRITESHEET, "image/jpeg"),
    }
    if kind == "film":
        files.pop("spritesheet")
        files |= {"storyboard": (STORYBOARD, "text/html"), "vtt": ("film.vtt", "text/vtt"),
                  "srt": ("film.srt", "application/x-subrip")}
    if variant not in files:
        return None
    name, media = files[variant]
    return folder / name, media


def without_folders(text: str, data: Path) -> str:
    """A message for clients, who need not know in which folders of the service things lie."""
    return re.sub(rf"{re.escape(str(data))}/(?:(?:videos|films)/\w+/(?:{INPUTS}/)?)?", "", text)


def read_recipe(folder: Path) -> Any:
    """The recipe of a finished clip; None where there is none."""
    with suppress(OSError, ValueError):
        return json.loads((folder / RECIPE).read_bytes())
    return None
