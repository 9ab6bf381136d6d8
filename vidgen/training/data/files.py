"""Find videos, pictures and their captions in folders, without opening the media.

Captions are in text files next to a file, or in tables.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vidgen.core.errors import InputError
from vidgen.media.read import PICTURE_SUFFIXES
from vidgen.training.config import Bucket, DataConfig
from vidgen.training.data.probe import FileFacts

MEDIA_SUFFIXES = (
    ".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts",
    ".wmv", ".flv", ".3gp", ".ogv", ".mxf", *PICTURE_SUFFIXES,
)
FILE_KEYS = ("file_name", "file", "filename", "path", "video", "video_path", "image", "image_path",
             "media")
"""Columns or keys of a table that name the file; the first one found is used."""
CAPTION_KEYS = ("caption", "text", "prompt", "description")
"""Columns or keys with captions; the first one found is used."""
TABLES = (".csv", ".jsonl")
MAX_BYTES = 10_000_000
"""Limit of a caption file's size."""
_DELIMITERS = (",", ";", "\t")
_SURPLUS = "\0"
"""Key of a CSV row's values beyond the header's columns."""
_HALF = re.compile("[\ud800-\udfff]")
_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16",
          codecs.BOM_UTF16_BE: "utf-16"}

Captions = tuple[str, ...]
"""Captions of one file, one of which is drawn for each batch."""


class Unreadable(Exception):
    """A caption file is invalid; the text has the reason."""


@dataclass(frozen=True)
class Item:
    """Hold a stretch of a file, or a picture, as one sample of a bucket."""

    folder: int  # index of its folder in the config; -1: the one for validation
    name: str  # path of its file below that folder
    path: Path
    sha256: str  # of the file's bytes
    bucket: Bucket
    start: int  # its first frame in the file
    end: int  # frame of the file after its last one
    captions: Captions  # with the prefix
    group: str  # hash shared by similar files, which are held out together or not at all

    @property
    def key(self) -> str:
        """Hash of the item's pixels at a given frame rate."""
        facts = (self.sha256, self.bucket.label, self.start, self.end)
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


@dataclass
class MediaFile:
    """Hold a video or picture: found by `scan`, decoded by `probe_files`, cut by `select`."""

    folder: int  # index of its folder in the config; -1: the one for validation
    name: str  # path below that folder
    path: Path
    num_bytes: int = 0
    mtime_ns: int = 0  # modification time
    captions: Captions = ()
    notes: list[str] = field(default_factory=list)
    facts: FileFacts = field(default_factory=FileFacts)
    items: list[Item] = field(default_factory=list)  # empty if it is dropped
    dropped: str | None = None  # reason, or None


def scan(config: DataConfig) -> tuple[list[MediaFile], list[str]]:
    """Return all files of a config's folders, and notes; InputError for none, or a bad table."""
    folders = {number: each.path for number, each in enumerate(config.folders)}
    if config.validation is not None:
        folders[-1] = config.validation
    files, notes = list[MediaFile](), list[str]()
    for number, folder in folders.items():
        files += _scan_folder(Path(folder), number, config.caption_encoding, notes)
    return files, notes


def _scan_folder(
    root: Path, number: int, encoding: str, notes: list[str]
) -> Iterator[MediaFile]:
    if not root.is_dir():
        raise InputError(f"data folder {root} is not a folder; give one of videos and pictures")
    paths = [(path, path.suffix.lower()) for path in _walk(root)]
    media = [path for path, suffix in paths if suffix in MEDIA_SUFFIXES]
    texts = {str(path).lower(): path for path, suffix in paths if suffix == ".txt"}
    others = Counter(suffix or path.name for path, suffix in paths
                     if suffix not in (*MEDIA_SUFFIXES, *TABLES, ".txt"))
    if not media:
        raise InputError(f"data folder {root} holds neither videos nor pictures; known suffixes "
                         f"are {', '.join(MEDIA_SUFFIXES)}")
    if others:
        kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common(8))
        notes.append(f"{root}: other files are ignored: {kinds}")
    rows: dict[Path, Captions] = {}
    for path, suffix in paths:
        if suffix in TABLES:
            _add_table(rows, path, encoding, notes)
    missing = sorted(map(str, rows.keys() - {path.resolve() for path in media}))
    if missing:
        notes.append(f"{root}: {len(missing)} files that its tables name don't exist: "
                     f"{', '.join(missing[:5])}")
    for path in media:
        file = MediaFile(number, path.relative_to(root).as_posix(), path)
        try:
            stat = path.stat()
            file.num_bytes, file.mtime_ns = stat.st_size, stat.st_mtime_ns
        except OSError as error:
            file.notes.append(f"can't be read: {error.strerror}")
        file.captions = rows.get(path.resolve(), ()) or _next_to(path, texts, encoding, file.notes)
        yield file


def _walk(root: Path) -> Iterator[Path]:
    """Yield files below a folder by name, without hidden ones; follow links once."""
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


def _add_table(
    rows: dict[Path, Captions], path: Path, encoding: str, notes: list[str]
) -> None:
    """Add a table's captions to `rows`, by the absolute path of the file that it names."""
    try:
        made = table(path, encoding)
    except Unreadable as error:
        raise InputError(f"table {path} {error}; correct it, or move it elsewhere") from None
    if made is None:
        notes.append(f"{path} names no files and is ignored")
        return
    notes += made[1]
    for name, captions in made[0].items():
        try:
            place = (path.parent / name).resolve()
        except (OSError, ValueError):  # a zero byte, a lone surrogate, or too long
            notes.append(f"{path.name} names {name[:80]!r}, an invalid file name; its captions "
                         "are ignored")
            continue
        if rows.setdefault(place, captions) != captions:
            notes.append(f"{name} is in several tables; its entry in {path.name} is ignored")


