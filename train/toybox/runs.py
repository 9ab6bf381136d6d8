"""Run files of the embedded model's programs, which may go on from another file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vidgen.core.config_file import Located, apply_overrides, load_yaml
from vidgen.core.errors import InputError, kind_of


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> Located:
    """Read a run's file, fill in from `base: OTHER.yaml` what it leaves out, write overrides in.

    Mappings are joined key by key, lists and values replaced whole.

    Args:
        path: the file; its base's name counts from its folder, and a base may have one itself.
        overrides: see `apply_overrides`.

    Raises:
        InputError: as `load_yaml` and `apply_overrides`; a base that is no name, or leads back.
    """
    layers, places, place = [load_yaml(path)], [Path(path).resolve()], Path(path)
    while (base := layers[-1].pop("base", None)) is not None:
        if not isinstance(base, str):
            raise InputError(f"config {place}: base must be a file's name, not {kind_of(base)}")
        place = place.parent / base
        if place.resolve() in places:
            raise InputError(f"config {path}: its base {place} leads back to it; leave one out")
        places.append(place.resolve())
        layers.append(load_yaml(place))
    whole: Any = layers[-1]
    for layer in layers[-2::-1]:
        whole = _joined(whole, layer)
    return apply_overrides(whole, overrides)


def _joined(below: Any, above: Any) -> Any:
    """Lay `above` over `below`, without the lines of `below`, which are another file's."""
    if not (isinstance(below, Mapping) and isinstance(above, Mapping)):
        return above
    items = {key: _unplaced(value) for key, value in below.items()}
    for key, value in above.items():
        items[key] = _joined(items[key], value) if key in items else value
    return Located(items, getattr(above, "lines", {}))


def _unplaced(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _unplaced(item) for key, item in value.items()}
    return [_unplaced(item) for item in value] if isinstance(value, list) else value
