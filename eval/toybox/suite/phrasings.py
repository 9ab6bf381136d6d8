"""Prompts as people type them: sentences written by hand, unlike the grammar, each with its truth.

They stand in phrasings.json, the kinds by turns, so that the first of them are of every kind. Their
scenes tell what each sentence says and nothing more; so the grammar's caption of the same scene is
what a sentence is to be compared with.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from train.toybox.world.motion import ASSETS
from train.toybox.world.scenes import SEED_RANGES, Actor, Scene, times_in
from vidgen.core.errors import InputError

_FIRST = 1 << 35  # within a split's seeds


class Phrasing(NamedTuple):
    """A sentence, what sets it apart, and what it says."""

    scene: Scene
    text: str
    kind: str


def read_phrasings(count: int, split: Literal["dev", "test"] = "dev") -> list[Phrasing]:
    """The first `count` phrasings; the split gives the scenes' seeds, not other sentences.

    Raises:
        InputError: there aren't so many.
    """
    rows = _rows()
    if count > len(rows):
        raise InputError(f"phrasings is {count}; there are {len(rows)}: give that many or fewer")
    first = SEED_RANGES[split][0] + _FIRST
    return [Phrasing(_scene(row, first + i), row["text"], row["kind"])
            for i, row in enumerate(rows[:count])]  # fmt: skip


@lru_cache(maxsize=1)
def _rows() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((ASSETS / "phrasings.json").read_text("utf-8"))
    return rows


def _scene(row: dict[str, Any], seed: int) -> Scene:
    """What a row says; of what it leaves open the usual."""
    own = {name: row[name] for name in ("tint", "size", "direction") if name in row}
    place = row["place"]
    return Scene(
        seed, (Actor(row["sprite"], row["motion"], **own),), place,
        row.get("time_of_day", times_in(place)[0]), row.get("weather", "clear"), row["camera"],
    )  # fmt: skip