def _next_to(
    path: Path, texts: Mapping[str, Path], encoding: str, notes: list[str]
) -> Captions:
    """Return the caption in clip.txt or clip.mp4.txt, in any case."""
    for candidate in (path.with_suffix(".txt"), path.with_name(f"{path.name}.txt")):
        file = texts.get(str(candidate).lower())
        if file is None:
            continue
        try:
            captions = sidecar(file, encoding)
        except Unreadable as error:
            notes.append(f"{file.name} {error}")
            continue
        if captions:
            return captions
        notes.append(f"{file.name} is empty")
    return ()


def sidecar(path: Path, encoding: str = "auto") -> Captions:
    """Return the caption of a .txt file, () if it is empty; raise Unreadable if it is invalid."""
    return _clean([_read(path, encoding)])


def _read(path: Path, encoding: str) -> str:
    """Return a file's text; the encoding "auto" is that of a byte order mark, else UTF-8."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise Unreadable(f"has over {MAX_BYTES // 1_000_000} MB, too much for captions")
        content = path.read_bytes()
    except OSError as error:
        raise Unreadable(f"can't be read: {error.strerror}") from None
    if encoding == "auto":
        encoding = next((_MARKS[mark] for mark in _MARKS if content.startswith(mark)), "utf-8")
    remedy = "save it as UTF-8, or set data.caption_encoding"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise Unreadable(f"is not text in {encoding}: {error.reason}; {remedy}") from None
    if "\0" in text:  # UTF-32, or UTF-16 without its mark
        raise Unreadable(f"has zero bytes, so it isn't text in {encoding}; {remedy}")
    return text


def _clean(texts: Sequence[Any]) -> Captions:
    if not all(isinstance(each, str) for each in texts):
        raise Unreadable("has a caption that is not text")
    squeezed = [" ".join(text.split()) for text in texts]
    if any(_HALF.search(text) for text in squeezed):
        raise Unreadable("has half of a character (a lone surrogate); write the whole "
                         "character, or delete it")
    return tuple(dict.fromkeys(text for text in squeezed if text))


def table(path: Path, encoding: str = "auto") -> tuple[dict[str, Captions], list[str]] | None:
    """Return the captions by file of a CSV or JSON Lines table, and notes; None: it names no files.

    Names are as written: relative to the table's folder, or absolute.

    Raises:
        Unreadable: the table names files, but is invalid; has the line.
    """
    text, notes = _read(path, encoding), list[str]()
    rows = _csv_rows(text) if path.suffix.lower() == ".csv" else _json_rows(text)
    found: dict[str, Captions] = {}
    columns: dict[str, None] = {}
    for line, row in rows:
        column = next((key for key in FILE_KEYS if isinstance(row.get(key), str)), None)
        if column is None:
            if not found and line <= 2:  # another kind of table
                return None
            notes.append(f"{path.name}, line {line}, names no file ({', '.join(FILE_KEYS)})")
            continue
        if any(row.get(_SURPLUS) or ()):
            raise Unreadable(f"line {line} has more values than the header has columns; put "
                             "captions with the column separator in double quotes")
        columns |= dict.fromkeys(row)
        name = row[column].strip()
        if not name:
            notes.append(f"{path.name}, line {line}, has an empty {column}")
            continue
        given: Any = next((row[key] for key in CAPTION_KEYS if row.get(key)), [])
        try:
            captions = _clean(given if isinstance(given, list) else [given])
        except Unreadable as error:
            raise Unreadable(f"line {line} {error}") from None
        name = name.replace("\\", "/").removeprefix("./")
        if name in found:
            notes.append(f"{path.name}, line {line}, names {name} again; both captions are used")
        found[name] = tuple(dict.fromkeys((*found.get(name, ()), *captions)))
    if found and columns.keys().isdisjoint(CAPTION_KEYS):
        have = ", ".join(key for key in columns if key and key != _SURPLUS)
        notes.append(f"{path.name} has no captions: its columns are {have}; captions are in "
                     f"{', '.join(CAPTION_KEYS)}")
    return found, notes


def _csv_rows(text: str) -> Iterable[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), restkey=_SURPLUS,
                            delimiter=_delimiter(text), strict=True)
    try:
        for row in reader:
            yield reader.line_num, {(k or "").strip().lower(): v for k, v in row.items()}
    except csv.Error as error:
        raise Unreadable(f"line {reader.line_num} is not valid CSV: {error}") from None


def _delimiter(text: str) -> str:
    header = text.lstrip("\r\n").partition("\n")[0].lower()
    columns = {sign: [name.strip(' \r"') for name in header.split(sign)] for sign in _DELIMITERS}
    return max(columns, key=lambda sign: (not {*FILE_KEYS}.isdisjoint(columns[sign]),
                                          len(columns[sign])))


def _json_rows(text: str) -> Iterable[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines, as a text may have U+2028
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise Unreadable(f"line {number} is not valid JSON: {error}") from None
        if not isinstance(row, dict):
            raise Unreadable(f"line {number} is not a JSON object")
        yield number, row
