"""Each feature has a test at each door, or a reason why not: features_of_*.yaml hold them.

A new option, key of a script or field of the service needs a row, or a name in one, with its tests.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from vidgen.cli.main import VERBS, verb_parser
from vidgen.core.request import Request
from vidgen.pipeline.settings import SETTINGS
from vidgen.server import schema

ROOT = Path(__file__).parents[2]
DOORS = ("command", "python", "api", "script", "film", "studio")
MAKING = ("extend", "script", "replay", "sweep")
"""Verbs that make clips; options that generate lacks are named VERB.option."""
BODIES = ("VideoRequest", "FilmRequest", "ExtraParams", "LoraChoice")
TABLES = [yaml.safe_load(path.read_text())
          for path in sorted(Path(__file__).parent.glob("features_of_*.yaml"))]
FEATURES: dict[str, dict[str, Any]] = {
    feature: table["otherwise"] | row
    for table in TABLES for feature, row in table["features"].items()
}

each_feature = pytest.mark.parametrize("feature", FEATURES)


@lru_cache
def known_tests() -> frozenset[str]:
    """All tests as FILE::TEST, by reading their files."""
    return frozenset(
        f"{path.name}::{node.name}" for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.name.startswith("test_"))


def names_there() -> Iterator[str]:
    """All that a person can say at one of the doors."""
    shows_help = {"help", "help_all"}
    options = {verb: {action.dest for action in verb_parser(verb)[1]._actions} - shows_help
               for verb in ("generate", *MAKING)}
    yield from options["generate"]
    fields_of_request = set(Request.model_fields)
    yield from (f"Request.{name}" for name in fields_of_request - options["generate"])
    for verb in MAKING:
        yield from (f"{verb}.{option}" for option in options[verb] - options["generate"])
    yield from (f"verb {verb}" for verb in VERBS)
    yield from (f"setting {name}" for name in SETTINGS)
    script = json.loads((ROOT / "docs/script.schema.json").read_text())
    yield from (f"script.{key}" for key in script["properties"])
    defaults = keys_of(script["$defs"].pop("Defaults"))
    assert defaults <= keys_of(script["$defs"]["Shot"]), "defaults are of shots"
    for place, node in script["$defs"].items():
        yield from (f"{place}.{key}" for key in keys_of(node))
    for body in BODIES:
        asked = set(getattr(schema, body).model_fields)
        yield from (f"{body}.{field}" for field in asked - {"extra_params"})


def keys_of(node: dict[str, Any]) -> set[str]:
    """The keys of a mapping of the schema, or of the one that a short form stands for."""
    others = [keys_of(each) for way in ("anyOf", "oneOf") for each in node.get(way, ())]
    return set(node.get("properties", ())).union(*others)


@each_feature
def test_each_door_has_its_test_or_a_reason(feature: str) -> None:
    row = FEATURES[feature]
    assert set(row) == {"names", *DOORS}
    for door in DOORS:
        cell = row[door]
        if isinstance(cell, str) and cell.startswith("as "):
            cell = row[cell.removeprefix("as ")]
        if not (isinstance(cell, str) and cell.startswith(("no: ", "untested: "))):
            named = {cell} if isinstance(cell, str) else set(cell)
            assert named - known_tests() == set(), f"{door}: there are no such tests"


def test_every_name_at_a_door_has_its_feature() -> None:
    named = [name for row in FEATURES.values() for name in row["names"]]
    twice = {name for name in named if named.count(name) > 1}
    assert twice == set()
    there = set(names_there())
    assert there - set(named) == set(), "add them to features_of_*.yaml, each with its tests"
    assert set(named) - there == set(), "what is gone from the doors goes from the table"
