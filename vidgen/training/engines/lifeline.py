"""A dead rank is noticed at once, and the others stop with the reason.

Collectives notice late: NCCL's wait for their time-out. So each rank holds a connection to rank 0,
and the operating system closes it when the rank ends, however it ends; keep-alive probes tell of a
machine that is gone. Rank 0 passes the first reason on. A rank that hears of one ends its process,
since its main thread may wait in a collective for ever.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from contextlib import suppress

import torch
import torch.distributed as dist

_SECRET, _MEETING_S = 16, 300.0
GRACE_S = 5.0
"""How long the main thread has, once a rank is lost, to leave by itself."""
_PROBES = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
"""A silent machine counts as gone after 10 + 4 * 5 seconds."""


class Lifeline:
    """This rank's connection to the others; all ranks make it together.

    Args:
        rank: of this process.
        size: number of ranks.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._reason: str | None = None
        self._known, self._closing = threading.Event(), False
        self._peers = self._listen() if rank == 0 else {0: self._connect()}
        self._bell, self._button = socket.socketpair()
        self._thread = threading.Thread(target=self._watch, name="vidgen-lifeline", daemon=True)
        self._thread.start()

    def fail(self, why: str) -> None:
        """Tell the others that this rank can't go on."""
        self._spread(f"rank {self.rank} of {self.size} failed: {why}")

    def reason(self, wait_s: float = 0.0) -> str | None:
        """Why the ranks stop, once that is known; None if nothing is known to be wrong."""
        self._known.wait(wait_s)
        return self._reason

    def close(self) -> None:
        """Leave in peace."""
        self._closing = True
        for peer in self._peers.values():
            with suppress(OSError):
                peer.sendall(b"\n")  # an empty line is a farewell
                peer.shutdown(socket.SHUT_WR)
        self._button.close()
        self._thread.join()
        for peer in (self._bell, *self._peers.values()):
            peer.close()

    def _listen(self) -> dict[int, socket.socket]:
        server = socket.create_server(("", 0), backlog=self.size)
        secret = secrets.token_bytes(_SECRET)  # so that nobody else counts as a rank
        _share((server.getsockname()[1], secret))
        peers: dict[int, socket.socket] = {}
        server.settimeout(_MEETING_S)
        while len(peers) < self.size - 1:
            peer, _ = server.accept()
            if secrets.compare_digest(_exactly(peer, _SECRET), secret):
                peers[int.from_bytes(_exactly(peer, 4), "little")] = _kept_alive(peer)
            else:
                peer.close()
        server.close()
        return peers

    def _connect(self) -> socket.socket:
        port, secret = _share(None)
        peer = socket.create_connection((os.environ["MASTER_ADDR"], port), timeout=_MEETING_S)
        peer.sendall(secret + self.rank.to_bytes(4, "little"))
        return _kept_alive(peer)

    def _watch(self) -> None:
        selector = selectors.DefaultSelector()
        selector.register(self._bell, selectors.EVENT_READ)
        for rank, peer in self._peers.items():
            selector.register(peer, selectors.EVENT_READ, rank)
        heard = dict.fromkeys(self._peers, b"")
        while not self._closing:
            for key, _ in selector.select():
                if key.data is None:  # the main thread leaves
                    break
                with suppress(OSError):
                    data = b""
                    data = key.fileobj.recv(1 << 16)  # type: ignore[union-attr]
                heard[key.data] += data
                *lines, heard[key.data] = heard[key.data].split(b"\n")
                for line in lines:
                    if line:
                        self._end(json.loads(line))
                farewell = any(not line for line in lines)
                if farewell or not data:
                    selector.unregister(key.fileobj)
                if not farewell and not data and not self._closing:
                    self._end(f"rank {key.data} of {self.size} is gone: killed, maybe for lack of "
                              "memory, or its machine can't be reached")

    def _end(self, reason: str) -> None:
        """Tell all and leave, also where the main thread waits in a collective."""
        self._spread(reason)
        until = time.monotonic() + GRACE_S
        while not self._closing and time.monotonic() < until:
            time.sleep(0.05)
        if not self._closing:
            print(f"error: {self._reason}", file=sys.stderr, flush=True)
            os._exit(1)

    def _spread(self, reason: str) -> None:
        if self._reason is not None:
            return
        self._reason = reason
        self._known.set()
        for peer in self._peers.values():
            with suppress(OSError):
                peer.sendall(json.dumps(reason).encode() + b"\n")


def _share(said: tuple[int, bytes] | None) -> tuple[int, bytes]:
    """What rank 0 says, on all ranks."""
    box = [said]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    assert box[0] is not None
    return box[0]


def _kept_alive(peer: socket.socket) -> socket.socket:
    peer.settimeout(None)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, seconds in _PROBES.items():
        if hasattr(socket, name):  # not on every system
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), seconds)
    return peer


def _exactly(peer: socket.socket, count: int) -> bytes:
    """So many bytes, or fewer from one that left."""
    peer.settimeout(_MEETING_S)
    data = b""
    while len(data) < count:
        more = peer.recv(count - len(data))
        if not more:
            break
        data += more
    return data
