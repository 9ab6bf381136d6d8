"""Captions as people write them: beside a file, or in a table, in whatever encoding."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE_KEYS = ("file_name", "file", "filename", "path", "video", "video_path", "image", "image_path",
             "media")
"""Columns or keys of a table that name the file."""
TABLES = (".csv", ".jsonl")
SIDECARS = (".txt", ".json")
MAX_BYTES = 10_000_000
"""A larger sidecar is no caption."""
LIKELY = ("cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp1255", "cp1256", "cp1257", "cp1258",
          "koi8_r", "cp932", "euc_jp", "gb18030", "big5", "cp949", "cp874")
"""Encodings that are guessed among."""
_DELIMITERS = (",", ";", "\t")
_SURPLUS = "\0"
"""Stands for the columns of values that are beyond a CSV's header."""
_HALF = re.compile("[\ud800-\udfff]")
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class Unreadable(Exception):
    """A caption's file that can't be understood; the text says why."""


@dataclass(frozen=True)
class Texts:
    """Captions of one file, of which one is drawn each time, and what had to be guessed."""

    captions: tuple[str, ...]
    notes: tuple[str, ...] = ()


def decode(content: bytes, encoding: str = "auto") -> tuple[str, str | None]:
    """Text of bytes, and a note where its encoding had to be guessed.

    The encoding "auto" goes by a byte order mark, else takes UTF-8, else guesses.

    Raises:
        Unreadable: bytes that are no text in that encoding, or in any.
    """
    if encoding != "auto":
        try:
            return content.decode(encoding), None
        except UnicodeDecodeError as error:
            raise Unreadable(f"is no text in {encoding}: {error.reason}") from None
    for mark, name in _MARKS:
        if content.startswith(mark):
            return _strictly(content, name), None
    if b"\0" in content:  # most text has the zeros of UTF-16 in the high bytes
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
        raise Unreadable("is no text in any encoding that is known; save it as UTF-8")
    best = matches[0]
    guess = best.encoding
    for match in matches:  # Western Europe's encoding where another makes no more sense
        ties = match.chaos <= best.chaos + 0.01 and match.coherence >= best.coherence - 0.01
        if match.encoding == "cp1252" and ties:
            guess = match.encoding
    told = f"read as {guess}, which is a guess; save it as UTF-8 or set caption_encoding"
    return content.decode(guess), told


def _strictly(content: bytes, encoding: str) -> str:
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise Unreadable(f"is damaged {encoding}: {error.reason}; save it as UTF-8") from None


def _read(path: Path, encoding: str) -> tuple[str, str | None]:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise Unreadable(f"has over {MAX_BYTES // 1_000_000} MB, which is no caption")
        return decode(path.read_bytes(), encoding)
    except OSError as error:
        raise Unreadable(f"can't be read: {error.strerror}") from None


def sidecar(path: Path, keys: Sequence[str], encoding: str) -> Texts:
    """Captions in a .txt (all of it, as one) or .json beside a file.

    Raises:
        Unreadable: it holds none that can be read.
    """
    text, note = _read(path, encoding)
    notes = () if note is None else (f"{path.name} {note}",)
    if path.suffix.lower() != ".json":
        return Texts(_clean([text]), notes)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"is no JSON: {error}") from None
    return Texts(_of_value(value, keys), notes)


def _of_value(value: Any, keys: Sequence[str]) -> tuple[str, ...]:
    if isinstance(value, Mapping):
        found = next((key for key in keys if key in value), None)
        if found is None:
            raise Unreadable(f"has none of the keys {', '.join(keys)}")
        value = value[found]
    several = value if isinstance(value, list) else [value]
    if not all(isinstance(each, str) for each in several):
        raise Unreadable("holds a caption that is no text")
    return _clean(several)


def _clean(texts: Iterable[str]) -> tuple[str, ...]:
    squeezed = [re.sub(r"\s+", " ", text).strip() for text in texts]
    if any(_HALF.search(text) for text in squeezed):
        raise Unreadable("holds half of a character (a surrogate alone), which is "
                         "no text; write the whole character, or take it out")
    return tuple(dict.fromkeys(text for text in squeezed if text))


def table(
    path: Path, keys: Sequence[str], encoding: str
) -> tuple[dict[str, Texts], list[str]] | None:
    """Captions by file of a CSV or of JSON lines, and notes; None where it names no files.

    Names are as written: relative to the table's folder, or absolute.

    Raises:
        Unreadable: a table of files that can't be read, with the line.
    """
    text, note = _read(path, encoding)
    rows = _csv_rows(text) if path.suffix.lower() == ".csv" else _json_rows(text)
    found: dict[str, Texts] = {}
    columns: dict[str, None] = {}
    notes = [] if note is None else [f"{path.name} {note}"]
    for line, row in rows:
        column = next((key for key in FILE_KEYS if isinstance(row.get(key), str)), None)
        if column is None:
            if not found and line <= 2:  # another kind of table
                return None
            notes.append(f"{path.name}, line {line}, names no file ({', '.join(FILE_KEYS)})")
            continue
        if any(row.get(_SURPLUS) or ()):
            raise Unreadable(f"line {line} has more values than the header has columns; put "
                             "captions that hold the sign between columns in double quotes")
        columns |= dict.fromkeys(row)
        name = row[column].strip()
        if not name:
            notes.append(f"{path.name}, line {line}, has an empty {column}")
            continue
        given = {key: row[key] for key in keys if row.get(key)}
        try:
            captions = _of_value(given, keys) if given else ()
        except Unreadable as error:
            raise Unreadable(f"line {line} {error}") from None
        name = name.replace("\\", "/").removeprefix("./")
        if name in found:
            notes.append(f"{path.name}, line {line}, names {name} again; both captions count")
            captions = tuple(dict.fromkeys((*found[name].captions, *captions)))
        found[name] = Texts(captions)
    if found and columns.keys().isdisjoint(keys):
        have = ", ".join(key for key in columns if key and key != _SURPLUS)
        notes.append(f"{path.name} has no captions: its columns are {have}; read are "
                     f"{', '.join(keys)} (data.caption_keys)")
    return found, notes


def _csv_rows(text: str) -> Iterable[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), restkey=_SURPLUS,
                            delimiter=_delimiter(text), strict=True)
    try:
        for row in reader:
            yield reader.line_num, {(k or "").strip().lower(): v for k, v in row.items()}
    except csv.Error as error:
        raise Unreadable(f"line {reader.line_num} is no CSV: {error}") from None


def _delimiter(text: str) -> str:
    """What stands between the header's columns; captions, which may hold any sign, have no say."""
    header = text.lstrip("\r\n").partition("\n")[0].lower()
    parted = {sign: [name.strip(' \r"') for name in header.split(sign)] for sign in _DELIMITERS}
    return max(parted, key=lambda sign: (not {*FILE_KEYS}.isdisjoint(parted[sign]),
                                         len(parted[sign])))


def _json_rows(text: str) -> Iterable[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):  # U+2028 may stand within a text
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise Unreadable(f"line {number} is no JSON: {error}") from None
        if not isinstance(row, dict):
            raise Unreadable(f"line {number} is no JSON object")
        yield number, row
