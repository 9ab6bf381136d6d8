"""Hashes of a film's shots, by which a file that was changed since its rendering is found out.

`sums.json` in the shots' folder holds the SHA-256 of each by its name. A file that isn't in it yet,
because a kill came before, is taken as it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from vidgen.core.errors import InputError
from vidgen.core.runtime import atomic_write, sha256_file
from vidgen.story.render import RenderedShot

SUMS = "sums.json"


def remember(shots: Iterable[RenderedShot]) -> None:
    """Keep the hashes of those that were rendered now."""
    made: dict[Path, dict[str, str]] = {}
    for each in shots:
        if each.made:
            made.setdefault(each.path.parent, {})[each.path.name] = sha256_file(each.path)
    for folder, sums in made.items():
        _keep(folder, _read(folder) | sums)


def check_shots(shots: Iterable[RenderedShot]) -> None:
    """Compare shots with what was rendered, and keep the hashes of those that have none.

    Raises:
        InputError: a file that is missing or was changed.
    """
    known: dict[Path, dict[str, str]] = {}
    changed = set[Path]()
    for each in shots:
        folder, name = each.path.parent, each.path.name
        if not each.path.is_file():
            raise InputError(f"shot {each.shot.id!r}: {each.path} is not there any more; the same "
                             "command renders it again")
        if folder not in known:
            known[folder] = _read(folder)
        found = sha256_file(each.path)
        if known[folder].setdefault(name, found) != found:
            raise InputError(f"shot {each.shot.id!r}: {each.path} was changed since it was "
                             "rendered; remove it, and the same command renders it again")
        changed.add(folder)
    for folder in changed:
        if known[folder] != _read(folder):
            _keep(folder, known[folder])


def _keep(folder: Path, sums: dict[str, str]) -> None:
    atomic_write(folder / SUMS, json.dumps(sums, indent=1, sort_keys=True).encode())


def _read(folder: Path) -> dict[str, str]:
    try:
        sums = json.loads((folder / SUMS).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return sums if isinstance(sums, dict) else {}
