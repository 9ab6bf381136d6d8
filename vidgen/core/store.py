"""Results kept in a folder under addresses, so that none is ever made twice.

An address is a hash of all that shapes a result: a result that exists is recognised without a look
at any other, and a change of what shapes it makes it again. Films, suites and sweeps keep their
clips in such folders, and resume by making what is missing:

    FOLDER/
        ADDRESS.mp4              a clip
        ADDRESS.mp4.vidgen-job/  the journal of one that was stopped, which resumes from it
        NAME.json                what is known of an address or of the whole folder

All of it may be removed at any time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vidgen.core.runtime import atomic_write


def address_of(facts: Any) -> str:
    """Return the address of a result that these facts shape, as 32 hexadecimal digits.

    Args:
        facts: JSON data; the order of keys doesn't count.
    """
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


class Store:
    """A folder of files by address; it is made when something is written.

    Args:
        folder: the folder.
        suffix: of its files.
    """

    def __init__(self, folder: Path, suffix: str = ".mp4") -> None:
        self.folder, self.suffix = folder, suffix

    def path(self, address: str) -> Path:
        """Return the file of an address."""
        return self.folder / f"{address}{self.suffix}"

    def has(self, address: str) -> bool:
        """Return whether a result exists."""
        return self.path(address).is_file()

    def data(self, name: str) -> dict[str, Any]:
        """Return the data kept under a name; empty if there is none, or it can't be read."""
        try:
            data = json.loads(self._data_path(name).read_text("utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return data if isinstance(data, dict) else {}

    def keep(self, name: str, data: Mapping[str, Any]) -> None:
        """Write JSON data under a name, unless it is there already.

        Raises:
            OutputError: the folder can't be written, or the disk is full.
        """
        if data == self.data(name):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(data, indent=1, ensure_ascii=False)
        atomic_write(self._data_path(name), text.encode())

    def _data_path(self, name: str) -> Path:
        return self.folder / f"{name}.json"
