"""Strict conversion of mappings to dataclasses and back.

`vidgen.core.config_file` reads the mappings. The error for an unknown key names its place or the
nearest known key; the error for a wrong type names the value's place and the expected type.

Dataclasses can allow two short forms: with a class variable `SHORT`, which names a field, the
value of that field can stand for the whole mapping; a field with the metadata `ONE` holds several
values, but takes a single one without a list.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import MISSING, Field, fields, is_dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from vidgen.core.errors import InputError, kind_of, nearest, quoted

T = TypeVar("T")

ONE = {"one": True}
"""Metadata of a field that holds several values and takes a single one without a list."""


class _Place(NamedTuple):
    """Place of a value in a file, for messages: `run.yaml, line 3: optim.betas[1]`."""

    root: type
    source: str
    path: str = ""
    line: int | None = None

    def inside(self, key: str, line: int | None = None) -> _Place:
        path = f"{self.path}{'.' if self.path and not key.startswith('[') else ''}{key[:120]}"
        return self._replace(path=path, line=line or self.line)

    def __str__(self) -> str:
        line = "" if self.line is None else f", line {self.line}"
        return ": ".join(part for part in (f"{self.source}{line}".lstrip(", "), self.path) if part)


def build(kind: type[T], mapping: Mapping[str, Any], where: str = "") -> T:
    """Build a dataclass, including nested ones, from a mapping of its fields by name.

    Args:
        kind: a dataclass; its fields may be scalars, Literal, unions, tuples, lists, dicts with
            text keys, paths, fractions and dataclasses. Its class variable `CALLED` maps synonyms
            to field names, for messages.
        where: name of the mapping for messages, such as a file's name.

    Raises:
        InputError: an unknown or missing key, or a value of the wrong type.
    """
    return _build(kind, mapping, _Place(kind, where))


def _build(kind: type[T], mapping: Mapping[str, Any], place: _Place) -> T:
    assert is_dataclass(kind)
    known, lines = _fields(kind), getattr(mapping, "lines", {})
    for key in mapping:
        if key not in known:
            here = place._replace(line=lines.get(key, place.line))
            raise InputError(f"{here}: unknown key {quoted(str(key))}; {_remedy(key, kind, place)}")
    start = place._replace(line=min(lines.values(), default=place.line))
    for name, field in known.items():
        if name not in mapping and field.default is MISSING and field.default_factory is MISSING:
            raise InputError(f"{start}: the key {name!r} is missing")
    hints, values = _hints(kind), {}
    for key, value in mapping.items():
        is_list = isinstance(value, list | tuple)
        given = [value] if known[key].metadata.get("one") and not is_list else value
        values[key] = _convert(hints[key], given, place.inside(key, lines.get(key)))
    try:
        return kind(**values)
    except InputError as error:  # from the dataclass's own __post_init__
        raise InputError(": ".join(filter(None, (str(start), str(error))))) from None


def _remedy(key: str, kind: type, place: _Place) -> str:
    """Return advice for an unknown key: where it belongs, or the nearest known key."""
    known, called = _fields(kind), getattr(place.root, "CALLED", {})
    homes = [home for home, name in _keys(place.root) if name == key]
    if not homes or called.get(key) in known:
        return nearest(str(key), known, called)
    if "" in homes:
        top = re.split(r"[.\[]", place.path)[0]
        return f"it belongs next to {top!r}, not inside it"
    return f"it belongs in {min(homes, key=lambda home: home.count('.'))!r}"


def _keys(kind: type, path: str = "", above: tuple[type, ...] = ()) -> Iterator[tuple[str, str]]:
    """Yield (dotted name of its mapping, key) of a dataclass and of those in its fields."""
    for name in _fields(kind):
        yield path, name
        for inner in _dataclasses(_hints(kind)[name]):
            if inner not in (kind, *above):
                yield from _keys(inner, f"{path}.{name}".lstrip("."), (kind, *above))


def _dataclasses(hint: Any) -> Iterator[type]:
    """Yield the dataclasses that a type hint contains."""
    if is_dataclass(hint) and isinstance(hint, type):
        yield hint
    for part in get_args(hint):
        yield from _dataclasses(part)


def dump(value: Any) -> Any:
    """Convert a dataclass to JSON data: tuples become lists, paths and fractions become text."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: dump(getattr(value, f.name)) for f in fields(value) if f.init}
    if isinstance(value, Mapping):
        return {str(key): dump(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [dump(item) for item in value]
    if isinstance(value, Path | Fraction):
        return str(value)
    return value


def flattened(data: Any, name: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings and lists by dotted name, such as "optim.betas.1"."""
    if isinstance(data, list | tuple):
        data = dict(enumerate(data))
    if not isinstance(data, Mapping):
        return {name: data}
    parts = (flattened(each, f"{name}.{key}" if name else str(key)) for key, each in data.items())
    return {leaf: value for part in parts for leaf, value in part.items()}


@cache
def _fields(kind: type) -> dict[str, Field[Any]]:
    return {field.name: field for field in fields(kind) if field.init}


_hints = cache(get_type_hints)


def _convert(hint: Any, value: Any, place: _Place) -> Any:
    """Check `value` against a type hint; convert types that YAML lacks, such as tuples."""
    origin, args = get_origin(hint), get_args(hint)
    is_class = isinstance(hint, type) and is_dataclass(hint)
    if hint is Any or (is_class and isinstance(value, hint)):
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(args, value, place)
    if origin is Literal:
        if any(value == arg and type(value) is type(arg) for arg in args):
            return value
        raise InputError(f"{place} is {quoted(value)}; {nearest(str(value), map(str, args))}")
    short = getattr(hint, "SHORT", None)
    if short is not None and not isinstance(value, Mapping):
        value = {short: value}
    if isinstance(value, Mapping):
        if is_class:
            return _build(hint, value, place)
        if origin in (dict, Mapping):
            return {key: _convert(args[1], item, place.inside(str(key)))
                    for key, item in value.items()}
    if isinstance(value, list | tuple) and origin in (tuple, list):
        hints = args if origin is tuple and args[-1] is not Ellipsis else args[:1] * len(value)
        if len(hints) != len(value):
            raise InputError(f"{place} has {len(value)} entries; it must have {len(hints)}")
        return origin(_convert(each, item, place.inside(f"[{i}]"))
                      for i, (each, item) in enumerate(zip(hints, value, strict=True)))
    return _convert_scalar(hint, value, place)


def _convert_union(hints: tuple[Any, ...], value: Any, place: _Place) -> Any:
    options = [hint for hint in hints if hint is not type(None)]
    if value is None and len(options) < len(hints):
        return None
    fitting = [hint for hint in options if _is_nested(hint) == isinstance(value, Mapping)]
    if len(options) == 1 or (len(fitting) == 1 and isinstance(value, Mapping)):
        return _convert((fitting or options)[0], value, place)
    for hint in options:
        with suppress(InputError):
            return _convert(hint, value, place)
    expected = " or ".join(_describe(hint) for hint in options)
    raise InputError(f"{place} must be {expected}, not {kind_of(value)}")


def _is_nested(hint: Any) -> bool:
    return is_dataclass(hint) or get_origin(hint) in (dict, Mapping)


def _convert_scalar(hint: Any, value: Any, place: _Place) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint in (bool, str, dict, list) and isinstance(value, hint):
        return value
    if hint is Path and isinstance(value, str | Path):
        return Path(value)
    if hint is int and is_number and (isinstance(value, int) or value.is_integer()):
        return int(value)
    if hint is float and is_number:
        try:
            return float(value)
        except OverflowError:
            raise InputError(f"{place} has {len(str(value))} digits, too many for a number"
                             ) from None
    if hint is Fraction and (is_number or isinstance(value, str | Fraction)):
        with suppress(ValueError, OverflowError, ZeroDivisionError):
            return Fraction(value)
    quotes = "; write it in quotes" if hint is str and isinstance(value, int | float) else ""
    raise InputError(f"{place} must be {_describe(hint)}, not {kind_of(value)}{quotes}")


def _describe(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text",
             Path: "a path", Fraction: "a number or fraction such as 24000/1001"}
    if hint in names:
        return names[hint]
    return "a list" if get_origin(hint) in (tuple, list) else "a mapping"
