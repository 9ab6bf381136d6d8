"""Translate a checked body to options of `Request`, and put its files into the job's folder.

Inputs are fetched from URLs only if the service allows it, and never from private networks: a host
is resolved once, all its IP addresses are checked, and the connection goes to one of them.
Redirects are checked in the same way.
"""

from __future__ import annotations

import base64
import binascii
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit, urlunsplit

from vidgen.core.errors import InputError, OptionError, nearest
from vidgen.core.request import NO_AUDIO, OWN_AUDIO
from vidgen.core.runtime import link
from vidgen.server.body import write_upload
from vidgen.server.jobs import Jobs
from vidgen.server.layout import INPUTS, VIDEO, Medium, sniff
from vidgen.server.schema import Body, ExtensionRequest, LoraChoice
from vidgen.server.settings import Settings
from vidgen.server.types import ApiError, Call, Kind, Upload

Allowed = Callable[[str], bool]
MAX_REDIRECTS = 3
PATIENCE_S, WHOLE_S = 10.0, 60.0
_CHUNK = 1 << 16
_MOVED, _PORTS = (301, 302, 303, 307, 308), {"http": 80, "https": 443}


@dataclass
class Draft:
    """Id and folder of a new job; the folder is removed unless the job is queued (`is_kept`)."""

    id: str
    kind: Kind
    call: Call
    folder: Path
    is_kept: bool = False

    @property
    def inputs(self) -> Path:
        """Folder of the job's input files."""
        return self.folder / INPUTS


class Translator:
    """Translates bodies to options of `Request`.

    Args:
        settings: settings of the service.
        jobs: queue, whose finished clips may be inputs.
        model: name of the served model.
    """

    def __init__(self, settings: Settings, jobs: Jobs, model: str) -> None:
        self.settings, self.jobs, self.model = settings, jobs, model

    @property
    def loras(self) -> list[str]:
        """Names of the adapters that requests may name."""
        folder = self.settings.loras
        if folder is None:
            return []
        return sorted(path.stem for path in folder.glob("*.safetensors"))

    def options(self, body: Any) -> dict[str, Any]:
        """Return a body's fields of `Request`, except files."""
        self.check_model(body.model)
        options: dict[str, Any] = body.model_dump(by_alias=True, exclude_none=True)
        options |= options.pop("extra_params", {})
        given = body.model_fields_set
        if "width" in given:
            options["size"] = (body.width, body.height)
        if "generate_sound" in given:
            options["audio"] = OWN_AUDIO if body.generate_sound else NO_AUDIO
        if "lora" in given and body.lora:
            options["lora"] = [self._lora(each) for each in body.lora]
        return options

    def inputs(self, body: Any, draft: Draft) -> dict[str, Any]:
        """Put a body's files into the job's folder; return the fields of `Request` with paths."""
        options: dict[str, Any] = {}
        wanted: tuple[tuple[str, str, tuple[Medium, ...]], ...] = (
            ("input_reference", "image", ("picture", "video")),
            ("image_reference", "image", ("picture",)),
            ("last_image_reference", "last_image", ("picture",)),
            ("video_reference", "video", ("video",)),
            ("audio_reference", "audio", ("sound",)),
            ("video", "prefix" if isinstance(body, ExtensionRequest) else "video", ("video",)),
        )
        for name, option, media in wanted:
            reference = getattr(body, name, None)
            if reference is None:
                continue
            path = self.lay_down(reference, name, draft, *media)
            if name == "input_reference" and path.endswith((".mp4", ".webm", ".mkv")):
                option = "video"  # noqa: PLW2901
            if option in options:
                raise ApiError(400, "invalid_request", f"{name} and another field both set the "
                               f"{option}; give one of them", name)
            options[option] = path
        return options

    def lay_down(
        self, reference: Upload | str | dict[str, str], name: str, draft: Draft, *media: Medium
    ) -> str:
        """Put an input into the job's folder; return its path relative to the folder.

        Raises:
            ApiError: the input is of another medium, can't be fetched, or isn't a completed video.
            OutputError: the disk is full.
        """
        if isinstance(reference, dict):
            source = self.jobs.get(reference["id"], draft.call.owner)
            if source is None or source.kind != "video":
                raise ApiError(404, "not_found", f"video {reference['id']!r} doesn't exist", name)
            if source.status != "completed":
                raise ApiError(409, "not_completed", f"video {source.id} {source.stands}; "
                               "give a completed one", name)
            if "video" not in media:
                raise ApiError(400, "invalid_request", f"{name} is a video; give a picture", name)
            target = draft.inputs / f"{name}.mp4"
            link(self.settings.job_folder(source.id) / VIDEO, target)
            return f"{INPUTS}/{target.name}"
        if isinstance(reference, str):
            reference = self._from_url(reference, name, draft)
        try:
            _, suffix = sniff(reference.path, name, *media)
        except InputError as error:
            raise ApiError(400, "invalid_request", str(error), name) from None
        target = draft.inputs / f"{name}{suffix}"
        reference.path.replace(target)
        return f"{INPUTS}/{target.name}"

    def _from_url(self, url: str, name: str, draft: Draft) -> Upload:
        if url.startswith("data:"):
            head, _, text = url.partition(",")
            if not head.endswith(";base64"):
                raise ApiError(400, "invalid_value", f"{name} must be data:TYPE;base64,...", name)
            try:
                content = base64.b64decode(text, validate=True)
            except (binascii.Error, ValueError):
                raise ApiError(400, "invalid_value", f"{name} isn't base64", name) from None
        elif not self.settings.fetch:
            raise ApiError(400, "urls_disabled", f"{name} is a URL, which this service doesn't "
                           "fetch; send the file, or a data: URL", name)
        else:
            try:
                content = fetch(url, self.settings.upload_bytes)
            except InputError as error:
                raise ApiError(400, "invalid_url", f"{name}: {error}", name) from None
        return write_upload(content, draft.folder)

    def _lora(self, given: LoraChoice | str) -> str:
        if isinstance(given, str):
            name, _, scale = given.partition(":")
            weight = {"scale": scale} if scale else {}
            choice: LoraChoice = parse(LoraChoice, {"name": name, **weight})
        else:
            choice = given
        if choice.name not in self.loras:
            raise ApiError(400, "invalid_value", f"unknown lora {choice.name!r}; "
                           f"{nearest(choice.name, self.loras)}", "lora")
        assert self.settings.loras is not None
        path = self.settings.loras.resolve() / f"{choice.name}.safetensors"
        return f"{path}:{choice.scale:g}"

    def check_model(self, name: str | None) -> None:
        """Check that a body names the served model, or none.

        Raises:
            ApiError: it names another model.
        """
        if name not in (None, self.model):
            raise ApiError(404, "model_not_found", f"model {name!r} doesn't exist; this service "
                           f"has {self.model!r}", "model")


