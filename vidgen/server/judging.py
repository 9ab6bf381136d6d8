"""Questions to the process that checks requests, asked from any thread; see `checker.py`."""

from __future__ import annotations

import itertools
import logging
import threading
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from vidgen.core.errors import ModelError, VidgenError
from vidgen.server.ipc import Child, Message
from vidgen.server.settings import Settings
from vidgen.server.types import FAILED, Refusal

PATIENCE_S = 120.0
"""For an answer; opening the model is a part of the first."""
MAX_DEATHS = 2
"""Processes that go down over a question before it is refused; one may have other reasons."""
log = logging.getLogger(__name__)


@dataclass
class _Question:
    """A question without an answer yet."""

    message: Message
    answer: Future[Message] = field(default_factory=Future)
    deaths: int = 0


class Judge:
    """Asks the checker, and restarts it when it dies."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._open: dict[int, _Question] = {}
        self._model: Future[dict[str, Any]] = Future()
        self._is_closed = self._is_ready = False
        self._child = self._start()

    def model(self) -> dict[str, Any]:
        """Return the model's abilities.

        Raises:
            ModelError: it can't be opened.
        """
        return self._model.result(PATIENCE_S)

    def ask(self, question: str, **arguments: Any) -> dict[str, Any]:
        """Return the checker's answer.

        Raises:
            Refusal: the request can't be made, or its files crash the checker.
            VidgenError: the checker failed for a reason of its own.
        """
        with self._lock:
            number = next(self._numbers)
            asked = _Question({"ask": question, "id": number, **arguments})
            self._open[number], child = asked, self._child
        child.send(asked.message)
        try:
            answer = asked.answer.result(PATIENCE_S)
        except TimeoutError:
            with self._lock:
                self._open.pop(number, None)
                child = self._child
            child.kill()
            raise Refusal("what was sent can't be read in time; send it in a usual "
                          "format") from None
        if answer.get("code") == FAILED:
            raise VidgenError(answer["text"])
        if "result" not in answer:
            raise Refusal(answer["text"], answer["code"])
        result: dict[str, Any] = answer["result"]
        return result

    def close(self) -> None:
        """End the process."""
        self._is_closed = True
        self._child.leave(1.0)

    def _start(self) -> Child:
        words = [self._settings.model, *self._settings.limits.as_words()]
        return Child("vidgen.server.checker", words, self._hear, self._gone)

    def _hear(self, message: Message) -> None:
        match message["event"]:
            case "ready":
                self._is_ready = True
                if not self._model.done():
                    self._model.set_result(message["model"])
            case "broken":
                if not self._model.done():
                    self._model.set_exception(ModelError(message["text"]))
            case "answer":
                with self._lock:
                    asked = self._open.pop(message["id"], None)
                if asked is not None:
                    asked.answer.set_result(message)
            case "log":
                log.warning("%s", message["text"], extra={"trace": message["trace"]})

    def _gone(self, fate: str) -> None:
        """Restart and ask again; a question that seems to crash each process is refused."""
        if not self._model.done():
            self._model.set_exception(VidgenError(f"the checks can't start: {fate}"))
        if self._is_closed or self._model.exception() is not None:
            return
        log.error("the checker %s", fate)
        with self._lock:
            if self._is_ready:  # else it can't have been for what was asked
                self._refuse_deadly()
            self._is_ready = False
            child = self._child = self._start()
            left = list(self._open.values())
        for asked in left:
            child.send(asked.message)

    def _refuse_deadly(self) -> None:
        """Blame the first question, since they are answered in order."""
        if not self._open:
            return
        number, first = next(iter(self._open.items()))
        first.deaths += 1
        if first.deaths >= MAX_DEATHS:
            del self._open[number]
            first.answer.set_result({"code": "invalid_request", "text": (
                "what was sent brings the reader of such files down; send it in another format")})
