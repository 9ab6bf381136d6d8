"""`python -m eval.toybox` from the command line to the results, on a tiny model and judge."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from eval.toybox.__main__ import main
from eval.toybox.judge import Judge, JudgeConfig
from eval.toybox.leaderboard import main as leaderboard
from eval.toybox.sound_judge import SoundJudge, SoundJudgeConfig
from eval.toybox.suite import work as toybox_work
from tests.models import build_tiny_model
from train.toybox.model_files import save_module
from train.toybox.world.scenes import WORLD_VERSION

COUNTS = [
    "--prompts", "3", "--held-out", "1", "--images", "2", "--reserved", "1", "--two", "2",
    "--pairs", "2", "--phrasings", "3", "--extensions", "1", "--windows", "2",
    "--sounds", "2", "--batch", "2",
]  # fmt: skip


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
        ["-o", str(output), "--model", str(model), "--judge", str(judge),
         "--dtype", "fp32", *COUNTS, *more]
    )  # fmt: skip


@pytest.fixture(scope="module")
def results(
    tiny_model: Path, judge: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("eval") / "r.json"
    assert evaluate(tiny_model, judge, output, "--sheet", str(output.with_name("s.png"))) == 0
    return output


@pytest.mark.long
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
    assert told["machine"]["numpy"] == np.__version__
    assert told["prompt_suite"]["name"] == "toybox, dev"
    assert len(told["prompt_suite"]["sha256"]) == 64


def test_every_figure_has_its_neighbours(results: Path) -> None:
    scores = json.loads(results.read_text())["scores"]
    assert set(scores) == {
        "render", "vae", "reserved", "text", "held_out", "two_render", "two_vae", "two",
        "render_end", "vae_end", "image", "judge",
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
    assert scores["two"]["sprite"]["ceiling_vae"] >= 0
    assert 0 < scores["image"]["first_ssim"]["ceiling_vae"] < 1
    assert scores["text"]["path"]["chance"] == pytest.approx(1 / 3)
    assert scores["text"]["path_off"]["ceiling_render"] > 0
    for measure in ("identity_1", "shape"):
        assert {"chance", "ceiling_render", "ceiling_vae"} <= scores["text"][measure].keys()
    assert scores["render"]["shape"]["value"] > scores["render"]["shape"]["chance"]


@pytest.fixture(scope="module")
def sounding(
    judge: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any], str]:
    """A model with sound, and what the four other suites say of it."""
    folder = tmp_path_factory.mktemp("sounding")
    model = build_tiny_model(folder / "model", sound=True)
    torch.manual_seed(0)
    config = SoundJudgeConfig(bands=16, dims=(4, 4, 8), hidden_dim=8)
    save_module(SoundJudge(config).state_dict(), config, folder / "ear", torch.float32)
    found: dict[str, Any] = {}
    for suite in ("triples", "phrasings", "extend", "sound"):
        output = folder / f"{suite}.json"
        ear = ("--sound-judge", str(folder / "ear")) if suite == "sound" else ()
        assert evaluate(model, judge, output, "--suite", suite, *ear) == 0
        found |= json.loads(output.read_text())["scores"]
    return model, found, json.loads(output.read_text())["sound_judge"]


@pytest.mark.long
def test_triples_are_compared_pair_by_pair(sounding: tuple[Path, dict[str, Any], str]) -> None:
    _, scores, _ = sounding
    figure = scores["triples"]["place"]
    assert figure["total"] == 2
    assert figure["value"] == pytest.approx(figure["seen"] - figure["held_out"])
    assert scores["seen_triples"]["place"]["value"] == figure["seen"]


def test_phrasings_are_compared_with_the_grammar_kind_by_kind(
    sounding: tuple[Path, dict[str, Any], str]
) -> None:
    _, scores, _ = sounding
    assert scores["grammar"]["sprite"]["total"] == scores["phrased"]["sprite"]["total"] == 3
    figure = scores["phrasings"]["place"]
    assert figure["phrased"] == scores["phrased"]["place"]["value"]
    assert figure["value"] == pytest.approx(figure["grammar"] - figure["phrased"])
    kinds = {name: part["place"]["total"] for name, part in scores.items() if "," in name}
    assert len(kinds) == sum(kinds.values()) == 3
    assert "phrasings, typos" in kinds


def test_long_clips_tell_their_drift(sounding: tuple[Path, dict[str, Any], str]) -> None:
    _, scores, _ = sounding
    for source in ("extend_render", "extend_vae", "extend"):
        assert scores[source]["brightness_drift"]["total"] == 1
        assert scores[source]["joins"]["value"] > 0
    assert "ceiling_vae" in scores["extend"]["sharpness_drift"]


def test_sound_is_scored_where_the_model_makes_it(
    sounding: tuple[Path, dict[str, Any], str], judge: Path, tmp_path: Path
) -> None:
    model, scores, ear = sounding
    assert len(ear) == 64
    assert scores["sound"]["voice"]["total"] == 2
    assert {"chance", "ceiling_render", "ceiling_vae", "floor"} <= scores["sound"]["voice"].keys()
    assert evaluate(model, judge, tmp_path / "r.json", "--suite", "sound") == 0
    told = json.loads((tmp_path / "r.json").read_text())
    assert "voice" in told["scores"]["sound"], "the embedded judge hears where none is named"
    assert len(told["sound_judge"]) == 64
    assert told["sound_judge"] != ear


def test_a_model_without_sound_isnt_asked_for_it(
    tiny_model: Path, judge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(tiny_model, judge, tmp_path / "r.json", "--suite", "sound") == 2
    assert "lacks the task 'sound'" in capsys.readouterr().err
    assert not (tmp_path / "r.json").exists()


def test_the_sheet_shows_the_clips(results: Path) -> None:
    with Image.open(results.with_name("s.png")) as sheet:
        assert sheet.width > toybox_work.SHEET_FRAMES * 32
        assert sheet.height > 3 * 32


@pytest.mark.long
def test_a_killed_run_continues_and_ends_alike(
    results: Path, tiny_model: Path, judge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "r.json"
    log = output.with_name("r.json.jsonl")
    lines = results.with_name("r.json.jsonl").read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:11]) + lines[11][:40])  # killed while writing the twelfth line
    made: list[int] = []
    score = toybox_work.Studio.score

    def counted(self, batch):
        made.append(len(batch.items))
        return score(self, batch)

    monkeypatch.setattr(toybox_work.Studio, "score", counted)
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


@pytest.mark.long
def test_another_setting_is_another_score(
    results: Path, tiny_model: Path, judge: Path, tmp_path: Path
) -> None:
    output = tmp_path / "r.json"
    log = output.with_name("r.json.jsonl")
    log.write_text(results.with_name("r.json.jsonl").read_text())
    before = len(log.read_text().splitlines())
    assert evaluate(tiny_model, judge, output, "--suite", "text", "--steps", "1") == 0
    assert len(log.read_text().splitlines()) == before + 3 * 3 + 1 + 3 * 2


def test_results_are_not_overwritten_and_need_json(
    results: Path, tiny_model: Path, judge: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(tiny_model, judge, results) == 2
    assert "exists" in capsys.readouterr().err
    assert evaluate(tiny_model, judge, results.with_name("r.txt")) == 2
    assert ".json" in capsys.readouterr().err
    assert evaluate(tiny_model, judge, results.with_name("n.json"), "--prompts", "0") == 2
    assert "prompts" in capsys.readouterr().err
    assert evaluate(tiny_model, judge, results.with_name("n.json"), "--windows", "1") == 2
    assert "windows is 1; give 2 or more" in capsys.readouterr().err


SEEDS = ("--suite", "text", "--two", "0", "--seeds", "2", "--threads", "1")


@pytest.fixture(scope="module")
def seeded(tiny_model: Path, judge: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("seeded") / "r.json"
    assert evaluate(tiny_model, judge, output, *SEEDS) == 0
    return output


@pytest.mark.long
def test_more_seeds_make_more_clips_of_each_prompt(
    seeded: Path, tiny_model: Path, judge: Path, tmp_path: Path
) -> None:
    told = json.loads(seeded.read_text())
    assert told["scores"]["text"]["sprite"]["total"] == 6
    assert told["scores"]["render"]["sprite"]["total"] == 3, "a render is the same with any seed"
    assert (told["clips_a_prompt"], told["seeds"], told["threads"]) == (2, [0, 5], 1)
    assert len(told["outcomes"]["text"]["motion"]) == 6
    output = tmp_path / "r.json"
    log = output.with_name("r.json.jsonl")
    log.write_text(seeded.with_name("r.json.jsonl").read_text())
    before = log.read_text()
    assert evaluate(tiny_model, judge, output, *SEEDS, "--seeds", "1") == 0
    assert log.read_text() == before, "the first seed's clips are there already"
    one = json.loads(output.read_text())
    assert one["prompt_suite"] == told["prompt_suite"]
    assert one["scores"]["text"]["sprite"]["total"] == 3


@pytest.mark.long
def test_two_workers_killed_and_called_again_give_the_same_numbers(
    seeded: Path, tiny_model: Path, judge: Path, tmp_path: Path
) -> None:
    output = tmp_path / "r.json"
    log = output.with_name("r.json.jsonl")
    words = ["-o", str(output), "--model", str(tiny_model), "--judge", str(judge),
             "--dtype", "fp32", *COUNTS, *SEEDS, "--workers", "2"]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "eval.toybox", *words], start_new_session=True,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    until = time.monotonic() + 120
    while not (log.exists() and log.stat().st_size) and time.monotonic() < until:
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert 0 < len(log.read_text().splitlines()) < len(
        seeded.with_name("r.json.jsonl").read_text().splitlines())
    assert main(words) == 0
    ours, theirs = (json.loads(path.read_text()) for path in (output, seeded))
    assert ours == theirs


@pytest.mark.long
def test_toybox_results_stand_on_a_leaderboard(
    seeded: Path, tiny_model: Path, judge: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    other = tmp_path / "other.json"
    assert evaluate(tiny_model, judge, other, *SEEDS, "--steps", "1") == 0
    capsys.readouterr()
    board = tmp_path / "board.html"
    assert leaderboard(["--results", str(seeded), "--results", str(other),
                 "-o", str(board), "--json"]) == 0  # fmt: skip
    (table,) = json.loads(capsys.readouterr().out)["tables"]
    first, second = table["rows"]
    assert {row["settings"].partition(" ")[0] for row in table["rows"]} == {"1", "2"}
    assert first["settings"] != second["settings"]
    assert first["figures"]["following"]["value"] >= second["figures"]["following"]["value"]
    assert (first["verdict"], second["verdict"]) == ("the first", "too few prompts (3 of 6)")
    assert table["conditions"]["clips a prompt"] == 2
    page = board.read_text()
    assert "text<br>sprite" in page
    assert first["model"].split()[1] in page


@pytest.mark.parametrize(("words", "message"), [
    (["--seeds", "0"], "seeds is 0; give 1 or more"),
    (["--seeds", "2000"], "seeds is 2000; give 1000 or fewer"),
    (["--workers", "0"], "workers is 0; give a whole number"),
])
def test_wrong_commands_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["-o", str(tmp_path / "r.json"), *words]) == 2
    assert message in capsys.readouterr().err
