"""Translate a checked body to options of `Request`, and put its files into the job's folder.

Inputs are fetched from URLs only if the service allows it, and never from private networks: a host
is resolved once, all its IP addresses are checked, and the connection goes to one of them.
Redirects are checked in the same way.
"""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin

from vidgen.core.errors import InputError, OptionError, nearest
from vidgen.core.request import NO_AUDIO, OWN_AUDIO
from vidgen.core.runtime import link
from vidgen.server.jobs import Jobs
from vidgen.server.layout import INPUTS, VIDEO, Medium, sniff
from vidgen.server.schema import Body, ExtensionRequest, LoraChoice
from vidgen.server.settings import Settings
from vidgen.server.types import ApiError, Call, Kind, Upload

if TYPE_CHECKING:
    import httpx

Allowed = Callable[[str], bool]
MAX_REDIRECTS = 3
PATIENCE_S, WHOLE_S = 10.0, 60.0
_INPUTS: dict[str, tuple[Any, ...]] = {
    "input_reference": ("image", "picture", "video"), "image_reference": ("image", "picture"),
    "last_image_reference": ("last_image", "picture"), "video_reference": ("video", "video"),
    "audio_reference": ("audio", "sound"), "video": ("video", "video"),
}
"""Option and allowed media of each field with a file."""


@dataclass
class Draft:
    """A job that is being requested, with its folder; `is_kept` once it is queued.

    `jobs` is the queue, whose finished clips may be inputs.
    """

    id: str
    kind: Kind
    call: Call
    settings: Settings
    jobs: Jobs
    is_kept: bool = False

    @property
    def folder(self) -> Path:
        """Folder of the job."""
        return self.settings.job_folder(self.id)

    def put_inputs(self, body: Any) -> dict[str, str]:
        """Put a body's files into the job's folder; return the fields of `Request` with paths."""
        options: dict[str, str] = {}
        for name, (option, *media) in _INPUTS.items():
            if (reference := getattr(body, name, None)) is None:
                continue
            path = self.put(reference, name, *media)
            if name == "video" and isinstance(body, ExtensionRequest):
                option = "prefix"  # noqa: PLW2901
            elif name == "input_reference" and path.endswith((".mp4", ".webm", ".mkv")):
                option = "video"  # noqa: PLW2901
            if option in options:
                raise ApiError(400, "invalid_request", f"{name} and another field both set the "
                               f"{option}; give one of them", name)
            options[option] = path
        return options

    def put(
        self, reference: Upload | str | dict[str, str], name: str, *media: Medium
    ) -> str:
        """Put an input into the job's folder; return its path relative to the folder.

        Raises:
            ApiError: the input is of another medium, can't be fetched, or isn't a completed video.
        """
        if isinstance(reference, dict):
            source = self.jobs.get(reference["id"], self.call.owner)
            if source is None or source.kind != "video":
                raise ApiError(404, "not_found", f"video {reference['id']!r} doesn't exist", name)
            if source.status != "completed":
                raise ApiError(409, "not_completed", f"video {source.id} {source.stands}; "
                               "give a completed one", name)
            if "video" not in media:
                raise ApiError(400, "invalid_request", f"{name} is a video; give a picture", name)
            link(self.settings.job_folder(source.id) / VIDEO, self.folder / INPUTS / f"{name}.mp4")
            return f"{INPUTS}/{name}.mp4"
        if isinstance(reference, Upload):
            path = reference.path
        else:
            path = self.folder / INPUTS / name
            path.write_bytes(self._content(reference, name))
        try:
            _, suffix = sniff(path, name, *media)
        except InputError as error:
            raise ApiError(400, "invalid_request", str(error), name) from None
        path.replace(self.folder / INPUTS / f"{name}{suffix}")
        return f"{INPUTS}/{name}{suffix}"

    def _content(self, url: str, name: str) -> bytes:
        if url.startswith("data:"):
            head, _, text = url.partition(",")
            if not head.endswith(";base64"):
                raise ApiError(400, "invalid_value", f"{name} must be data:TYPE;base64,...", name)
            try:
                return base64.b64decode(text, validate=True)
            except ValueError:
                raise ApiError(400, "invalid_value", f"{name} isn't base64", name) from None
        if not self.settings.fetch:
            raise ApiError(400, "urls_disabled", f"{name} is a URL, which this service doesn't "
                           "fetch; send the file, or a data: URL", name)
        try:
            return fetch(url, self.settings.upload_bytes)
        except InputError as error:
            raise ApiError(400, "invalid_url", f"{name}: {error}", name) from None


