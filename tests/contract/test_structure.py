"""The package keeps docs/explanation/architecture.md: no circle, no laboratory, no sprawl."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import lru_cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2]
MAX_FILE_LINES = 500
MAX_LINES = 45_000
MAX_FILES = 240


@lru_cache
def sources() -> dict[str, Path]:
    """Return the package's files by their dotted names."""
    found = {}
    for path in sorted((ROOT / "vidgen").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(name: str, path: Path) -> Iterator[str]:
    """Yield the dotted names that a file imports, also in functions and for types alone."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base]).rstrip(".")
            yield from (f"{base}.{alias.name}" for alias in node.names)


def module_of(name: str) -> str | None:
    """Return the package's module that a dotted name is, or lies in."""
    while name and name not in sources():
        name = name.rpartition(".")[0]
    return name or None


@lru_cache
def ties() -> dict[str, set[str]]:
    """Return by module the others that it imports.

    The package itself is left out, as import-linter leaves it out: its public names load lazily.
    """
    found: dict[str, set[str]] = {}
    for name, path in sources().items():
        others = {module_of(each) for each in imported(name, path)} - {None, name, "vidgen"}
        found[name] = {each for each in others if each is not None}
    del found["vidgen"]
    return found


def test_no_module_imports_itself_around_a_circle():
    try:
        TopologicalSorter(ties()).prepare()
    except CycleError as error:
        raise AssertionError(" imports ".join(reversed(error.args[1]))) from None


def test_the_package_imports_nothing_of_the_laboratory_or_the_tests():
    outside = {
        f"{name} imports {each}"
        for name, path in sources().items() for each in imported(name, path)
        if each.partition(".")[0] in ("eval", "tests", "train")
    }
    assert outside == set()


def test_files_are_short_and_few():
    lengths = {name: len(path.read_text("utf-8").splitlines()) for name, path in sources().items()}
    assert {name: count for name, count in lengths.items() if count > MAX_FILE_LINES} == {}
    assert len(lengths) <= MAX_FILES
    assert sum(lengths.values()) <= MAX_LINES
