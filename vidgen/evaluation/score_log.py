"""What a killed run finds again: scores by content address."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vidgen.core.errors import InputError
from vidgen.core.runtime import write_error


class ScoreLog:
    """Scores by content address, one JSON line each, safe against being killed at any moment."""

    def __init__(self, path: Path) -> None:
        self.path, self.scores = path, dict[str, dict[str, Any]]()
        try:
            lines = path.read_bytes().splitlines() if path.exists() else []
        except OSError as error:
            raise InputError(f"{path}, where scores are kept, can't be read: {error.strerror}; "
                             "move it away, or name another output") from None
        for line in lines:
            try:
                entry = json.loads(line)
                key, scores = entry["key"], entry["scores"]
            except (ValueError, LookupError, TypeError, RecursionError):
                continue  # cut short by a kill, or no scores
            if isinstance(key, str) and isinstance(scores, dict):
                self.scores[key] = scores

    def add(self, entries: Iterable[tuple[str, dict[str, Any]]]) -> None:
        """Append scores and have them on disk.

        Raises:
            OutputError: no room, or not to be written.
        """
        try:
            with self.path.open("a+b") as file:
                if file.tell() and not self.path.read_bytes().endswith(b"\n"):
                    file.write(b"\n")
                for key, scores in entries:
                    self.scores[key] = scores
                    file.write(json.dumps({"key": key, "scores": scores}).encode() + b"\n")
        except OSError as error:
            raise write_error(self.path, error) from None
