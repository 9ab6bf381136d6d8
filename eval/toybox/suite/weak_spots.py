"""Where a model fails: what clips that went wrong have in common, in their scenes.

A rate of all clips hides a kind of which there are few and most go wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import numpy as np

from train.toybox.world.captions import attributes
from train.toybox.world.scenes import Scene

PERMUTATIONS = 10_000
SIGNIFICANCE = 0.05


@dataclass(frozen=True)
class WeakSpot:
    """A kind of scene of which more goes wrong than of the others, by more than chance.

    Attributes:
        source: of the clips.
        measure: the rate.
        trait: what tells the scenes apart.
        name: the kind.
        value: its rate.
        others: that of all other clips.
        total: its clips.
        p: how often as little is right of as many scenes drawn at random, times the number of
            kinds that were looked at (Bonferroni); `SIGNIFICANCE` at most.
    """

    source: str
    measure: str
    trait: str
    name: str
    value: float
    others: float
    total: int
    p: float

    @property
    def lost(self) -> float:
        """Clips that would be right if the kind were like the others."""
        return (self.others - self.value) * self.total


def weak_spots(
    scores: Mapping[str, Sequence[Mapping[str, Any]]], scenes: Mapping[str, Sequence[Scene]]
) -> list[dict[str, Any]]:
    """Find the weak spots of all sources, those that cost most clips first.

    Args:
        scores: by source, a row for each clip, whose "right" says of each measure if it is.
        scenes: the same clips' scenes.

    Returns:
        `WeakSpot` as dictionaries.
    """
    found = [
        spot
        for source, rows in scores.items()
        for measure in dict.fromkeys(name for row in rows for name in row["right"])
        for spot in _of_measure(source, measure, rows, scenes[source])
    ]
    return [asdict(spot) for spot in sorted(found, key=lambda spot: -spot.lost)]


def _of_measure(
    source: str, measure: str, rows: Sequence[Mapping[str, Any]], scenes: Sequence[Scene]
) -> Iterator[WeakSpot]:
    """Those of one measure; clips of one scene are alike, so scenes are what is drawn."""
    by_scene: dict[Scene, list[bool]] = {}
    for row, scene in zip(rows, scenes, strict=True):
        if measure in row["right"]:
            by_scene.setdefault(scene, []).append(bool(row["right"][measure]))
    counts = [len(right) for right in by_scene.values()]
    rates = np.array([fmean(right) for right in by_scene.values()], np.float32)
    kinds = _kinds(list(by_scene))
    if not kinds or rates.min() == rates.max():
        return
    draws = np.random.default_rng(0).permuted(np.tile(rates, (PERMUTATIONS, 1)), axis=1)
    drawn = draws.cumsum(axis=1)
    for (trait, name), members in kinds.items():
        mine, others = rates[members], np.delete(rates, members)
        least = drawn[:, len(members) - 1] <= mine.sum() + 1e-4  # sums are float32
        p = (1 + int(least.sum())) / (1 + PERMUTATIONS) * len(kinds)
        if p <= SIGNIFICANCE:
            total = sum(counts[index] for index in members)
            means = float(mine.mean()), float(others.mean())
            yield WeakSpot(source, measure, trait, name, *means, total, p)


def _kinds(scenes: Sequence[Scene]) -> dict[tuple[str, str], list[int]]:
    """Scenes by trait and kind; not what all or none of them are."""
    found: dict[tuple[str, str], list[int]] = {}
    for index, scene in enumerate(scenes):
        for kind in _traits(scene).items():
            found.setdefault(kind, []).append(index)
    return {kind: members for kind, members in found.items() if len(members) < len(scenes)}


def _traits(scene: Scene) -> dict[str, str]:
    """What kind of scene it is, by trait; what is told of an actor is the first one's."""
    told = attributes(scene)
    names = ("size", "motion", "speed", "place", "time_of_day", "weather", "camera")
    return {
        "tint": "tinted" if any(actor.tint for actor in scene.actors) else "as it is",
        **{name.replace("_", " "): told[name] for name in names},
        "relation": scene.relation or "alone",
    }
