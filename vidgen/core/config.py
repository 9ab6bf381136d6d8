"""Strict configs: YAML or JSON in, frozen dataclasses out, and back again.

Nothing is guessed and nothing ignored: an unknown key is an error that names the nearest known one,
a value of the wrong type says where it stands and what is expected there.

Two short forms, where a dataclass asks for them: one with a class variable `SHORT` may be written
as the value of the field that it names, and a field of metadata `ONE` as its only entry.
"""

from __future__ import annotations

import json
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from fractions import Fraction
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from vidgen.core.errors import InputError, nearest, quoted

T = TypeVar("T")

ONE = {"one": True}
"""Metadata of a field that holds several values, of which a single one needs no list."""
MAX_NODES = 2_000_000
"""Values that a config may hold, those behind aliases counted wherever they are repeated."""


def called(*names: str) -> dict[str, Any]:
    """Metadata of a field that other doors call so: who writes one of those is told its name."""
    return {"called": names}


class Located(dict[str, Any]):
    """A mapping read from YAML that remembers the line of each of its keys."""

    def __init__(self, items: Mapping[str, Any], lines: Mapping[str, int]) -> None:
        super().__init__(items)
        self.lines = dict(lines)


class _StrictLoader(yaml.SafeLoader):
    """YAML 1.2's scalars (`1e-4` is a number, `no` and `1:30` are text) and no key twice."""

    def locate(self, node: yaml.MappingNode) -> Iterator[Located]:
        mapping = Located({}, {})
        yield mapping  # known before it is filled, as an alias may point back to it
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, str):
                raise InputError(f"line {line}: the key {key!r} is not text; write it in quotes")
            if key in mapping:
                raise InputError(f"line {line}: the key {key!r} stands here for a second time")
            mapping[key] = self.construct_object(value_node, deep=True)
            mapping.lines[key] = line


