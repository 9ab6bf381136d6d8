"""SHA-256 of files, remembered between runs, so that 60 GB are read once."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vidgen.core.errors import OutputError
from vidgen.core.runtime import atomic_write, cache_folder, sha256_file

MIN_BYTES = 1_000_000
"""Smaller files are hashed anew each time."""
_SETTLED_S = 2.0  # a file changed this recently may change again within its time stamp's grain


def hash_files(paths: Iterable[Path]) -> dict[Path, str]:
    """SHA-256 of each file, taken from the cache where path, size and time of change are the same.

    A cache that can't be read is ignored, one that can't be written isn't written.
    """
    place = cache_folder() / "hashes.json"
    known, hashes, learned = _read(place), {}, {}
    for path in paths:
        facts = path.stat()
        key = str(path.resolve())
        stamp = [facts.st_size, facts.st_mtime_ns]
        entry = known.get(key)
        if entry is not None and entry[:2] == stamp:
            hashes[path] = entry[2]
            continue
        hashes[path] = sha256_file(path)
        if facts.st_size >= MIN_BYTES and time.time() - facts.st_mtime > _SETTLED_S:
            learned[key] = [*stamp, hashes[path]]
    if learned:
        kept = {key: value for key, value in _read(place).items() if Path(key).is_file()}
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(place, json.dumps(kept | learned, indent=1).encode())
        except (OSError, OutputError):
            pass
    return hashes


def _read(place: Path) -> dict[str, Any]:
    try:
        entries = json.loads(place.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(entries, dict):
        return {}
    return {key: value for key, value in entries.items() if _is_entry(value)}


def _is_entry(value: Any) -> bool:
    return isinstance(value, list) and [type(item) for item in value] == [int, int, str]
