"""Read bodies of requests, multipart or JSON, as a stream, with files written to disk.

A body that is incomplete, too large, not UTF-8, or has a field twice is refused.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import secrets
from collections import Counter
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from vidgen.core.runtime import write_error
from vidgen.server.types import ApiError, Upload

MAX_FIELDS, MAX_FIELD_BYTES = 100, 1 << 20
PATIENCE_S = 60.0
"""Time to wait for the next bytes of a body, in seconds."""
_BRACKETS = re.compile(r"([^\[\]]+)(\[\])?(?:\[([^\[\]]+)\])?")


async def read_body(request: Request, uploads: Path, max_bytes: int) -> dict[str, Any]:
    """Return a request's fields by name; files are `Upload`s in `uploads`.

    Raises:
        ApiError: the body is invalid, or larger than `max_bytes`.
        OutputError: the disk is full.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    chunks = _chunks(request, max_bytes)
    if kind == b"multipart/form-data":
        boundary = options.get(b"boundary")
        if not boundary or len(boundary) > 200:
            raise ApiError(400, "malformed_body", "the multipart body has no boundary")
        form = _Form(boundary, uploads)
        try:
            async for chunk in chunks:
                form.feed(chunk)
            return form.finish()
        finally:
            form.close()
    if kind in (b"application/json", b""):
        return _parsed(b"".join([chunk async for chunk in chunks]))
    raise ApiError(415, "unsupported_media_type",
                   f"the body is {kind.decode('latin-1')[:80]!r}; send multipart/form-data or "
                   "application/json")


async def _chunks(request: Request, max_bytes: int) -> AsyncIterator[bytes]:
    stream, taken = request.stream(), 0
    while True:
        check_size(taken, max_bytes)
        try:
            chunk = await asyncio.wait_for(anext(stream, None), PATIENCE_S)
        except TimeoutError:
            raise ApiError(408, "timeout", f"no data arrived for {PATIENCE_S:g} s; send the "
                                           "body without pauses") from None
        except ClientDisconnect:
            raise ApiError(400, "client_gone", "the client left before the body's end") from None
        if chunk is None:
            return
        taken += len(chunk)
        yield chunk


def check_size(num_bytes: int, limit: int) -> None:
    """Raise ApiError if a body has more bytes than the limit."""
    if num_bytes > limit:
        raise ApiError(413, "too_large", f"the request has more than {limit} bytes; send a "
                       "smaller one", headers={"Connection": "close"})


def _parsed(content: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key is given twice")
        return found

    def number(text: str) -> float:
        raise ValueError(f"{text} isn't a JSON number")

    try:
        value = json.loads(content.decode("utf-8") or "{}", object_pairs_hook=once,
                           parse_constant=number)
        json.dumps(value, ensure_ascii=False).encode()  # refuses lone surrogates
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "malformed_body", f"the body isn't JSON: {error or 'nested too deep'}"
                       ) from None
    if not isinstance(value, dict):
        raise ApiError(400, "malformed_body", "the body must be a JSON object")
    return value