_StrictLoader.yaml_implicit_resolvers = {}
_StrictLoader.add_constructor("tag:yaml.org,2002:map", _StrictLoader.locate)
for _tag, _pattern, _first in (
    ("null", r"(~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"(true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"[-+]?[0-9]+$", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$", list("-+.0123456789")),
    ("float", r"([-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$", list("-+.")),
):
    _StrictLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first
    )


def load_yaml(path: str | Path, what: str = "config") -> Located:
    """Read one YAML or JSON file whose top is a mapping.

    Args:
        path: the file; `.json` is JSON, all else YAML.
        what: the file is, for messages.

    Raises:
        InputError: missing, not text, not YAML or JSON, a key twice, no mapping at the top, or
            aliases that unfold without end.
    """
    text = load_text(path, what)
    try:
        if Path(path).suffix.lower() == ".json":
            text = _json_as_yaml(text)
        value = _parse(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{what} {path} is not JSON: line {error.lineno}: {error.msg}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{what} {path} is not YAML: {_why(error, text)}") from None
    except InputError as error:
        raise InputError(f"{what} {path}, {error}") from None
    except (ValueError, RecursionError) as error:  # numbers and nesting that json gives up on
        raise InputError(f"{what} {path} can't be read as JSON: {error}") from None
    if value is None:
        value = Located({}, {})
    if not isinstance(value, Located):
        raise InputError(f"{what} {path} must be a mapping `key: value`, not {_kind(value)}")
    return value


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
            raise InputError(f"config {place}: base must be a file's name, not {_kind(base)}")
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
    """`above` over `below`, whose lines would be told of another file."""
    if not (isinstance(below, Mapping) and isinstance(above, Mapping)):
        return above
    items = {key: _copy(value, placed=False) for key, value in below.items()}
    for key, value in above.items():
        items[key] = _joined(items[key], value) if key in items else value
    return Located(items, getattr(above, "lines", {}))


def packaged_config(name: str) -> Path:
    """A run's file by its name below `configs`: the package's own, else the checkout's."""
    packaged = Path(str(files("vidgen"))) / "configs" / name
    return packaged if packaged.is_file() else Path(__file__).parents[2] / "configs" / name


def load_text(path: str | Path, what: str = "config") -> str:
    """Read a file of UTF-8, with a byte order mark or without.

    Raises:
        InputError: missing, or not text.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{what} {path} does not exist; correct the name") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{what} {path} can't be read as text: {error.reason} at byte "
                         f"{error.start}; save it as UTF-8") from None
    except OSError as error:
        raise InputError(f"{what} {path} can't be read as text: {error}") from None


def apply_overrides(mapping: Mapping[str, Any], overrides: Sequence[str]) -> Located:
    """A copy of `mapping` with `a.b=value` written in; values are YAML, numbers index lists.

    Raises:
        InputError: no `=`, or a step of the path is neither a mapping nor a list that long.
    """
    result: Any = _copy(mapping)
    for override in overrides:
        path, equals, text = override.partition("=")
        if not (path and equals):
            raise InputError(f"override {override!r} must read key=value, such as optim.lr=1e-4")
        try:
            value = _parse(text)
        except yaml.YAMLError:
            value = text
        target = result
        *parents, last = path.split(".")
        for step in parents:
            if isinstance(target, dict):
                target.setdefault(step, Located({}, {}))
            target = target[_slot(target, step, override)]
        target[_slot(target, last, override)] = value
    assert isinstance(result, Located)
    return result


def build(kind: type[T], mapping: Mapping[str, Any], where: str = "") -> T:
    """Make a dataclass from a mapping, nested ones included.

    Args:
        kind: a dataclass; its fields may be scalars, Literal, Optional and other unions, tuples,
            lists, dicts with text keys, paths, fractions and dataclasses.
        mapping: its fields by name; fields with a default may be left out.
        where: what the mapping is, for messages: a file's name, a key's path.

    Raises:
        InputError: an unknown or missing key, or a value of the wrong type.
    """
    assert is_dataclass(kind)
    known = _fields(kind)
    lines = getattr(mapping, "lines", {})
    for key in mapping:
        if key not in known:
            line = f", line {lines[key]}" if key in lines else ""
            raise InputError(f"{where}{line}: unknown key {quoted(key)}; {_meant(key, known)}")
    start = f"{where}, line {min(lines.values())}" if lines else where
    for name, field in known.items():
        if name not in mapping and field.default is MISSING and field.default_factory is MISSING:
            raise InputError(f"{start}: the key {name!r} is missing")
    hints = _hints(kind)
    values = {}
    for key, value in mapping.items():
        line = f", line {lines[key]}" if key in lines else ""
        is_list = isinstance(value, list | tuple)
        given = [value] if known[key].metadata.get("one") and not is_list else value
        values[key] = _convert(hints[key], given, f"{where}{line}: {key}")
    try:
        return kind(**values)
    except InputError as error:  # what the dataclass itself finds wrong
        raise InputError(f"{start}: {error}" if start else str(error)) from None


def _meant(key: Any, known: Mapping[str, Field[Any]]) -> str:
    """Which key an unknown one may stand for: one that other doors call so, else the nearest."""
    for name, field in known.items():
        if key in field.metadata.get("called", ()):
            return f"did you mean {name!r}?"
    return nearest(str(key), known)


def dump(value: Any) -> Any:
    """Plain JSON and YAML data from a dataclass: tuples become lists, paths and fractions text."""
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
    """Leaves of nested mappings and lists by dotted name."""
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


def _json_as_yaml(text: str) -> str:
    """JSON in the part of it that YAML reads alike, line by line the same.

    Raises:
        json.JSONDecodeError: it isn't JSON.
    """
    json.loads(text)  # tabs in JSON stand between values only
    pair = r"(?<!\\)((?:\\\\)*)\\u([dD][89abAB]\w\w)\\u([dD][c-fC-F]\w\w)"

    def joined(found: re.Match[str]) -> str:
        high, low = int(found[2], 16), int(found[3], 16)
        return f"{found[1]}\\U{0x10000 + ((high - 0xD800) << 10) + low - 0xDC00:08x}"

    return re.sub(pair, joined, text.replace("\t", " "))


def _why(error: yaml.YAMLError, text: str) -> str:
    """An error of the parser in one line: where it is, and what to do where that is known."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return " ".join(str(error).split())
    line = "".join(text.splitlines()[mark.line : mark.line + 1])
    indent = line[: len(line) - len(line.lstrip())]
    if "\t" in indent or line[mark.column :].startswith("\t"):
        return f"line {mark.line + 1}: a tab stands where YAML takes spaces alone; replace it"
    told = (getattr(error, name, None) for name in ("context", "problem"))
    return f"line {mark.line + 1}: {', '.join(part for part in told if part)}"


def _count_nodes(value: Any, counts: dict[int, int]) -> int:
    """How many values there are below one, with those that aliases repeat.

    Raises:
        yaml.YAMLError: more than `MAX_NODES`.
    """
    if not isinstance(value, dict | list):
        return 1
    found = counts.get(id(value))
    if found is None:
        inner = value.values() if isinstance(value, dict) else value
        found = counts[id(value)] = 1 + sum(_count_nodes(each, counts) for each in inner)
    if found > MAX_NODES:
        raise yaml.YAMLError(f"its aliases unfold to more than {MAX_NODES:,} values")
    return found


def _parse(text: str) -> Any:
    try:
        value = yaml.load(text, Loader=_StrictLoader)  # a SafeLoader: builds plain data only
        _count_nodes(value, {})
        return value
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        # PyYAML lets through what `!!int x`, a date or deep nesting leads it to.
        raise yaml.YAMLError(f"a value can't be read: {error}") from error


def _copy(value: Any, *, placed: bool = True) -> Any:
    if isinstance(value, Mapping):
        items = {key: _copy(item, placed=placed) for key, item in value.items()}
        return Located(items, getattr(value, "lines", {}) if placed else {})
    if isinstance(value, list | tuple):
        return [_copy(item, placed=placed) for item in value]
    return value


def _slot(target: Any, step: str, override: str) -> Any:
    """The key or index that a step of an override's path means in `target`."""
    if isinstance(target, dict):
        return step
    if isinstance(target, list) and step.isdigit() and int(step) < len(target):
        return int(step)
    raise InputError(f"override {override!r}: {step!r} leads nowhere in {_kind(target)}")


def _kind(value: Any) -> str:
    if isinstance(value, list):
        return f"a list of {len(value)}"
    names = {type(None): "nothing", dict: "a mapping", Located: "a mapping"}
    return names.get(type(value), f"{type(value).__name__} {quoted(value)}")


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Check `value` against a type hint and convert what YAML can't express itself."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any or (isinstance(hint, type) and is_dataclass(hint) and isinstance(value, hint)):
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(args, value, where)
    if origin is Literal:
        if any(value == arg and type(value) is type(arg) for arg in args):
            return value
        raise InputError(f"{where} is {quoted(value)}; {nearest(str(value), map(str, args))}")
    short = getattr(hint, "SHORT", None)
    if short is not None and not isinstance(value, Mapping):
        return build(hint, {short: value}, where)
    if isinstance(value, Mapping):
        if is_dataclass(hint) and isinstance(hint, type):
            return build(hint, value, where)
        if origin in (dict, Mapping):
            return {
                key: _convert(args[1], item, f"{where}.{str(key)[:120]}")
                for key, item in value.items()
            }
    if isinstance(value, list | tuple) and origin in (tuple, list):
        hints = args if origin is tuple and args[-1] is not Ellipsis else args[:1] * len(value)
        if len(hints) != len(value):
            raise InputError(f"{where} has {len(value)} entries; it must have {len(hints)}")
        pairs = zip(hints, value, strict=True)
        return origin(_convert(h, item, f"{where}[{i}]") for i, (h, item) in enumerate(pairs))
    return _convert_scalar(hint, value, where)


def _convert_union(hints: tuple[Any, ...], value: Any, where: str) -> Any:
    options = [hint for hint in hints if hint is not type(None)]
    if value is None and len(options) < len(hints):
        return None
    fitting = [hint for hint in options if _is_nested(hint) == isinstance(value, Mapping)]
    if len(options) == 1 or (len(fitting) == 1 and isinstance(value, Mapping)):
        return _convert((fitting or options)[0], value, where)
    for hint in options:
        try:
            return _convert(hint, value, where)
        except InputError:
            continue
    expected = " or ".join(_describe(hint) for hint in options)
    raise InputError(f"{where} must be {expected}, not {_kind(value)}")


def _is_nested(hint: Any) -> bool:
    return is_dataclass(hint) or get_origin(hint) in (dict, Mapping)


def _convert_scalar(hint: Any, value: Any, where: str) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is float and is_number:
        try:
            return float(value)
        except OverflowError:
            raise InputError(f"{where} has {len(str(value))} digits, which is too many") from None
    if hint is Path and isinstance(value, str | Path):
        return Path(value)
    if hint is int and is_number and (isinstance(value, int) or value.is_integer()):
        return int(value)
    if hint in (bool, str, dict, list) and isinstance(value, hint):
        return value
    if hint is Fraction and (is_number or isinstance(value, str | Fraction)):
        try:
            return Fraction(value)
        except (ValueError, OverflowError, ZeroDivisionError):
            pass
    quotes = "; write it in quotes" if hint is str and isinstance(value, int | float) else ""
    raise InputError(f"{where} must be {_describe(hint)}, not {_kind(value)}{quotes}")


def _describe(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text",
             Path: "a path", Fraction: "a number or fraction such as 24000/1001"}
    if hint in names:
        return names[hint]
    return "a list" if get_origin(hint) in (tuple, list) else "a mapping"