def parse(body: type[Body], fields: dict[str, Any]) -> Any:
    """Return a checked body.

    Raises:
        ApiError: a field is invalid; names the first one.
    """
    try:
        return body(**fields)
    except OptionError as error:
        code = "invalid_value" if error.kind == "invalid" else f"{error.kind}_parameter"
        raise ApiError(400, code, str(error), error.option) from None


def is_public(address: str) -> bool:
    """Return whether an IP address is public."""
    found = ipaddress.ip_address(address)
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour
        if inner is not None:
            return is_public(str(inner))
        if found.teredo is not None or found in ipaddress.ip_network("64:ff9b::/96"):
            return False
    return found.is_global and not found.is_multicast and not found.is_reserved


def fetch(url: str, max_bytes: int, *, allowed: Allowed = is_public) -> bytes:
    """Return the content at a URL, up to `max_bytes`; `allowed` checks IP addresses.

    Raises:
        InputError: the content can't be read or is too large, or the host isn't allowed.
    """
    until_s = time.monotonic() + WHOLE_S
    for _ in range(MAX_REDIRECTS + 1):
        connection, path = _connect(url, allowed)
        watchdog = threading.Timer(until_s - time.monotonic(), _cut, [connection.sock])
        watchdog.start()
        try:
            connection.request("GET", path, headers={"Accept-Encoding": "identity"})
            answer = connection.getresponse()
            target = answer.headers["Location"] if answer.status in _MOVED else None
            if target is None:
                return _content(answer, max_bytes, until_s)
        except (OSError, http.client.HTTPException, ValueError) as error:
            if time.monotonic() > until_s:
                raise InputError(f"reading the URL took more than {WHOLE_S:g} s; send the file"
                                 ) from None
            raise InputError(f"the URL can't be read: {type(error).__name__}") from None
        finally:
            watchdog.cancel()
            connection.close()
        url = urljoin(url, target)
    raise InputError(f"the URL has more than {MAX_REDIRECTS} redirects; give the final one")


def _content(answer: http.client.HTTPResponse, max_bytes: int, until_s: float) -> bytes:
    if answer.status != 200:
        raise InputError(f"the URL returns status {answer.status}; give one that can be read")
    content = bytearray()
    while piece := answer.read1(_CHUNK):
        content += piece
        if len(content) > max_bytes:
            raise InputError(f"the content at the URL is larger than {max_bytes} bytes")
    if answer.length or time.monotonic() > until_s:
        raise ConnectionError
    return bytes(content)


def _cut(raw: socket.socket) -> None:
    """End a connection that sends too slowly."""
    with suppress(OSError):
        raw.shutdown(socket.SHUT_RDWR)


def _connect(url: str, allowed: Allowed) -> tuple[http.client.HTTPConnection, str]:
    """Connect to an allowed IP address of a URL's host; return the connection and the path."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or _PORTS[parts.scheme]
    except (ValueError, KeyError):
        host = None
    if not host or parts.username is not None:
        raise InputError("the URL is invalid, or isn't http or https, or has a user name; give "
                         "one such as https://host/name.png")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        raise InputError(f"the host {host!r} is unknown") from None
    addresses = list(dict.fromkeys(str(each[4][0]) for each in found))
    if not addresses or not all(allowed(each) for each in addresses):
        raise InputError(f"the host {host!r} is in a network that this service doesn't access")
    try:
        raw = socket.create_connection((addresses[0], port), PATIENCE_S)
        if parts.scheme == "https":
            raw = ssl.create_default_context().wrap_socket(raw, server_hostname=host)
    except OSError as error:
        raise InputError(f"the host {host!r} doesn't answer: {type(error).__name__}") from None
    connection = http.client.HTTPConnection(host, port, timeout=PATIENCE_S)
    connection.sock = raw
    return connection, urlunsplit(("", "", parts.path or "/", parts.query, ""))
