"""The service as a process: bound, started, drained, ended."""

from __future__ import annotations

import fcntl
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TextIO

import uvicorn

from vidgen.core.errors import InputError, OutputError
from vidgen.server.app import make_app
from vidgen.server.guard import MAX_REQUESTS
from vidgen.server.keys import Keys
from vidgen.server.logs import log_as_json
from vidgen.server.service import Service
from vidgen.server.settings import Settings

SPARE_CONNECTIONS = 100
"""Beyond those of requests that are answered: idle ones, and those that are told to come again."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
log = logging.getLogger(__name__)


def serve(settings: Settings, on_ready: Callable[[str], None]) -> None:
    """Serve until a signal ends it: the first drains, the second doesn't wait.

    Args:
        settings: of the service.
        on_ready: told the address when requests are answered.

    Raises:
        InputError: the address can't be had, or is open to others while there are no keys; or all
            keys are revoked.
        ModelError: the model can't be opened.
        OutputError: another service works in the folder, or it can't be written.
    """
    log_as_json()
    _require_keys(settings)
    with _hold(settings.data), _bound(settings) as listener:
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        service = Service(settings)
        service.start()
        server = _Server(service, f"http://{host}:{listener.getsockname()[1]}", on_ready)
        try:
            server.run(sockets=[listener])
        finally:
            service.stop(0.0 if server.is_hurried else settings.drain_s)


def _require_keys(settings: Settings) -> None:
    keys = Keys(settings.keys)
    if keys.all():
        return
    if not settings.is_loopback:
        raise InputError(f"host {settings.host} can be reached by others, and there are no keys; "
                         "draw one with --new-key NAME, or leave --host out")
    if keys.are_used:
        raise InputError(f"all keys in {keys.path} are revoked; draw one with --new-key NAME, or "
                         "remove the file to let everybody on this machine in")


class _Server(uvicorn.Server):
    """Uvicorn whose first signal lets the running job finish or be put by before it closes."""

    def __init__(self, service: Service, url: str, on_ready: Callable[[str], None]) -> None:
        super().__init__(uvicorn.Config(
            make_app(service), log_config=None, access_log=False, lifespan="off",
            limit_concurrency=MAX_REQUESTS + SPARE_CONNECTIONS, server_header=False,
            timeout_graceful_shutdown=5, timeout_keep_alive=30,
        ))
        self._service, self._url, self._on_ready = service, url, on_ready
        self.is_draining = self.is_hurried = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to answer."""
        await super().startup(sockets=sockets)
        self._on_ready(self._url)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Answer signals as long as the server runs."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {each: signal.signal(each, self.handle_exit) for each in _SIGNALS}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Drain, or hurry."""
        if self.is_draining:
            self.is_hurried = self.should_exit = True
            return
        self.is_draining = True
        log.info("stopping: the running job is finished or put by")
        threading.Thread(target=self._drain, daemon=True).start()

    def _drain(self) -> None:
        self._service.scheduler.drain(self._service.settings.drain_s)
        self._service.hub.close()
        self.should_exit = True


@contextmanager
def _hold(data: Path) -> Iterator[TextIO]:
    """The folder for one service alone.

    Raises:
        OutputError: another one works in it, or it can't be made.
    """
    try:
        data.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = (data / "lock").open("w")
    except OSError as error:
        raise OutputError(f"{data} can't be written: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"another service works in {data}; stop it, or give another folder "
                              "with --data") from None
        yield file


@contextmanager
def _bound(settings: Settings) -> Iterator[socket.socket]:
    """A socket that listens.

    Raises:
        InputError: the address is none, or taken.
    """
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)
        family, kind, proto, _, address = found[0]
        listener = socket.socket(family, kind, proto)
    except OSError as error:
        raise InputError(f"host {settings.host!r} is no address: {error.strerror}") from None
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            raise InputError(f"{settings.host}:{settings.port} can't be listened at: "
                             f"{error.strerror}; give another --port") from None
        yield listener

