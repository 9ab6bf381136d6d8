"""Events of jobs, from any thread to the streams of the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

MAX_WAITING = 200
"""Events that may wait for a slow listener; above that, passing ones are left out."""
PASSING = ("queue", "progress", "preview")
"""Events that the next one of their kind replaces."""


@dataclass(frozen=True)
class Event:
    """Something that happened to a job.

    Attributes:
        name: status, queue, progress, preview or deleted.
        job: its id.
        owner: the job's owner.
        data: JSON data.
        is_last: whether nothing follows.
    """

    name: str
    job: str
    owner: str
    data: dict[str, Any]
    is_last: bool = False


@dataclass(eq=False)
class Listener:
    """One stream."""

    owner: str
    job: str | None
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[Event | None] = field(default_factory=asyncio.Queue)

    def offer(self, event: Event | None) -> None:
        """Queue an event; None ends the stream."""
        is_passing = event is not None and event.name in PASSING
        if is_passing and self.events.qsize() > MAX_WAITING:
            return
        self.events.put_nowait(event)


class Hub:
    """Passes events to their listeners."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listeners: set[Listener] = set()
        self._is_closed = False

    @property
    def is_heard(self) -> bool:
        """Whether anybody listens."""
        return bool(self._listeners)

    def publish(self, event: Event) -> None:
        """Pass an event to its listeners, from any thread."""
        with self._lock:
            found = [each for each in self._listeners
                     if each.owner == event.owner and each.job in (None, event.job)]
        for each in found:
            self._offer(each, event)

    def close(self) -> None:
        """End all streams, now and from here on."""
        with self._lock:
            self._is_closed = True
            found = list(self._listeners)
        for each in found:
            self._offer(each, None)

    def listen(self, owner: str, job: str | None) -> Listener:
        """Listen to an owner's jobs, or one of them, from now on; `stream` yields the events."""
        listener = Listener(owner, job, asyncio.get_running_loop())
        with self._lock:
            self._listeners.add(listener)
            if self._is_closed:
                listener.offer(None)
        return listener

    def leave(self, listener: Listener) -> None:
        """Stop listening."""
        with self._lock:
            self._listeners.discard(listener)

    async def stream(self, listener: Listener, ping_s: float) -> AsyncIterator[Event | None]:
        """Yield events as they come, and None whenever none came for a while, up to the last."""
        try:
            while True:
                try:
                    event = await asyncio.wait_for(listener.events.get(), ping_s)
                except TimeoutError:
                    yield None
                    continue
                if event is None:
                    return
                yield event
                if event.is_last and listener.job is not None:
                    return
        finally:
            self.leave(listener)

    @staticmethod
    def _offer(listener: Listener, event: Event | None) -> None:
        with suppress(RuntimeError):  # the loop is closed, so nobody listens any more
            listener.loop.call_soon_threadsafe(listener.offer, event)
