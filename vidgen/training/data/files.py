"""Find videos, pictures and their captions in folders, without opening the media.

Captions are in text or JSON files next to a file, or in tables, in any encoding.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidgen.core.errors import InputError
from vidgen.media.read import PICTURE_SUFFIXES
from vidgen.training.data.config import DataConfig

FILM_SUFFIXES = (
    ".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts",
    ".wmv", ".flv", ".3gp", ".ogv", ".mxf",
)
FILE_KEYS = ("file_name", "file", "filename", "path", "video", "video_path", "image", "image_path",
             "media")
"""Columns or keys of a table that name the file; the first one found is used."""
CAPTION_KEYS = ("caption", "text", "prompt", "description")
"""Columns or keys with captions; the first one found is used."""
TABLES = (".csv", ".jsonl")
SIDECARS = (".txt", ".json")
MAX_BYTES = 10_000_000
"""Limit of a caption file's size."""
LIKELY = ("cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp1255", "cp1256", "cp1257", "cp1258",
          "koi8_r", "cp932", "euc_jp", "gb18030", "big5", "cp949", "cp874")
"""Encodings to guess from."""
_DELIMITERS = (",", ";", "\t")
_SURPLUS = "\0"
"""Key of a CSV row's values beyond the header's columns."""
_HALF = re.compile("[\ud800-\udfff]")
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)

Captions = tuple[str, ...]
"""Captions of one file, one of which is drawn for each batch."""


class Unreadable(Exception):
    """A caption file is invalid; the text has the reason."""


@dataclass(frozen=True)
class MediaFile:
    """Hold a video or picture with its captions."""

    folder: int  # index of its folder in the config; -1: the one for validation
    name: str  # path below that folder
    path: Path
    num_bytes: int
    mtime_ns: int  # modification time
    captions: Captions = ()
    notes: tuple[str, ...] = ()  # guesses and errors in reading captions


def scan(config: DataConfig) -> tuple[list[MediaFile], list[str]]:
    """Return all files of a config's folders, including that for validation, and notes.

    Raises:
        InputError: a folder doesn't exist or holds no media, or a table is invalid.
    """
    folders = {number: each.path for number, each in enumerate(config.folders)}
    if config.validation is not None:
        folders[-1] = config.validation
    files, notes = list[MediaFile](), list[str]()
    for number, folder in folders.items():
        files += _scan_folder(Path(folder), number, config.caption_encoding, notes)
    return files, notes


def _scan_folder(root: Path, number: int, encoding: str, notes: list[str]) -> list[MediaFile]:
    if not root.is_dir():
        raise InputError(f"data folder {root} is not a folder; give one of videos and pictures")
    media, sidecars, tables = list[Path](), dict[str, Path](), list[Path]()
    others: Counter[str] = Counter()
    for path in _walk(root):
        suffix = path.suffix.lower()
        if suffix in FILM_SUFFIXES or suffix in PICTURE_SUFFIXES:
            media.append(path)
        elif suffix in SIDECARS:
            sidecars[str(path).lower()] = path
        elif suffix in TABLES:
            tables.append(path)
        else:
            others[suffix or path.name] += 1
    if not media:
        raise InputError(
            f"data folder {root} holds neither videos nor pictures; known suffixes are "
            f"{', '.join((*FILM_SUFFIXES, *PICTURE_SUFFIXES))}")
    if others:
        kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common(8))
        notes.append(f"{root}: other files are ignored: {kinds}")
    rows = _read_tables(root, tables, encoding, notes)
    missing = sorted(rows.keys() - {str(path.resolve()) for path in media})
    if missing:
        notes.append(f"{root}: {len(missing)} files that its tables name don't exist: "
                     f"{', '.join(missing[:5])}")
    found = []
    for path in media:
        name = path.relative_to(root).as_posix()
        try:
            facts = path.stat()
        except OSError as error:
            problem = f"can't be read: {error.strerror}"
            found.append(MediaFile(number, name, path, 0, 0, notes=(problem,)))
            continue
        captions, problems = rows.get(str(path.resolve()), ()), list[str]()
        if not captions:
            captions, problems = _next_to(path, sidecars, encoding)
        found.append(MediaFile(number, name, path, facts.st_size, facts.st_mtime_ns, captions,
                               tuple(problems)))
    return found


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


def _read_tables(
    root: Path, tables: Sequence[Path], encoding: str, notes: list[str]
) -> dict[str, Captions]:
    """Return captions by the absolute path of the file that a table names."""
    rows: dict[str, Captions] = {}
    for path in tables:
        try:
            made = table(path, encoding)
        except Unreadable as error:
            raise InputError(f"table {path} {error}; correct it, or move it elsewhere") from None
        if made is None:
            notes.append(f"{root}: {path.name} names no files and is ignored")
            continue
        notes += made[1]
        for name, captions in made[0].items():
            try:
                place = str((path.parent / name).resolve())
            except (OSError, ValueError):  # a zero byte, a lone surrogate, or too long
                notes.append(f"{path.name} names {name[:80]!r}, an invalid file name; its captions "
                             "are ignored")
                continue
            if rows.setdefault(place, captions) != captions:
                notes.append(f"{name} is in several tables; its entry in {path.name} is ignored")
    return rows


