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


def check_shots(shots: Iterable[RenderedShot]) -> None:
    """Compare shots with what was rendered, and remember those that are new.

    Raises:
        InputError: a file that is missing or was changed.
    """
    known: dict[Path, dict[str, str]] = {}
    changed: dict[Path, dict[str, str]] = {}
    for each in shots:
        path = each.path
        if not path.is_file():
            raise InputError(f"shot {each.shot.id!r}: {path} is not there any more; the same "
                             "command renders it again")
        sums = known.setdefault(path.parent, _read(path.parent))
        found = sha256_file(path)
        before = None if each.made else sums.get(path.name)
        if before is not None and before != found:
            raise InputError(f"shot {each.shot.id!r}: {path} was changed since it was rendered; "
                             "remove it, and the same command renders it again")
        if sums.get(path.name) != found:
            sums[path.name] = found
            changed[path.parent] = sums
    for folder, sums in changed.items():
        atomic_write(folder / SUMS, json.dumps(sums, indent=1, sort_keys=True).encode())


def _read(folder: Path) -> dict[str, str]:
    try:
        sums = json.loads((folder / SUMS).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return sums if isinstance(sums, dict) else {}
