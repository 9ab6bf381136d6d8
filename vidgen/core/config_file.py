"""Strict reader of YAML and JSON files: it records the line of each key and refuses duplicate keys.

`vidgen.core.config` converts the result to dataclasses.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from vidgen.core.errors import InputError, kind_of

MAX_NODES = 2_000_000
"""Largest number of values in a file; an alias counts each time it is used."""


class Located(dict[str, Any]):
    """Mapping read from YAML, with the line number of each key in `lines`."""

    def __init__(self, items: Mapping[str, Any], lines: Mapping[str, int]) -> None:
        super().__init__(items)
        self.lines = dict(lines)


class _StrictLoader(yaml.SafeLoader):
    """YAML 1.2 scalars (`1e-4` is a number, `no` and `1:30` are text), without duplicate keys."""

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        value = super().construct_scalar(node)
        # JSON escapes a character beyond 16 bits as two surrogates
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")

    def locate(self, node: yaml.MappingNode) -> Iterator[Located]:
        mapping = Located({}, {})
        yield mapping  # registered before it is filled, since an alias may point back to it
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, str):
                raise InputError(f"line {line}: the key {key!r} is not text; write it in quotes")
            if key in mapping:
                raise InputError(f"line {line}: the key {key!r} appears a second time; remove one")
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
    """Read one YAML or JSON file whose top level is a mapping.

    Args:
        what: kind of the file, for messages.

    Raises:
        InputError: a missing file, invalid text or YAML, a duplicate key, no mapping at the top
            level, or aliases that expand to more than `MAX_NODES` values.
    """
    text = load_text(path, what)
    if Path(path).suffix.lower() == ".json":
        text = text.replace("\t", " ")  # JSON allows tabs between values, YAML doesn't
    try:
        value = _parse(text)
    except yaml.YAMLError as error:
        raise InputError(f"{what} {path} is not YAML: {_why(error, text)}") from None
    except InputError as error:
        raise InputError(f"{what} {path}, {error}") from None
    value = Located({}, {}) if value is None else value
    if not isinstance(value, Located):
        raise InputError(f"{what} {path} must be a mapping `key: value`, not {kind_of(value)}")
    return value


def packaged_config(name: str) -> Path:
    """Return the path of a training config below `configs`, in the package or in the checkout."""
    packaged = Path(str(files("vidgen"))) / "configs" / name
    return packaged if packaged.is_file() else Path(__file__).parents[2] / "configs" / name


def load_text(path: str | Path, what: str = "config") -> str:
    """Read a UTF-8 file, with or without a byte order mark.

    Raises:
        InputError: a missing file, or one that isn't text.
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
    """Return a copy of `mapping` with overrides such as `optim.betas.1=0.99` applied.

    Values are parsed as YAML; numbers in the path index lists.

    Raises:
        InputError: an override without `=`, or a path that doesn't exist.
    """
    result: Any = _copy(mapping)
    for override in overrides:
        path, equals, text = override.partition("=")
        if not (path and equals):
            raise InputError(f"override {override!r} must be key=value, such as optim.lr=1e-4")
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


def _why(error: yaml.YAMLError, text: str) -> str:
    """Return a parser error as one line, with its line number."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return " ".join(str(error).split())
    line = "".join(text.splitlines()[mark.line : mark.line + 1])
    indent = line[: len(line) - len(line.lstrip())]
    if "\t" in indent or line[mark.column :].startswith("\t"):
        return (f"line {mark.line + 1}: a tab where YAML allows only spaces; replace it with "
                "spaces")
    parts = (getattr(error, name, None) for name in ("context", "problem"))
    return f"line {mark.line + 1}: {', '.join(part for part in parts if part)}"


def _count_nodes(value: Any, counts: dict[int, int]) -> int:
    """Count a value and all values inside it; an aliased value counts at each use.

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
        raise yaml.YAMLError(f"its aliases expand to more than {MAX_NODES:,} values")
    return found


def _parse(text: str) -> Any:
    try:
        value = yaml.load(text, Loader=_StrictLoader)  # a SafeLoader: builds plain data only
        _count_nodes(value, {})
        return value
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        # PyYAML passes on Python's errors for `!!int x`, some dates and deep nesting
        raise yaml.YAMLError(f"a value can't be read: {error}") from error


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        items = {key: _copy(item) for key, item in value.items()}
        return Located(items, getattr(value, "lines", {}))
    return [_copy(item) for item in value] if isinstance(value, list | tuple) else value


def _slot(target: Any, step: str, override: str) -> Any:
    """Return the key or index in `target` that a step of an override's path names."""
    if isinstance(target, dict):
        return step
    if isinstance(target, list) and step.isdigit() and int(step) < len(target):
        return int(step)
    raise InputError(f"override {override!r}: {step!r} doesn't exist in {kind_of(target)}")