def _next_to(
    path: Path, sidecars: Mapping[str, Path], encoding: str
) -> tuple[Captions, list[str]]:
    """Return captions in clip.txt, clip.mp4.txt, clip.json or clip.mp4.json, and notes."""
    problems = list[str]()
    for suffix in SIDECARS:
        for candidate in (path.with_suffix(suffix), path.with_name(path.name + suffix)):
            file = sidecars.get(str(candidate).lower())
            if file is None:
                continue
            try:
                captions, notes = sidecar(file, encoding)
            except Unreadable as error:
                problems.append(f"{file.name} {error}")
                continue
            if captions:
                return captions, notes
            problems.append(f"{file.name} is empty")
    return (), problems


def decode(content: bytes, encoding: str = "auto") -> tuple[str, str | None]:
    """Return bytes as text, and a note if the encoding was guessed.

    The encoding "auto" uses a byte order mark, then tries UTF-8, then guesses.

    Raises:
        Unreadable: the bytes are no text in that encoding, or in any known one.
    """
    if encoding != "auto":
        try:
            return content.decode(encoding), None
        except UnicodeDecodeError as error:
            raise Unreadable(f"is not text in {encoding}: {error.reason}") from None
    for mark, name in _MARKS:
        if content.startswith(mark):
            return _strictly(content, name), None
    if b"\0" in content:  # in UTF-16 mostly the high bytes are zero
        is_little = content[1::2].count(0) >= content[::2].count(0)
        wide = "utf-16-le" if is_little else "utf-16-be"
        return _strictly(content, wide), "read as UTF-16 by its zero bytes"
    try:
        return content.decode("utf-8"), None
    except UnicodeDecodeError:
        pass
    from charset_normalizer import from_bytes

    matches = list(from_bytes(content, cp_isolation=list(LIKELY)))
    if not matches:
        raise Unreadable("is not text in any known encoding; save it as UTF-8")
    best = matches[0]
    guess = best.encoding
    for match in matches:  # prefer cp1252 where another fits no better
        ties = match.chaos <= best.chaos + 0.01 and match.coherence >= best.coherence - 0.01
        if match.encoding == "cp1252" and ties:
            guess = match.encoding
    note = f"read as {guess}, which is a guess; save it as UTF-8 or set caption_encoding"
    return content.decode(guess), note


def _strictly(content: bytes, encoding: str) -> str:
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise Unreadable(f"is damaged {encoding}: {error.reason}; save it as UTF-8") from None


def _read(path: Path, encoding: str) -> tuple[str, list[str]]:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise Unreadable(f"has over {MAX_BYTES // 1_000_000} MB, too much for captions")
        text, note = decode(path.read_bytes(), encoding)
    except OSError as error:
        raise Unreadable(f"can't be read: {error.strerror}") from None
    return text, [] if note is None else [f"{path.name} {note}"]


def sidecar(path: Path, encoding: str) -> tuple[Captions, list[str]]:
    """Return captions of a .txt (one caption) or .json file, and notes.

    Raises:
        Unreadable: the file is invalid.
    """
    text, notes = _read(path, encoding)
    if path.suffix.lower() != ".json":
        return _clean([text]), notes
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"is not valid JSON: {error}") from None
    return _of_value(value), notes


def _of_value(value: Any) -> Captions:
    if isinstance(value, Mapping):
        found = next((key for key in CAPTION_KEYS if key in value), None)
        if found is None:
            raise Unreadable(f"has none of the keys {', '.join(CAPTION_KEYS)}")
        value = value[found]
    several = value if isinstance(value, list) else [value]
    if not all(isinstance(each, str) for each in several):
        raise Unreadable("has a caption that is not text")
    return _clean(several)


def _clean(texts: Iterable[str]) -> Captions:
    squeezed = [re.sub(r"\s+", " ", text).strip() for text in texts]
    if any(_HALF.search(text) for text in squeezed):
        raise Unreadable("has half of a character (a lone surrogate); write the whole "
                         "character, or delete it")
    return tuple(dict.fromkeys(text for text in squeezed if text))


def table(path: Path, encoding: str) -> tuple[dict[str, Captions], list[str]] | None:
    """Return the captions by file of a CSV or JSON Lines table, and notes; None: it names no files.

    Names are as written: relative to the table's folder, or absolute.

    Raises:
        Unreadable: the table names files, but is invalid; has the line.
    """
    text, notes = _read(path, encoding)
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
        given = {key: row[key] for key in CAPTION_KEYS if row.get(key)}
        try:
            captions = _of_value(given) if given else ()
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
