"""Inputs from addresses: only if the service allows it, and never from inside the network.

A name is resolved once, every address that it has is checked, and the connection goes to one that
was checked; redirects are followed in the same way.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from urllib.parse import urljoin, urlsplit

from vidgen.core.errors import InputError

MAX_REDIRECTS = 3
PATIENCE_S, WHOLE_S = 10.0, 60.0
_CHUNK = 1 << 16
Allowed = Callable[[str], bool]


def is_public(address: str) -> bool:
    """Return whether an IP address is one of the open internet."""
    found = ipaddress.ip_address(address)
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour
        if inner is not None:
            return is_public(str(inner))
        if found.teredo is not None or found in ipaddress.ip_network("64:ff9b::/96"):
            return False
    return found.is_global and not found.is_multicast and not found.is_reserved


def fetch(url: str, max_bytes: int, *, allowed: Allowed = is_public) -> bytes:
    """Return the content at an address, up to `max_bytes`; `allowed` checks IP addresses.

    Raises:
        InputError: it can't be read, is too large, or isn't allowed.
    """
    until = time.monotonic() + WHOLE_S
    for _ in range(MAX_REDIRECTS + 1):
        found, target = _get(url, max_bytes, allowed, until)
        if target is None:
            return found
        url = urljoin(url, target)
    raise InputError(f"the address leads on more than {MAX_REDIRECTS} times; give the last one")


def _get(url: str, max_bytes: int, allowed: Allowed, until: float) -> tuple[bytes, str | None]:
    """Return the content, or the address of a redirect."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise InputError("the address can't be read; give one such as https://host/name.png"
                         ) from None
    if parts.scheme not in ("http", "https") or not host or parts.username is not None:
        raise InputError("the address must be http or https, without a user; give such a one")
    connection = _connect(parts.scheme, host, port or (443 if parts.scheme == "https" else 80),
                          allowed)
    watchdog = threading.Timer(until - time.monotonic(), _cut, [connection.sock])
    watchdog.start()
    try:
        path = parts.path or "/"
        connection.request("GET", path + (f"?{parts.query}" if parts.query else ""),
                           headers={"Accept": "*/*", "Accept-Encoding": "identity"})
        answer = connection.getresponse()
        if answer.status in (301, 302, 303, 307, 308) and answer.headers["Location"]:
            return b"", answer.headers["Location"]
        if answer.status != 200:
            raise InputError(f"the address answers with {answer.status}; give one that can be read")
        content = bytearray()
        while piece := answer.read1(_CHUNK):
            content += piece
            if len(content) > max_bytes:
                raise InputError(f"what lies at the address is larger than {max_bytes} bytes")
        if answer.length or time.monotonic() > until:
            raise ConnectionError
        return bytes(content), None
    except (OSError, http.client.HTTPException, ValueError) as error:
        if time.monotonic() > until:
            raise InputError(f"the address took more than {WHOLE_S:g} s; send the file") from None
        raise InputError(f"the address can't be read: {type(error).__name__}") from None
    finally:
        watchdog.cancel()
        connection.close()


def _cut(raw: socket.socket) -> None:
    """End a connection whose other end keeps sending a little."""
    with suppress(OSError):
        raw.shutdown(socket.SHUT_RDWR)


def _connect(scheme: str, host: str, port: int, allowed: Allowed) -> http.client.HTTPConnection:
    """Connect to an address that is allowed, under the host's own name."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        raise InputError(f"the host {host!r} is unknown") from None
    addresses = list(dict.fromkeys(str(each[4][0]) for each in found))
    if not addresses or not all(allowed(each) for each in addresses):
        raise InputError(f"the host {host!r} lies in a network that this service doesn't look in")
    try:
        raw = socket.create_connection((addresses[0], port), PATIENCE_S)
        if scheme == "https":
            raw = ssl.create_default_context().wrap_socket(raw, server_hostname=host)
    except OSError as error:
        raise InputError(f"the host {host!r} doesn't answer: {type(error).__name__}") from None
    connection = http.client.HTTPConnection(host, port, timeout=PATIENCE_S)
    connection.sock = raw
    return connection
