"""The state of what checks a clip as arrays and JSON data, so that it can be kept and gone on from.

Only the classes named here come back: what a file holds never decides what is run.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np

from vidgen.core.errors import InputError
from vidgen.media.trackers import Drift, Drifts, Flashes, Freezes, Runs, Span, Spans, Spikes
from vidgen.media.types import Snapshot

_CLASSES = {each.__name__: each for each in (
    Drift, Drifts, Flashes, Freezes, Runs, Span, Spans, Spikes
)}  # fmt: skip
_DAMAGES = (KeyError, TypeError, ValueError, AttributeError)


def pack(state: dict[str, Any]) -> Snapshot:
    """Copies of values by name: numbers, texts, arrays, collections of them and trackers."""
    arrays: dict[str, np.ndarray[Any, Any]] = {}

    def packed(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            name = f"seen.{len(arrays)}"
            arrays[name] = value.copy()
            return {"array": name}
        if isinstance(value, np.generic):
            return value.item()
        if isinstance(value, dict):
            return {"dict": {key: packed(each) for key, each in value.items()}}
        if isinstance(value, list | tuple | deque):
            items = [packed(each) for each in value]
            kept = {type(value).__name__: items}
            return kept | {"maxlen": value.maxlen} if isinstance(value, deque) else kept
        if type(value).__name__ in _CLASSES:
            return {"class": type(value).__name__, "fields": packed(vars(value))}
        return value

    return arrays, packed(state)


def unpack(snapshot: Snapshot) -> dict[str, Any]:
    """What `pack` was given.

    Raises:
        InputError: it is damaged.
    """
    arrays, state = snapshot

    def unpacked(data: Any) -> Any:
        match data:
            case {"array": name}:
                return arrays[name]
            case {"dict": items}:
                return {key: unpacked(each) for key, each in items.items()}
            case {"list": items}:
                return [unpacked(each) for each in items]
            case {"tuple": items}:
                return tuple(unpacked(each) for each in items)
            case {"deque": items, "maxlen": longest}:
                return deque((unpacked(each) for each in items), longest)
            case {"class": name, "fields": fields}:
                kind = _CLASSES[name]
                made = object.__new__(kind)
                vars(made).update(unpacked(fields))
                return made
        return data

    try:
        return dict(unpacked(state))
    except _DAMAGES as error:
        raise InputError(f"what the checks had seen is damaged ({type(error).__name__}: {error}); "
                         "start anew with --overwrite") from None
