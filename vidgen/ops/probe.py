"""What is faster on this machine, measured once and kept: bits depend on it, it must not flip.

The answers lie in `probes.json` in the cache folder, by processor, PyTorch and thread count; delete
it to measure anew. Recipes and journals name what was chosen.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vidgen.core.errors import OutputError
from vidgen.core.runtime import atomic_write, cache_folder, fingerprint

_REPEATS = 5


def is_faster(name: str, first: Callable[[], Any], second: Callable[[], Any]) -> bool:
    """Whether `first` takes less time than `second`, as measured when `name` was first asked for.

    Args:
        name: of the question, with all that the answer depends on beside the machine.
        first: does the work once; called several times, in turns with `second`.
        second: does the same another way.
    """
    machine = fingerprint()
    key = f"{name}, {machine['cpu']}, torch {machine['torch']}, {machine['threads']} threads"
    known = _read()
    if key not in known:
        known[key] = _time_in_turns(first, second)
        try:
            _place().parent.mkdir(parents=True, exist_ok=True)
            atomic_write(_place(), json.dumps(known, indent=1).encode())
        except (OSError, OutputError):
            pass  # measured again next time
    ours, theirs = known[key]
    return bool(ours < theirs)


def _time_in_turns(first: Callable[[], Any], second: Callable[[], Any]) -> tuple[float, float]:
    """Median seconds of each."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(1 + _REPEATS):
        for work, seen in zip((first, second), times, strict=True):
            start = time.perf_counter()
            work()
            seen.append(time.perf_counter() - start)
    return statistics.median(times[0][1:]), statistics.median(times[1][1:])


def _place() -> Path:
    return cache_folder() / "probes.json"


def _read() -> dict[str, Any]:
    try:
        known = json.loads(_place().read_text())
        good = isinstance(known, dict) and all(len(pair) == 2 for pair in known.values())
    except (OSError, ValueError, TypeError):
        return {}
    return known if good else {}
