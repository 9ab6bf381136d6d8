"""What a killed run finds again: scores by content address."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class ScoreLog:
    """Scores by content address, one JSON line each, safe against being killed at any moment."""

    def __init__(self, path: Path) -> None:
        self.path, self.scores = path, dict[str, dict[str, Any]]()
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue  # the last line of a run that was killed while writing it
            self.scores[entry["key"]] = entry["scores"]

    def add(self, entries: Iterable[tuple[str, dict[str, Any]]]) -> None:
        """Append scores and have them on disk."""
        with self.path.open("a+b") as file:
            if file.tell() and not self.path.read_bytes().endswith(b"\n"):
                file.write(b"\n")
            for key, scores in entries:
                self.scores[key] = scores
                file.write(json.dumps({"key": key, "scores": scores}).encode() + b"\n")
            file.flush()