def options_of(body: Any, loras: Path | None) -> dict[str, Any]:
    """Return a body's fields of `Request`, except files; `loras` is the folder of adapters."""
    options: dict[str, Any] = body.model_dump(by_alias=True, exclude_none=True)
    options |= options.pop("extra_params", {})
    given = body.model_fields_set
    if "width" in given:
        options["size"] = (body.width, body.height)
    if "generate_sound" in given:
        options["audio"] = OWN_AUDIO if body.generate_sound else NO_AUDIO
    if "lora" in given and body.lora:
        options["lora"] = [_lora(each, loras) for each in body.lora]
    return options


def loras_in(folder: Path | None) -> dict[str, Path]:
    """Return the adapters that requests may name."""
    return {path.stem: path for path in sorted(folder.resolve().glob("*.safetensors"))
            } if folder else {}


def _lora(choice: LoraChoice | str, folder: Path | None) -> str:
    if isinstance(choice, str):
        name, _, scale = choice.partition(":")
        choice = parse(LoraChoice, {"name": name, "scale": scale or None})
    assert isinstance(choice, LoraChoice)
    known = loras_in(folder)
    if choice.name not in known:
        raise ApiError(400, "invalid_value", f"unknown lora {choice.name!r}; "
                       f"{nearest(choice.name, known)}", "lora")
    return f"{known[choice.name]}:{choice.scale:g}"


def parse(body: type[Body], fields: dict[str, Any]) -> Any:
    """Return a checked body, or raise an ApiError about its first invalid field."""
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
    import httpx

    try:
        return asyncio.run(asyncio.wait_for(_fetch(url, max_bytes, allowed), WHOLE_S))
    except TimeoutError:
        raise InputError(f"reading the URL took more than {WHOLE_S:g} s; send the file") from None
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise InputError(f"the host doesn't answer: {type(error).__name__}") from None
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
        raise InputError(f"the URL can't be read: {type(error).__name__}") from None


async def _fetch(url: str, max_bytes: int, allowed: Allowed) -> bytes:
    import httpx

    content = bytearray()
    # the system's authorities, not httpx's own list; no proxy of the environment
    trusted = ssl.create_default_context()
    async with httpx.AsyncClient(timeout=PATIENCE_S, trust_env=False, verify=trusted) as client:
        for _ in range(MAX_REDIRECTS + 1):
            asked = _url(url)
            host = asked.raw_host.decode()
            address = await _address(host, allowed)
            async with client.stream(
                "GET", asked.copy_with(host=address), extensions={"sni_hostname": host},
                headers={"Host": asked.netloc.decode(), "Accept-Encoding": "identity"},
            ) as answer:
                if answer.has_redirect_location:
                    url = urljoin(url, answer.headers["Location"])
                    continue
                if answer.status_code != 200:
                    raise InputError(f"the URL returns status {answer.status_code}; give one that "
                                     "can be read")
                async for piece in answer.aiter_raw():
                    content += piece
                    if len(content) > max_bytes:
                        raise InputError(f"the content at the URL is larger than {max_bytes} bytes")
                return bytes(content)
    raise InputError(f"the URL has more than {MAX_REDIRECTS} redirects; give the final one")


def _url(text: str) -> httpx.URL:
    import httpx

    with suppress(httpx.InvalidURL):
        url = httpx.URL(text)
        if url.scheme in ("http", "https") and url.host and not url.userinfo:
            return url
    raise InputError("the URL is invalid, or isn't http or https, or has a user name; give one "
                     "such as https://host/name.png")


async def _address(host: str, allowed: Allowed) -> str:
    """Return the IP address of a host whose addresses are all allowed."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise InputError(f"the host {host!r} is unknown") from None
    addresses = [str(each[4][0]) for each in found]
    if not addresses or not all(map(allowed, addresses)):
        raise InputError(f"the host {host!r} is in a network that this service doesn't access")
    return addresses[0]
