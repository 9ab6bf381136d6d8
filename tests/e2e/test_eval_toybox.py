"""`vidgen eval toybox` from the command line to the results, on a tiny model and a tiny judge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from vidgen.cli.main import main
from vidgen.evaluation import toybox
from vidgen.toybox.judge import Judge, JudgeConfig
from vidgen.toybox.scenes import WORLD_VERSION
from vidgen.weights.load import save_module

COUNTS = ["--prompts", "3", "--held-out", "1", "--images", "2", "--reserved", "1", "--batch", "2"]


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = JudgeConfig(
        frame_dims=(8, 8, 16), motion_dims=(8, 8, 16), look_dim=4, mixed_dim=8, temporal_dim=16
    )
    folder = tmp_path_factory.mktemp("judge")
    save_module(Judge(config).state_dict(), config, folder, torch.bfloat16)
    return folder


def evaluate(model: Path, judge: Path, output: Path, *more: str) -> int:
    return main(
        ["eval", "toybox", "-o", str(output), "--model", str(model), "--judge", str(judge),
         "--dtype", "fp32", *COUNTS, *more]
    )  # fmt: skip


@pytest.fixture(scope="module")
def results(
    tiny_model: Path, judge: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("eval") / "r.json"
    assert evaluate(tiny_model, judge, output, "--sheet", str(output.with_name("s.png"))) == 0
    return output


def test_results_say_what_was_measured_and_how(results: Path) -> None:
    told = json.loads(results.read_text())
    assert told["world_version"] == WORLD_VERSION
    assert told["split"] == "dev"
    assert told["seeds"] == [0, 2]
    assert len(told["model"]["sha256"]) == len(told["judge"]) == 64
    assert told["settings"]["num_steps"] == 2
    assert told["settings"]["num_frames"] == 9
    assert told["settings"]["fps"] == "12"
    assert told["machine"]["torch"] == torch.__version__


def test_every_figure_has_its_neighbours(results: Path) -> None:
    scores = json.loads(results.read_text())["scores"]
    assert set(scores) == {
        "render", "vae", "reserved", "text", "held_out", "render_end", "image", "judge"
    }  # fmt: skip
    figure = scores["text"]["sprite"]
    assert figure["total"] == 3
    assert 0 <= figure["low"] <= figure["value"] <= figure["high"] <= 1
    assert {"chance", "ceiling_render", "ceiling_vae", "floor"} <= figure.keys()
    assert scores["held_out"]["motion"]["total"] == 1
    assert scores["image"]["last_sprite"]["floor"] == 0.88
    assert scores["image"]["jump"]["value"] > 0
    assert scores["vae"]["psnr"]["total"] == 3
    assert scores["vae"]["mask_psnr"]["floor"] == 24.0
    assert scores["judge"]["nothing"]["total"] == 3


def test_the_sheet_shows_the_clips(results: Path) -> None:
    with Image.open(results.with_name("s.png")) as sheet:
        assert sheet.width > toybox.SHEET_FRAMES * 32
        assert sheet.height > 3 * 32


def test_a_killed_run_goes_on_and_ends_alike(
    results: Path, tiny_model: Path, judge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "r.json"
    log = output.with_name("r.json.jsonl")
    lines = results.with_name("r.json.jsonl").read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:11]) + lines[11][:40])  # killed while writing the twelfth line
    made: list[int] = []
    score = toybox.ToyboxRun._score_batch

    def counted(self, source, items, *, keep=False):
        made.append(len(items))
        return score(self, source, items, keep=keep)

    monkeypatch.setattr(toybox.ToyboxRun, "_score_batch", counted)
    assert evaluate(tiny_model, judge, output) == 0
    ours, theirs = (json.loads(path.read_text()) for path in (output, results))
    assert 0 < sum(made) < len(lines)
    assert ours["scores"] == theirs["scores"]
    assert set(map(_known, log.read_text().splitlines())) >= set(map(_known, lines))


def _known(line: str) -> str:
    try:
        return json.loads(line)["key"]
    except json.JSONDecodeError:
        return ""


def test_another_setting_is_another_score(
    results: Path, tiny_model: Path, judge: Path, tmp_path: Path
) -> None:
    output = tmp_path / "r.json"
    log = output.with_name("r.json.jsonl")
    log.write_text(results.with_name("r.json.jsonl").read_text())
    before = len(log.read_text().splitlines())
    assert evaluate(tiny_model, judge, output, "--suite", "text", "--steps", "1") == 0
    assert len(log.read_text().splitlines()) == before + 3 + 3 + 3 + 1


def test_results_are_not_overwritten_and_need_json(
    results: Path, tiny_model: Path, judge: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(tiny_model, judge, results) == 2
    assert "exists" in capsys.readouterr().err
    assert evaluate(tiny_model, judge, results.with_name("r.txt")) == 2
    assert ".json" in capsys.readouterr().err
    assert evaluate(tiny_model, judge, results.with_name("n.json"), "--prompts", "0") == 2
    assert "prompts" in capsys.readouterr().err
