"""What is copied is found, what isn't is not: on a tiny model, whose clips copy nothing."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.programs import ROOT, load_program
from train.toybox.world.render import render
from vidgen.core.errors import InputError
from vidgen.core.store import ScoreLog


@pytest.fixture(scope="module")
def program() -> ModuleType:
    return load_program("eval/toybox/memorisation.py")


def test_a_training_clip_is_nearest_to_itself_and_a_fresh_one_to_none(program: ModuleType) -> None:
    scenes = program.training_scenes(str(ROOT / program.RUN))[:60]
    bank = program.training_bank(scenes, 9, 12.0)
    own = render(scenes[:2], 9, 128, 128)
    for index, found in enumerate(program.nearest(program.features(own.video), bank)):
        assert found["index"] == index
        assert found["distance"] < 6, "only the size of the render is another"
        assert found["ratio"] < 0.2
    fresh = render(program.sample_scenes(program.FRESH, 2), 9, 128, 128)
    for found in program.nearest(program.features(fresh.video), bank):
        assert found["distance"] > 15
        assert found["ratio"] > 0.4


def test_copies_are_counted(program: ModuleType) -> None:
    def rows(*distances: float) -> list[dict[str, float]]:
        return [{"distance": d, "ratio": d / 40, "index": i} for i, d in enumerate(distances)]

    told = program.summary({
        "copies": rows(1, 2, 3), "renders": rows(20, 24, 28), "generated": rows(2.5, 20, 20),
        "prompted": rows(30, 1, 2), "retold": rows(20, 30, 40),
    })  # fmt: skip
    assert told["copy_limit"] == 3
    assert told["groups"]["generated"]["as_near_as_copies"]["value"] == pytest.approx(1 / 3)
    assert told["groups"]["generated"]["distance"]["least"] == 2.5
    assert told["groups"]["renders"]["as_near_as_copies"]["value"] == 0
    assert told["groups"]["prompted"]["own_clip_nearest"]["total"] == 3
    difference = told["generated_less_renders"]["distance"]
    assert difference["value"] == pytest.approx(42.5 / 3 - 24)
    assert difference["low"] < difference["value"] < difference["high"]


def run_file(folder: Path, **cache: Any) -> str:
    """A run of one cache of so many clips."""
    path = folder / "run.yaml"
    entry = {"folder": "c", "vae": "v", "shards": 1, **cache}
    path.write_text(json.dumps({"caches": [entry]}))
    return str(path)


@pytest.mark.long
def test_a_run_continues_where_it_was(
    program: ModuleType, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, run = tmp_path / "r.jsonl", run_file(tmp_path, shard_size=51)
    first = program.measure(str(tiny_model), 2, run, ScoreLog(log))
    assert first["model"]["name"] == "tiny"
    assert set(first["groups"]) == {"copies", "renders", "retold", "generated", "prompted"}
    made = []
    monkeypatch.setattr(program, "generate_batch", lambda *_: made.append(1))
    again = program.measure(str(tiny_model), 2, run, ScoreLog(log))
    assert again["groups"] == first["groups"]
    assert not made
    with pytest.raises(InputError, match=r"run\.yaml has 50 to compare with"):
        program.measure(
            str(tiny_model), 2, run_file(tmp_path, shard_size=50), ScoreLog(log)
        )


def test_training_clips_are_those_of_a_runs_first_cache(
    program: ModuleType, tmp_path: Path
) -> None:
    scenes = program.training_scenes(run_file(tmp_path, shard_size=3, first_scene=70))
    assert scenes == program.sample_scenes(70, 3, split="train")
    with pytest.raises(InputError, match="chosen scenes"):
        program.training_scenes(run_file(tmp_path, motion="bounces"))
    (tmp_path / "none.yaml").write_text("preset: toybox\n")
    with pytest.raises(InputError, match="no caches"):
        program.training_scenes(str(tmp_path / "none.yaml"))
