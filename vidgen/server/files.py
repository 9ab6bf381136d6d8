"""Files of jobs over HTTP: whole, in ranges, or not at all where the client's copy is the same.

Conditions and ranges are those of RFC 9110, in its order (13.2.2).
"""

from __future__ import annotations

import re
from collections.abc import MutableMapping
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from fastapi.responses import FileResponse
from starlette.datastructures import Headers
from starlette.staticfiles import NotModifiedResponse
from starlette.types import Receive, Scope, Send

from vidgen.server.errors import ApiError

FILE_ANSWERS: dict[int | str, dict[str, Any]] = {
    206: {"description": "a range of it"}, 304: {"description": "it is as the client has it"},
    412: {"description": "it isn't as the client has it"}, 416: {"description": "no such range"}}
_TAG = re.compile(r'(?:W/)?"[^"]*"')
_RANGE = re.compile(r"([0-9]{1,18})-([0-9]{1,18})?|-[0-9]{1,18}")


class JobFile(FileResponse):
    """An existing file, or ranges of it; refusals come in the usual envelope.

    Args:
        path: of the file.
        media_type: of the file.
        name: under which a browser keeps it.
        download: whether a browser keeps it rather than shows it.
    """

    def __init__(self, path: Path, media_type: str, name: str, *, download: bool = False) -> None:
        super().__init__(path, media_type=media_type, filename=name, stat_result=path.stat(),
                         content_disposition_type="attachment" if download else "inline")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it.

        Raises:
            ApiError: a condition isn't met, or the file has no such range.
        """
        asked = Headers(scope=scope)
        self._require_as_known(asked)
        if self._is_kept_by(asked):
            await NotModifiedResponse(self.headers)(scope, receive, send)
            return
        if scope["method"] != "GET" or not _are_ranges(",".join(asked.getlist("range"))):
            scope = {**scope, "headers": [each for each in scope["headers"] if each[0] != b"range"]}

        async def send_unless_refused(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start" and message["status"] >= 400:
                raise ApiError(416, "range_not_satisfiable", "the file has no such range of bytes; "
                               "leave the header Range out to have all of it", "Range",
                               {"Content-Range": f"bytes */{self.headers['content-length']}"})
            await send(message)

        await super().__call__(scope, receive, send_unless_refused)

    def _require_as_known(self, asked: Headers) -> None:
        """Refuse a request for another state of the file."""
        tags, name = _tags(asked, "if-match"), "If-Match"
        if tags is not None:
            is_known = bool({"*", self.headers["etag"]} & set(tags))
        else:
            name, time_s = "If-Unmodified-Since", _time_s(asked.get("if-unmodified-since"))
            is_known = time_s is None or self._changed_s <= time_s
        if not is_known:
            raise ApiError(412, "precondition_failed", f"the file is {self.headers['etag']} of "
                           f"{self.headers['last-modified']}; leave the header {name} out to have "
                           "it", name)

    def _is_kept_by(self, asked: Headers) -> bool:
        """Return whether the client's copy is the same."""
        tags = _tags(asked, "if-none-match")
        if tags is not None:
            return bool({"*", self.headers["etag"]} & {tag.removeprefix("W/") for tag in tags})
        time_s = _time_s(asked.get("if-modified-since"))
        return time_s is not None and self._changed_s <= time_s

    @property
    def _changed_s(self) -> float:
        """Time of the last change, as exactly as clients are told."""
        return parsedate_to_datetime(self.headers["last-modified"]).timestamp()


def _tags(asked: Headers, name: str) -> list[str] | None:
    """Return the entity tags of a header, or "*"; None without the header."""
    given = asked.getlist(name)
    if not given:
        return None
    return ["*"] if given == ["*"] else _TAG.findall(",".join(given))


def _time_s(text: str | None) -> float | None:
    """Return a header's date in Unix seconds; None without one, or if it is no date."""
    try:
        return None if text is None else parsedate_to_datetime(text).timestamp()
    except (ValueError, OverflowError, OSError):
        return None


def _are_ranges(text: str) -> bool:
    """Return whether a Range header is a valid one of bytes; others are ignored."""
    unit, _, given = text.partition("=")
    ranges = [_RANGE.fullmatch(each.strip()) for each in given.split(",")]
    return unit.strip().lower() == "bytes" and all(
        each is not None and (each[2] is None or int(each[1]) <= int(each[2])) for each in ranges)
