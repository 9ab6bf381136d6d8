"""Finding videos, pictures and their captions in folders, without opening the media."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vidgen.core.errors import InputError
from vidgen.media.read import PICTURE_SUFFIXES
from vidgen.training.data import texts
from vidgen.training.data.config import DataConfig
from vidgen.training.data.texts import Texts, Unreadable

FILM_SUFFIXES = (
    ".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts",
    ".wmv", ".flv", ".3gp", ".ogv", ".mxf",
)


@dataclass(frozen=True)
class MediaFile:
    """A video or picture with what is said of it."""

    folder: int  # which of the config's folders it lies in; -1: the one for validation
    name: str  # its path below that folder
    path: Path  # the file
    num_bytes: int  # its size
    mtime_ns: int  # when it was changed last
    captions: tuple[str, ...] = ()  # one of which is drawn each time; none where it has none
    notes: tuple[str, ...] = ()  # what had to be guessed to read them, or why they can't be


@dataclass
class Scan:
    """What folders hold."""

    files: list[MediaFile] = field(default_factory=list)  # by folder and name
    notes: list[str] = field(default_factory=list)  # about tables and files that are no media


def scan(config: DataConfig) -> Scan:
    """Find all files of a config's folders, the one for validation included.

    Raises:
        InputError: a folder that is missing or holds no media.
    """
    found = Scan()
    for number, each in enumerate(config.folders):
        _scan_folder(Path(each.path), number, config, found)
    if config.validation is not None:
        _scan_folder(Path(config.validation), -1, config, found)
    return found


def _scan_folder(root: Path, number: int, config: DataConfig, found: Scan) -> None:
    if not root.is_dir():
        raise InputError(f"data folder {root} is no folder; give one of videos and pictures")
    media, beside, tables = list[Path](), dict[str, Path](), list[Path]()
    others: Counter[str] = Counter()
    for path in _walk(root):
        suffix = path.suffix.lower()
        if suffix in FILM_SUFFIXES or suffix in PICTURE_SUFFIXES:
            media.append(path)
        elif suffix in texts.SIDECARS:
            beside[str(path.relative_to(root)).lower()] = path
        elif suffix in texts.TABLES:
            tables.append(path)
        else:
            others[suffix or path.name] += 1
    if not media:
        raise InputError(
            f"data folder {root} holds neither videos nor pictures; known are "
            f"{', '.join((*FILM_SUFFIXES, *PICTURE_SUFFIXES))}")
    if others:
        kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common(8))
        found.notes.append(f"{root}: files that are no media were left alone: {kinds}")
    rows = _read_tables(root, tables, config, found.notes)
    for path in media:
        found.files.append(_media_file(root, number, path, rows, beside, config))
    missing = sorted(rows.keys() - {str(path.resolve()) for path in media})
    if missing:
        found.notes.append(
            f"{root}: {len(missing)} files that its tables name are not there: "
            f"{', '.join(missing[:5])}")


def _walk(root: Path) -> Iterator[Path]:
    """Files below a folder by name, links followed once, hidden ones left out."""
    seen = set[tuple[int, int]]()
    for place, folders, names in os.walk(root, followlinks=True):
        facts = Path(place).stat()
        if (facts.st_dev, facts.st_ino) in seen:  # a link back
            folders.clear()
            continue
        seen.add((facts.st_dev, facts.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                yield Path(place, name)


def _read_tables(
    root: Path, tables: Sequence[Path], config: DataConfig, notes: list[str]
) -> dict[str, Texts]:
    """Captions by the absolute path of the file that a table names."""
    rows: dict[str, Texts] = {}
    for path in tables:
        try:
            made = texts.table(path, config.caption_keys, config.caption_encoding)
        except Unreadable as error:
            raise InputError(f"table {path} {error}; mend it, or move it elsewhere") from None
        if made is None:
            notes.append(f"{root}: {path.name} names no files, so it was left alone")
            continue
        notes += made[1]
        for name, told in made[0].items():
            try:
                place = str((path.parent / name).resolve())
            except (OSError, ValueError):  # a zero byte, half a character, too long
                notes.append(f"{path.name} names {name[:80]!r}, as which no file can be called; "
                             "its captions don't count")
                continue
            if place in rows and rows[place] != told:
                notes.append(f"{name} stands in several tables; {path.name} doesn't count")
            rows.setdefault(place, told)
    return rows


def _media_file(
    root: Path, number: int, path: Path, rows: dict[str, Texts], beside: dict[str, Path],
    config: DataConfig,
) -> MediaFile:
    name = path.relative_to(root).as_posix()
    try:
        facts = path.stat()
    except OSError as error:
        return MediaFile(number, name, path, 0, 0, notes=(f"can't be read: {error.strerror}",))
    told, problems = rows.get(str(path.resolve()), Texts(())), list[str]()
    for suffix in texts.SIDECARS:  # clip.txt, clip.mp4.txt, clip.json, clip.mp4.json
        for candidate in (path.with_suffix(suffix), path.with_name(path.name + suffix)):
            file = beside.get(str(candidate.relative_to(root)).lower())
            if file is None or told.captions:
                continue
            try:
                told = texts.sidecar(file, config.caption_keys, config.caption_encoding)
                if not told.captions:
                    problems.append(f"{file.name} is empty")
            except Unreadable as error:
                problems.append(f"{file.name} {error}")
    notes = told.notes if told.captions else tuple(problems)
    return MediaFile(number, name, path, facts.st_size, facts.st_mtime_ns, told.captions, notes)
