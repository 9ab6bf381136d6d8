"""A film of its shots, joined by cuts: packets are copied, no frame is encoded again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vidgen import __version__
from vidgen.core.config import dump
from vidgen.core.errors import InputError
from vidgen.media.join import join_files, why_not_joined
from vidgen.story.film import FilmPlan
from vidgen.story.render import RenderedShot


def left_out(shots: Sequence[RenderedShot]) -> list[str]:
    """Keys of shots that a film of cuts can't show or let hear, sorted."""
    keys = {name for each in shots for name in ("sound", "narration", "music", "caption")
            if getattr(each.shot, name)}
    kinds = (each.shot.transition for each in shots)
    return sorted(keys | {"transition" for kind in kinds if kind and kind.type != "cut"})


def film_recipe(film: FilmPlan, shots: Sequence[RenderedShot]) -> dict[str, Any]:
    """What shaped a film: its script and the address and seed of every shot."""
    return {
        "vidgen": __version__,
        "model": {"name": film.folder.name, "sha256": film.folder.content_hash},
        "film": {
            "script": dump(film.script),
            "shots": [{"id": each.shot.id, "address": each.path.stem, "seed": each.seed}
                      for each in shots],
        },
    }


def join_by_cuts(film: FilmPlan, shots: Sequence[RenderedShot], output: str | Path) -> Path:
    """Write shots one after the other into one file; it replaces what lies there.

    Raises:
        InputError: their sizes, rates or encoders differ.
        OutputError: it can't be written or the disk is full.
    """
    paths = [each.path for each in shots]
    reason = why_not_joined(paths)
    if reason is not None:
        raise InputError(f"the shots can't be joined by cuts: {reason}; remove the shots' folder "
                         f"{paths[0].parent} and render them again")
    return join_files(paths, output, recipe=film_recipe(film, shots))
