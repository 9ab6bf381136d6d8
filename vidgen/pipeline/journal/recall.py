"""Journals of a request: one for each clip, and the settings that an earlier run began with."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vidgen.core.errors import InputError
from vidgen.core.shapes import Tiles
from vidgen.pipeline.journal.journal import Journal

if TYPE_CHECKING:
    from vidgen.core.request import Request

log = logging.getLogger(__name__)


def recall(request: Request, journals: Sequence[Journal]) -> Request:
    """Restore jobs' seed, tiles, normalised words and thread count; raise InputError."""
    for index, journal in enumerate(journals):
        recipe = journal.recipe or {}
        if request.seed is None and "plan" in recipe:
            request = replace(request, seed=recipe["plan"]["seed"] - index)
        if request.tiles == "auto" and "tiles" in recipe.get("plan", ()):
            request = replace(request, tiles=recorded_tiles(recipe["plan"]))
        if request.readings == "auto" and "readings" in recipe.get("plan", ()):
            request = replace(request, readings=recorded_readings(recipe["plan"]))
        threads = recipe.get("machine", {}).get("threads")
        if threads and journal.unfinished:
            _use_threads(threads, journal)
    return request


def journals_of(journal: Journal | Sequence[Journal] | None, count: int) -> Sequence[Journal]:
    """Return one journal per clip; raise InputError if their number differs."""
    if journal is None:
        return [Journal(None) for _ in range(count)]
    journals = [journal] if isinstance(journal, Journal) else journal
    if len(journals) != count:
        raise InputError(f"{len(journals)} journals for {count} clips; give one for each")
    return journals


def _use_threads(threads: int, journal: Journal) -> None:
    import torch

    if torch.get_num_threads() == threads:
        return
    torch.set_num_threads(threads)
    if torch.get_num_threads() != threads:
        raise InputError(f"{journal.folder} began with {threads} threads, which can't be had here")
    log.warning("%s goes on with %d threads, as it began", journal.output, threads)


def recorded_tiles(plan: Mapping[str, Any]) -> str:
    """Return the option that gives the tiles of a recipe's plan."""
    tiles = plan.get("tiles")
    return "none" if tiles is None else str(Tiles(tiles["rows"], tiles["columns"]))


def recorded_readings(plan: Mapping[str, Any]) -> str:
    """Return the option that gives the normalised words of a recipe's plan."""
    return ",".join(f"{word}={known}" for word, known in plan.get("readings", ())) or "none"
