"""Read bodies of requests, multipart or JSON, as a stream, with files written to disk.

A body that is incomplete, too large, not UTF-8, or has a field twice is refused.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import secrets
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
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


async def read_body(request: Request, uploads: Path) -> dict[str, Any]:
    """Return a request's fields by name; files are `Upload`s in `uploads`.

    Raises:
        ApiError: the body is invalid.
        OutputError: the disk is full.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind == b"multipart/form-data":
        boundary = options.get(b"boundary")
        if not boundary or len(boundary) > 200:
            raise ApiError(400, "malformed_body", "the multipart body has no boundary")
        form = _Form(boundary, uploads)
        try:
            async for chunk in _chunks(request):
                form.feed(chunk)
            return form.finish()
        finally:
            form.close()
    if kind in (b"application/json", b""):
        return await _read_json(request)
    raise ApiError(415, "unsupported_media_type",
                   f"the body is {kind.decode('latin-1')[:80]!r}; send multipart/form-data or "
                   "application/json")


async def _chunks(request: Request) -> AsyncIterator[bytes]:
    stream = request.stream()
    while True:
        try:
            chunk = await asyncio.wait_for(anext(stream, None), PATIENCE_S)
        except TimeoutError:
            raise ApiError(408, "timeout", f"no data arrived for {PATIENCE_S:g} s; send the "
                                           "body without pauses") from None
        except ClientDisconnect:
            raise ApiError(400, "client_gone", "the client left before the body's end") from None
        if chunk is None:
            return
        yield chunk


async def _read_json(request: Request) -> dict[str, Any]:
    content = b"".join([chunk async for chunk in _chunks(request)])

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


@dataclass
class _Part:
    headers: dict[bytes, bytes] = field(default_factory=dict)
    name: str = ""
    content: bytearray = field(default_factory=bytearray)
    filename: str = ""
    file: BinaryIO | None = None
    digest: Any = field(default_factory=hashlib.sha256)
    size: int = 0


class _Form:
    """A multipart body, parsed in chunks.

    Starlette's own parser accepts incomplete bodies and text that isn't UTF-8.
    """

    def __init__(self, boundary: bytes, uploads: Path) -> None:
        self._uploads, self._is_whole = uploads, False
        self._fields: list[tuple[str, Any]] = []
        self._part = _Part()
        self._header = [bytearray(), bytearray()]
        self._parser = MultipartParser(boundary, {
            "on_part_begin": self._begin, "on_part_data": self._data, "on_part_end": self._end,
            "on_header_field": self._header_name, "on_header_value": self._header_value,
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
        if self._part.file is not None:
            self._part.file.close()

    def _begin(self) -> None:
        if len(self._fields) >= MAX_FIELDS:
            raise ApiError(400, "malformed_body", f"the body has more than {MAX_FIELDS} parts")
        self._part = _Part()

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._header[0] += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._header[1] += data[start:end]

    def _header_end(self) -> None:
        name, value = map(bytes, self._header)
        self._part.headers[name.lower()] = value
        self._header = [bytearray(), bytearray()]

    def _headers_finished(self) -> None:
        kind, options = parse_options_header(self._part.headers.get(b"content-disposition", b""))
        if kind != b"form-data" or b"name" not in options:
            raise ApiError(400, "malformed_body", "a part of the body has no name")
        self._part.name = _text(options[b"name"], "a field's name")
        if b"filename" in options:
            self._part.filename = _text(options[b"filename"], "a file's name")
            self._part.file = (self._uploads / secrets.token_hex(8)).open("wb")

    def _data(self, data: bytes, start: int, end: int) -> None:
        piece, part = data[start:end], self._part
        part.size += len(piece)
        if part.file is not None:
            part.file.write(piece)
            part.digest.update(piece)
            return
        if part.size > MAX_FIELD_BYTES:
            raise ApiError(413, "too_large", f"the field {part.name!r} is larger than "
                                             f"{MAX_FIELD_BYTES} bytes", part.name)
        part.content += piece

    def _end(self) -> None:
        part = self._part
        if part.file is None:
            self._fields.append((part.name, _text(bytes(part.content), f"the field {part.name!r}")))
            return
        part.file.close()
        path = Path(part.file.name)
        upload = Upload(path, part.filename, part.digest.hexdigest(), part.size)
        self._fields.append((part.name, upload))

    def _whole(self) -> None:
        self._is_whole = True


def _text(content: bytes, what: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise ApiError(400, "malformed_body", f"{what} isn't UTF-8 text") from None


def _nested(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Nest fields by their names: `video[id]`, `lora[]` and `lora[][name]`."""
    fields: dict[str, Any] = {}
    for name, value in pairs:
        match = _BRACKETS.fullmatch(name)
        if match is None:
            raise ApiError(400, "malformed_body", f"{name[:80]!r} isn't a field's name; send "
                           "deeper nesting as JSON in the text of one field", name[:80])
        if not _place(fields, match[1], bool(match[2]) or match[1] == "files", match[3], value):
            raise ApiError(400, "malformed_body", f"the field {name!r} is given twice", name)
    for name, rows in fields.items():
        kinds = {frozenset(each) for each in rows if isinstance(each, dict)} if isinstance(
            rows, list) else ()
        if len(kinds) > 1:  # ambiguous: which value is of which object?
            raise ApiError(400, "malformed_body", f"{name} lists objects with different fields; "
                           "give all of them the same, or send JSON in the field's text", name)
    return fields


def _place(fields: dict[str, Any], name: str, is_list: bool, key: str | None, value: Any) -> bool:
    """Set a value in nested fields; return False if it is already set.

    The objects of a list come as single fields, grouped by object or by field: `lora[][name]`
    belongs to the first object that has no name yet.
    """
    inner: Any = fields
    if is_list:
        rows = fields.setdefault(name, [])
        if not isinstance(rows, list):
            return False
        if key is None:
            rows.append(value)
            return True
        inner = next((each for each in rows if isinstance(each, dict) and key not in each), None)
        if inner is None:
            rows.append(inner := {})
        name = key
    elif key is not None:
        inner, name = fields.setdefault(name, {}), key
    if not isinstance(inner, dict) or name in inner:
        return False
    inner[name] = value
    return True


def write_upload(content: bytes, uploads: Path) -> Upload:
    """Write content to a file and return it as an upload without a name.

    Raises:
        OutputError: the disk is full.
    """
    path = uploads / secrets.token_hex(8)
    try:
        path.write_bytes(content)
    except OSError as error:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        raise write_error(path, error) from error
    return Upload(path, "", hashlib.sha256(content).hexdigest(), len(content))
