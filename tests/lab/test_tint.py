"""The ruler of tints: the drawing in the tint that was asked for has to fit best."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from eval.toybox.metrics.drift import Windows
from eval.toybox.metrics.tint import shows_tints
from eval.toybox.suite.clips import Made
from eval.toybox.suite.items import Item
from eval.toybox.suite.scoring import Scorer
from eval.toybox.suite.summary import summarise
from train.toybox.world.render import render
from train.toybox.world.scenes import Actor, Scene

PAIR = Scene(4, (Actor("car", "stays", "blue"), Actor("duck", "stays", "red")), "meadow",
             relation="next to")


def shown(scene: Scene) -> Tensor:
    return render([scene], 5, 64, 64).video[0]


def recolored(scene: Scene, *tints: str | None) -> Scene:
    actors = (replace(actor, tint=tint) for actor, tint in zip(scene.actors, tints, strict=True))
    return replace(scene, actors=tuple(actors))


@pytest.mark.long
def test_all_tints_of_a_scene_have_to_be_there() -> None:
    assert shows_tints(shown(PAIR), PAIR)
    for tints in (("blue", None), ("green", "red"), ("red", "blue"), (None, None)):
        assert shows_tints(shown(recolored(PAIR, *tints)), PAIR) is False


def test_own_colours_are_no_tint_and_what_has_them_counts_for_nothing() -> None:
    one = recolored(PAIR, None, "red")
    assert shows_tints(shown(one), one)
    assert shows_tints(shown(PAIR), one), "the other may have any"
    plain = recolored(PAIR, None, None)
    assert shows_tints(shown(plain), plain) is None


def test_light_changes_no_tint() -> None:
    assert shows_tints(0.6 * shown(PAIR) - 0.1, PAIR)


def test_what_is_never_seen_has_no_tint() -> None:
    assert shows_tints(torch.zeros(3, 1, 16, 16), PAIR) is None


@pytest.mark.long
def test_the_benchmark_asks_for_tints_where_there_are_some() -> None:
    plain = recolored(PAIR, None, None)
    seen = SimpleNamespace(sprite="car", motion="stays", place="meadow", camera="still",
                           shows=lambda _sprites: True, moves=lambda _motions: True)
    judge: Any = SimpleNamespace(verdicts=lambda video: [seen] * len(video))
    windows = Windows(3, 1, 1, 4)
    scorer = Scorer(judge, None, windows, 12.0, torch.device("cpu"))
    scenes = PAIR, plain, PAIR
    items = [Item("two", index, scene, "", 0) for index, scene in enumerate(scenes)]
    video = torch.stack([shown(PAIR), shown(plain), shown(plain)])
    rows = scorer.score("two", items, Made(video))
    assert [row["right"].get("tint") for row in rows] == [True, None, False]
    figures = summarise({"two": rows}, {"two": scenes}, None)
    assert figures["scores"]["two"]["tint"]["total"] == 2
    assert figures["scores"]["two"]["tint"]["value"] == 0.5
    assert figures["outcomes"]["two"]["tint"] == "1-0"
