"""The shipped weights make what they are asked for: few steps, and clips turn by turn."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from eval.toybox.generation import generate_batch
from eval.toybox.judge import embedded_judge
from eval.toybox.suite.judging import grade
from train.toybox.world.captions import prompts
from vidgen.core.request import Request
from vidgen.pipeline.engine import Engine, load
from vidgen.pipeline.inputs import Inputs


@pytest.fixture(scope="module")
def engine() -> Engine:
    engine = load("toybox", device="cpu")
    assert isinstance(engine, Engine)
    return engine


def test_clips_show_what_their_prompts_say(engine: Engine) -> None:
    items = list(prompts("dev", 8))
    plan = engine.plan(Request(prompt="a cat", seed=0, steps=4), Inputs())
    video = generate_batch(engine, plan, [text for _, text in items], list(range(len(items))))
    verdicts = embedded_judge().load(engine.device).verdicts(video)
    right = [grade(verdict, scene) for verdict, (scene, _) in zip(verdicts, items, strict=True)]
    # far below the accuracies that are measured (docs/howto/speed.md), far above chance
    assert sum(each["place"] for each in right) >= 7
    assert sum(each["motion"] for each in right) >= 5
    assert sum(each["sprite"] for each in right) >= 4


@pytest.mark.long
def test_the_benchmark_measures_a_clip_loading_and_decoding() -> None:
    script = Path(__file__).parents[2] / "scripts/bench"
    done = subprocess.run(["bash", script, "1"], stdout=subprocess.PIPE, text=True, check=True)
    measured = json.loads(done.stdout)
    assert 0 < measured["imports_and_load_s"] < measured["default_clip_cold_s"]
    assert measured["decode_329_frames_peak_mb"] < 1.2 * measured["decode_33_frames_peak_mb"]
