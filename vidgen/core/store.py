"""Content-addressed store of clips and scores, so that none is computed twice.

An address is a hash of all inputs of a result, so an existing result is found by its address alone,
and a changed input leads to a new result. Films, suites and sweeps keep their clips in such
folders, and resume by generating the missing ones:

    FOLDER/
        ADDRESS.mp4              a clip
        ADDRESS.mp4.vidgen-job/  the journal of an interrupted clip, which resumes from it
        NAME.json                data about an address or about the whole folder

All of it may be deleted at any time. Scores of clips are lines of a log, with addresses as keys.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from vidgen.core.errors import InputError, OutputError
from vidgen.core.runtime import atomic_write, cache_folder, write_error


def address_of(facts: Any) -> str:
    """Return the address of a result with these inputs, 32 hexadecimal digits.

    Args:
        facts: JSON data; the order of keys doesn't matter.
    """
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


class Store:
    """Folder of files by address; the first write creates it."""

    def __init__(self, folder: Path, suffix: str = ".mp4") -> None:
        self.folder, self.suffix = folder, suffix

    def path(self, address: str) -> Path:
        """Return the path of an address's file, which may not exist."""
        return self.folder / f"{address}{self.suffix}"

    def has(self, address: str) -> bool:
        """Return whether the result of an address exists."""
        return self.path(address).is_file()

    def data(self, name: str) -> dict[str, Any]:
        """Return the JSON data kept under a name; {} if it is missing or can't be read."""
        try:
            data = json.loads(self._data_path(name).read_text("utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return data if isinstance(data, dict) else {}

    def keep(self, name: str, data: Mapping[str, Any]) -> None:
        """Write JSON data under a name, unless it is already there.

        Raises:
            OutputError: the folder can't be written, or the disk is full.
        """
        if data == self.data(name):
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(self.folder, error) from None
        atomic_write(self._data_path(name), json.dumps(data, indent=1).encode())

    def _data_path(self, name: str) -> Path:
        return self.folder / f"{name}.json"


def read_cache(name: str) -> dict[str, Any]:
    """Return the JSON data under a name in the user's cache; {} if it can't be read."""
    return Store(cache_folder()).data(name)


def write_cache(name: str, data: Mapping[str, Any]) -> None:
    """Write JSON data under a name in the user's cache; ignore errors, since it is optional."""
    with suppress(OutputError):
        Store(cache_folder()).keep(name, data)


class ScoreLog:
    """Scores by address, one JSON line each; a kill at any moment loses only the last line."""

    def __init__(self, path: Path) -> None:
        self.path, self.scores = path, dict[str, dict[str, Any]]()
        try:
            lines = path.read_bytes().splitlines() if path.exists() else []
        except OSError as error:
            raise InputError(f"the score log {path} can't be read: {error.strerror}; move it away, "
                             "or name another output") from None
        for line in lines:
            try:
                entry = json.loads(line)
                key, scores = entry["key"], entry["scores"]
            except (ValueError, LookupError, TypeError, RecursionError):
                continue  # an incomplete line of a killed process, or other data
            if isinstance(key, str) and isinstance(scores, dict):
                self.scores[key] = scores

    def add(self, entries: Iterable[tuple[str, dict[str, Any]]]) -> None:
        """Append pairs (address, scores).

        Raises:
            OutputError: the disk is full, or the file can't be written.
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