class _Form:
    """A multipart body, parsed in chunks.

    Starlette's own parser accepts incomplete bodies and text that isn't UTF-8.
    """

    def __init__(self, boundary: bytes, uploads: Path) -> None:
        self._uploads, self._is_whole = uploads, False
        self._fields: list[tuple[str, Any]] = []
        self._header, self._value, self._disposition = bytearray(), bytearray(), b""
        self._file: BinaryIO | None = None
        self._parser = MultipartParser(boundary, {
            "on_part_begin": self._begin, "on_part_data": self._data, "on_part_end": self._end,
            "on_header_field": partial(_extend, self._header),
            "on_header_value": partial(_extend, self._value),
            "on_header_end": self._header_end, "on_headers_finished": self._headers_finished,
            "on_end": self._whole,
        })

    def feed(self, chunk: bytes) -> None:
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise ApiError(400, "malformed_body", f"the multipart body is malformed: {error}"
                           ) from None
        except OSError as error:
            raise write_error(self._uploads / "upload", error) from error

    def finish(self) -> dict[str, Any]:
        if not self._is_whole:
            raise ApiError(400, "malformed_body", "the multipart body ends before its last "
                                                  "boundary; send it completely")
        return _nested(self._fields)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _begin(self) -> None:
        if len(self._fields) >= MAX_FIELDS:
            raise ApiError(400, "malformed_body", f"the body has more than {MAX_FIELDS} parts")
        self._disposition, self._file = b"", None
        self._content, self._digest, self._size = bytearray(), hashlib.sha256(), 0

    def _header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._header.clear()
        self._value.clear()

    def _headers_finished(self) -> None:
        kind, options = parse_options_header(self._disposition)
        if kind != b"form-data" or b"name" not in options:
            raise ApiError(400, "malformed_body", "a part of the body has no name")
        self._name = _text(options[b"name"], "a field's name")
        if b"filename" in options:
            self._filename = _text(options[b"filename"], "a file's name")
            self._file = (self._uploads / secrets.token_hex(8)).open("wb")

    def _data(self, data: bytes, start: int, end: int) -> None:
        piece = data[start:end]
        self._size += len(piece)
        if self._file is not None:
            self._file.write(piece)
            self._digest.update(piece)
        elif self._size <= MAX_FIELD_BYTES:
            self._content += piece
        else:
            raise ApiError(413, "too_large", f"the field {self._name!r} is larger than "
                                             f"{MAX_FIELD_BYTES} bytes", self._name)

    def _end(self) -> None:
        value: Any
        if self._file is None:
            value = _text(self._content, f"the field {self._name!r}")
        else:
            self._file.close()
            value = Upload(Path(self._file.name), self._filename, self._digest.hexdigest(),
                           self._size)
        self._fields.append((self._name, value))

    def _whole(self) -> None:
        self._is_whole = True


def _extend(text: bytearray, data: bytes, start: int, end: int) -> None:
    text += data[start:end]


def _text(content: bytes | bytearray, what: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise ApiError(400, "malformed_body", f"{what} isn't UTF-8 text") from None


def _nested(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Nest fields by their names: `video[id]`, `lora[]` and `lora[][name]`.

    The objects of a list come as single fields, grouped by object or by field: the n-th
    `lora[][name]` belongs to the n-th object.
    """
    fields: dict[str, Any] = {}
    count = Counter[str]()
    for name, value in pairs:
        match = _BRACKETS.fullmatch(name)
        if match is None:
            raise ApiError(400, "malformed_body", f"{name[:80]!r} isn't a field's name; send "
                           "deeper nesting as JSON in the text of one field", name[:80])
        outer, is_list, key = match.groups()
        path: list[Any] = [outer]
        if is_list or outer == "files":
            # texts and objects are counted separately
            path.append((key is not None, count[name]))
            count[name] += 1
        if key is not None:
            path.append(key)
        inner: Any = fields
        for step in path[:-1]:
            inner = inner.setdefault(step, {}) if isinstance(inner, dict) else None
        is_free = isinstance(inner, dict) and path[-1] not in inner
        if not is_free or len({type(step) for step in (*fields.get(outer, ()), *path[1:2])}) > 1:
            raise ApiError(400, "malformed_body", f"the field {name!r} is given twice", name)
        inner[path[-1]] = value
    for name, inner in fields.items():
        if isinstance(inner, dict) and any(isinstance(step, tuple) for step in inner):
            fields[name] = rows = [*inner.values()]
            if len({frozenset(row) for row in rows if isinstance(row, dict)}) > 1:
                # ambiguous: which value is of which object?
                raise ApiError(400, "malformed_body", f"{name} lists objects with different "
                               "fields; give all of them the same, or send JSON in the field's "
                               "text", name)
    return fields
