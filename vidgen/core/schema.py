"""A config's dataclass as JSON Schema, by which editors complete and check what people write.

Draft 2020-12 (json-schema.org). Descriptions are those of the docstrings' attributes.
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from vidgen.core.config import dump

_SCALARS: dict[Any, dict[str, Any]] = {
    bool: {"type": "boolean"}, int: {"type": "integer"}, float: {"type": "number"},
    str: {"type": "string"}, Path: {"type": "string"}, Fraction: {"type": ["number", "string"]},
}


def json_schema(kind: type, title: str) -> dict[str, Any]:
    """The schema of what `build(kind, ...)` reads.

    Args:
        kind: a dataclass; see `vidgen.core.config.build`.
        title: of the schema.
    """
    parts: dict[str, Any] = {}
    _of_dataclass(kind, parts)
    own = parts.pop(kind.__name__)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": title, **own,
            "$defs": dict(sorted(parts.items()))}


def _of_dataclass(kind: type, parts: dict[str, Any]) -> dict[str, Any]:
    """A reference to a dataclass's schema, which is put into `parts`."""
    reference = {"$ref": f"#/$defs/{kind.__name__}"}
    if kind.__name__ in parts:
        return reference
    parts[kind.__name__] = {}  # known before it is filled, as it may hold itself
    text, hints = inspect.getdoc(kind) or "", get_type_hints(kind)
    told, properties, required = _attributes(text), {}, []
    for field in fields(kind):
        if not field.init:
            continue
        schema = _of_hint(hints[field.name], parts)
        if field.metadata.get("one"):
            schema = _either([schema["items"], schema])
        properties[field.name] = schema | _facts(field, told)
        if field.default is MISSING and field.default_factory is MISSING:
            required.append(field.name)
    schema = {"type": "object", "properties": properties, "additionalProperties": False}
    if required:
        schema["required"] = required
    short = getattr(kind, "SHORT", None)
    if short is not None:
        plain = {k: v for k, v in properties[short].items() if k not in ("default", "description")}
        schema = _either([plain, schema])
    parts[kind.__name__] = {"description": text.partition("\n")[0], **schema}
    return reference


def _facts(field: Field[Any], told: Mapping[str, str]) -> dict[str, Any]:
    facts = {}
    if field.name in told:
        facts["description"] = told[field.name]
    if field.default not in (MISSING, None, ()):
        facts["default"] = dump(field.default)
    return facts


def _attributes(text: str) -> dict[str, str]:
    """The docstring's section of attributes: name -> words."""
    _, _, section = text.partition("Attributes:\n")
    section = re.split(r"\n\n", section)[0]
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE)
    return {name: " ".join(words.split()) for name, words in entries}


def _of_hint(hint: Any, parts: dict[str, Any]) -> dict[str, Any]:
    origin, args = get_origin(hint), get_args(hint)
    if is_dataclass(hint) and isinstance(hint, type):
        return _of_dataclass(hint, parts)
    if origin is Literal:
        return {"enum": list(args)}
    if origin in (Union, types.UnionType):
        return _either([{"type": "null"} if arg is type(None) else _of_hint(arg, parts)
                        for arg in args])
    if origin in (dict, Mapping):
        return {"type": "object", "additionalProperties": _of_hint(args[1], parts)}
    if origin is tuple and args[-1] is not Ellipsis:
        items = [_of_hint(arg, parts) for arg in args]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "items": False}
    if origin in (tuple, list):
        return {"type": "array", "items": _of_hint(args[0], parts)}
    return dict(_SCALARS.get(hint, {}))


def _either(schemas: list[dict[str, Any]]) -> dict[str, Any]:
    return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
