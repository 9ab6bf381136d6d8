"""Scores of single clips put together."""

import pytest

from eval.toybox.rates import Rate
from eval.toybox.suite.run import _split
from eval.toybox.suite.summary import reached, summarise, truth
from eval.toybox.suite.table import table
from eval.toybox.suite.work import SHEET_FRAMES
from train.toybox.world.scenes import Actor, Scene

SCENES = [
    Scene(1, (Actor("cat", "rises"),), place="city"),
    Scene(2, (Actor("car", "rises"),), place="city", camera="zoom in"),
    Scene(3, (Actor("bus", "spins", direction="clockwise"),), place="farm"),
]


def row(sprite, *, right, jump=None, psnr=None):
    tasks = ("sprite", "motion", "place", "camera")
    scores = {
        "right": dict.fromkeys(tasks, right),
        "answers": {"sprite": sprite, "motion": "rises", "place": "city", "camera": "still"},
    }
    if jump is not None:
        scores["jump"] = jump
    if psnr is not None:
        scores |= {"psnr": psnr, "mask_psnr": psnr - 5}
    return scores


@pytest.fixture
def result():
    scores = {
        "text": [row("cat", right=True), row("cat", right=False), row("bus", right=True)],
        "render": [row(s, right=True) for s in ("cat", "car", "bus")],
        "vae": [row(s, right=True, psnr=p) for s, p in (("cat", 29), ("car", 31), ("bus", 33))],
        "image": [row("cat", right=True, jump=j) for j in (1.0, 1.2, 9.0)],
    }
    return summarise(scores, dict.fromkeys(scores, SCENES), {"nothing": Rate(19, 20)})


def test_a_figure_has_its_interval_chance_and_ceilings(result):
    figure = result["scores"]["text"]["sprite"]
    assert figure["value"] == pytest.approx(2 / 3)
    assert figure["low"] < 2 / 3 < figure["high"]
    assert figure["chance"] == pytest.approx(1 / 3)
    assert result["scores"]["text"]["motion"]["chance"] == pytest.approx(2 / 3)
    assert (figure["ceiling_render"], figure["ceiling_vae"]) == (1.0, 1.0)
    assert result["scores"]["judge"]["nothing"]["value"] == 0.95


def test_wrong_answers_are_reported(result):
    assert result["confusions"]["text"]["sprite"] == {"car": {"cat": 1}}


def test_floors_are_met_from_the_right_side(result):
    scores = result["scores"]
    assert reached("sprite", scores["text"]["sprite"]) is False
    assert reached("jump", scores["image"]["jump"]) is True
    assert reached("psnr", scores["vae"]["psnr"]) is True
    assert reached("camera", scores["text"]["camera"]) is None
    assert scores["vae"]["psnr"]["value"] == pytest.approx(31)
    assert scores["image"]["jump"]["value"] == 1.2


def test_one_clip_has_no_interval_and_what_is_missing_no_figure():
    rows = [row("cat", right=True) | {"path_off": 0.1, "fall_off": None}]
    figures = summarise({"text": rows}, {"text": SCENES[:1]}, None)["scores"]["text"]
    assert figures["path_off"] == {"value": 0.1, "low": None, "high": None, "total": 1}
    assert "fall_off" not in figures


def test_two_actors_are_one_answer():
    scene = Scene(4, (Actor("cat", "rises"), Actor("bus", "rises")), relation="next to")
    assert truth(scene, "sprite") == "bus + cat"
    rows = [row("cat", right=False)]
    told = summarise({"two": rows}, {"two": [scene]}, None)
    assert told["scores"]["two"]["sprite"]["chance"] == 1
    assert told["confusions"]["two"] == {}


def test_the_table_shows_every_figure(result):
    drawn = table({**result, "model": {"name": "m"}, "split": "dev"})
    assert drawn.row_count == sum(len(figures) for figures in result["scores"].values())


def test_pairs_are_subtracted_in_all_and_by_kind():
    scores = {
        "grammar": [row("cat", right=True) for _ in range(3)],
        "phrased": [row("cat", right=r) for r in (True, False, False)],
    }
    told = summarise(
        scores, dict.fromkeys(scores, SCENES), None, ("typos", "order", "typos")
    )["scores"]
    figure = told["phrasings"]["sprite"]
    assert (figure["grammar"], figure["phrased"]) == (1, pytest.approx(1 / 3))
    assert figure["value"] == pytest.approx(2 / 3)
    assert figure["low"] < 2 / 3 < figure["high"]
    assert told["phrasings, typos"]["sprite"]["value"] == 0.5
    assert told["phrasings, order"]["sprite"]["total"] == 1
    drawn = table({"scores": told, "model": {"name": "m"}, "split": "dev"})
    assert "grammar less phrased, typos" in list(drawn.columns[0].cells)


def test_a_prompt_is_spread_over_its_rows_labels():
    text = "a small red car bounces to the left across the desert at night in the rain"
    lines = _split(text, SHEET_FRAMES)
    assert len(lines) == SHEET_FRAMES
    assert " ".join(line for line in lines if line) == text
    assert max(map(len, lines)) < 2 * len(text) / SHEET_FRAMES
