"""`vidgen eval temporal` on real files: figures, networks, resuming, workers, what goes wrong."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.pans import FPS, SIZE, pan, quiet, save
from tests.programs import load_program
from vidgen.cli.main import main
from vidgen.core.errors import InputError
from vidgen.evaluation.temporal import run as temporal
from vidgen.evaluation.temporal.report import page
from vidgen.evaluation.temporal.run import TemporalRun, run_temporal
from vidgen.media.types import ClipInfo
from vidgen.media.write import write_clip


def flickering(frames: np.ndarray, levels: int) -> np.ndarray:
    shift = (np.arange(len(frames)) % 2 * levels).reshape(-1, 1, 1, 1)
    return np.clip(frames.astype(int) + shift, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("clips")
    good, bad = root / "good", root / "bad"
    good.mkdir()
    bad.mkdir()
    recipe = {"model": {"name": "toybox", "sha256": "ab" * 32},
              "plan": {"prompt": "a pan, camera pans right", "seed": 7}, "vidgen": "0.1.0"}
    for seed in range(6):
        save(good / f"prompt {seed}-0.mp4", pan(seed), recipe if seed == 0 else None)
        save(bad / f"prompt {seed}-0.mp4", flickering(pan(seed), 25))
    return good, bad


@pytest.fixture(scope="module")
def results(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("results") / "r.json"
    good, bad = map(str, folders)
    assert main(["eval", "temporal", "--videos", good, "--videos", bad, "-o", str(output),
                 "--report", str(output.with_suffix(".html"))]) == 0  # fmt: skip
    return output


def test_the_better_folder_is_reported_and_by_how_much(results: Path) -> None:
    told = json.loads(results.read_text())
    (found,) = told["comparisons"]
    assert found["verdict"] == "good is steadier"
    assert found["pairs"] == found["both_dynamic"] == 6
    flicker = found["measures"]["warp_error"]
    assert flicker["low"] <= flicker["difference"] <= flicker["high"] < 0


def test_results_say_what_shaped_them(results: Path) -> None:
    told = json.loads(results.read_text())
    good = told["folders"][0]
    assert good["fps"] == ["12"]
    assert good["sizes"] == [[SIZE, SIZE]]
    assert good["models"] == [{"model": "toybox", "model_sha256": "ab" * 32, "vidgen": "0.1.0",
                               "seeds": [7]}]  # fmt: skip
    assert told["machine"]["opencv"]
    assert told["prompt_suite"] is None


def test_the_report_needs_nothing_from_elsewhere(results: Path) -> None:
    page = results.with_suffix(".html").read_text()
    assert page.count("<svg") > 10
    assert "good is steadier" in page
    assert "src=" not in page
    assert "href=" not in page


def test_many_workers_give_the_same_numbers(
    folders: tuple[Path, Path], results: Path, tmp_path: Path
) -> None:
    run = TemporalRun([str(folders[0])], workers=2)
    again = run_temporal(run, tmp_path / "r.json", quiet)
    told = json.loads(results.read_text())["folders"][0]
    assert json.loads(json.dumps(again["folders"][0])) == told


def test_a_killed_run_goes_on(
    folders: tuple[Path, Path], results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = results.with_name("r.json.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "r.json.jsonl").write_text("".join(lines[:4]) + lines[4][:50])
    measured: list[str] = []
    measure = temporal.measure
    monkeypatch.setattr(
        temporal, "measure", lambda job, tell: measured.append(job.path) or measure(job, tell))
    run = TemporalRun([str(folder) for folder in folders])
    again = run_temporal(run, tmp_path / "r.json", quiet)
    assert len(measured) == 12 - 4
    assert json.loads(json.dumps(again)) == json.loads(results.read_text())


def test_bad_files_are_named_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clips = tmp_path / "clips"
    clips.mkdir()
    save(clips / "fine-0.mp4", pan(0))
    save(clips / "other-0.mp4", pan(1, size=48), fps=Fraction(24))
    save(clips / "one-0.mp4", pan(0, count=1))
    (clips / "broken-0.mp4").write_bytes((clips / "fine-0.mp4").read_bytes()[:300])
    long = tmp_path / "long.webm"
    write_clip(long, [pan(2, count=60)], ClipInfo(FPS, (SIZE, SIZE), 60))
    (clips / "cut-0.webm").write_bytes(long.read_bytes()[: long.stat().st_size // 2])
    whole = tmp_path / "whole.mp4"
    save(whole, pan(3, count=24))
    content = bytearray(whole.read_bytes())
    start = content.index(b"mdat") + 2600
    content[start : start + 4] = bytes(byte ^ 0x55 for byte in content[start : start + 4])
    (clips / "hurt-0.mp4").write_bytes(content)
    (clips / "deeper").mkdir()
    (clips / "deeper" / "fine-0.mp4").write_bytes((clips / "fine-0.mp4").read_bytes())
    (clips / "deeper" / "notes.txt").write_text("x")
    output = tmp_path / "r.json"
    assert main(["eval", "temporal", "--videos", str(clips), "-o", str(output)]) == 1
    (folder,) = json.loads(output.read_text())["folders"]
    assert {clip["name"] for clip in folder["clips"]} == {"fine-0", "other-0"}
    assert set(folder["failed"]) == {"one-0.mp4", "broken-0.mp4", "cut-0.webm", "hurt-0.mp4"}
    assert "1 of its 24 frames are damaged; save it again" in folder["failed"]["hurt-0.mp4"]
    assert "of 60 frames; save it again" in folder["failed"]["cut-0.webm"]
    table, said = capsys.readouterr()
    assert "motion_smoothness" in table
    assert table.splitlines()[-1] == str(output)
    assert "broken-0.mp4" in said
    assert "single frame" in said
    assert "mixes fps 12, 24" in said
    assert "ignored: 1 clips in subfolders, 1 .txt; give --videos a subfolder" in said
    assert "without --network dino=PATH, the folder of facebook/dino-vitb16" in said
    assert "subject_consistency can't be measured; proxy_* replace them" in said


def test_a_folder_of_damaged_files_has_its_results_and_page(tmp_path: Path) -> None:
    clips, output = tmp_path / "clips", tmp_path / "r.json"
    clips.mkdir()
    for name in ("a-0", "b-0"):
        (clips / f"{name}.mp4").write_bytes(b"no clip")
    assert main(["eval", "temporal", "--videos", str(clips), "-o", str(output),
                 "--report", str(tmp_path / "r.html")]) == 1  # fmt: skip
    (folder,) = json.loads(output.read_text())["folders"]
    assert (folder["clips"], set(folder["failed"])) == ([], {"a-0.mp4", "b-0.mp4"})
    assert "No clip could be measured" in (tmp_path / "r.html").read_text()


def test_still_clips_are_reported(tmp_path: Path) -> None:
    clips = tmp_path / "clips"
    clips.mkdir()
    save(clips / "still-0.mp4", np.repeat(pan(0)[:1], 9, axis=0))
    (folder,) = run_temporal(TemporalRun([str(clips)]), tmp_path / "r.json", quiet)["folders"]
    (clip,) = folder["clips"]
    assert not clip["dynamic"]
    assert clip["figures"]["steadiness"] == 0
    assert clip["figures"]["frozen_share"] == 100
    assert clip["figures"]["proxy_temporal_flickering"] > 0.99


def test_a_prompt_suite_chooses_the_clips(folders: tuple[Path, Path], tmp_path: Path) -> None:
    suite = tmp_path / "p.txt"
    suite.write_text("prompt 1\nprompt 2\na heron\n")
    run, notes = TemporalRun([str(folders[1])], prompt_suite=str(suite)), list[str]()
    told = run_temporal(run, tmp_path / "r.json", lambda e: notes.append(e.get("text", "")))
    (folder,) = told["folders"]
    assert [clip["prompt"] for clip in folder["clips"]] == ["prompt 1", "prompt 2"]
    assert folder["missing_prompts"] == ["a heron"]
    assert len(folder["failed"]) == 4
    assert told["prompt_suite"]["name"] == "p.txt"
    assert any("no clip of 1 prompts: 'a heron'" in text for text in notes)
    suite.write_text("a heron\n")
    with pytest.raises(InputError, match="no clip of"):
        run_temporal(run, tmp_path / "r.json", quiet)


def test_vbenchs_prompts_count_in_their_own_dimensions(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    suite = tmp_path / "VBench_full_info.json"
    kinds = {"prompt 1": ["subject_consistency"], "prompt 2": ["motion_smoothness"],
             "prompt 3": ["motion_smoothness", "dynamic_degree"]}  # fmt: skip
    suite.write_text(json.dumps([{"prompt_en": p, "dimension": d} for p, d in kinds.items()]))
    run = TemporalRun([str(folder) for folder in folders], prompt_suite=str(suite))
    told = run_temporal(run, tmp_path / "r.json", quiet)
    counts = {name: figure["total"] for name, figure in told["folders"][0]["figures"].items()}
    assert counts["proxy_subject_consistency"] == counts["proxy_dynamic_degree"] == 1
    assert (counts["proxy_motion_smoothness"], counts["steadiness"]) == (2, 3)
    assert "proxy_background_consistency" not in counts
    assert told["comparisons"][0]["measures"]["proxy_motion_smoothness"]["pairs"] == 2


def test_a_clip_of_a_single_colour_has_no_subject_to_be_measured(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    shown = tmp_path / "shown"
    shown.mkdir()
    (shown / "one.mp4").hardlink_to(folders[0] / "prompt 1-0.mp4")
    save(shown / "red.mp4", np.full((9, SIZE, SIZE, 3), (200, 30, 77), np.uint8))
    notes = list[str]()
    told = run_temporal(TemporalRun([str(shown)]), tmp_path / "r.json",
                        lambda e: notes.append(e.get("text", "")))  # fmt: skip
    (folder,) = told["folders"]
    one, red = folder["clips"]
    assert (one["flat"], red["flat"]) == (False, True)
    assert red["figures"]["proxy_subject_consistency"] is None
    assert red["figures"]["proxy_background_consistency"] == pytest.approx(1)
    assert folder["figures"]["proxy_subject_consistency"]["total"] == 1
    assert [text for text in notes if text.startswith("1 of 2 clips of shown have a single")]
    assert page(told).count("of a single colour</span>") == 1


def test_first_pictures_are_compared(folders: tuple[Path, Path], tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.fromarray(pan(1)[0]).save(pictures / "prompt 1.png")
    Image.fromarray(255 - pan(2)[0]).save(pictures / "prompt 2.png")
    run, notes = TemporalRun([str(folders[0])], images=str(pictures)), list[str]()
    told = run_temporal(run, tmp_path / "r.json", lambda e: notes.append(e.get("text", "")))
    clips = told["folders"][0]["clips"]
    right, wrong = (clips[i]["figures"] for i in (1, 2))
    assert right["first_frame_error"] < 5 < wrong["first_frame_error"]
    assert right["proxy_i2v_background"] > wrong["proxy_i2v_background"]
    assert clips[3]["figures"]["first_frame_error"] is None
    assert any("4 of 6 clips of good have no picture" in text for text in notes)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ([], "give --videos"),
        (["--videos", "none"], "is not a folder"),
        (["--videos", "GOOD", "--videos", "GOOD"], "twice"),
        (["--videos", "GOOD", "--workers", "0"], "workers is 0"),
        (["--videos", "GOOD", "--steps", "3"], "unknown option --steps"),
        (["--videos", "GOOD", "--network", "raft=none"], "TorchScript"),
        (["--videos", "GOOD", "--report", "r.txt"], "should end in .html"),
    ],
)
def test_wrong_use_is_refused(
    options: list[str], reason: str, folders: tuple[Path, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    given = [str(folders[0]) if word == "GOOD" else word for word in options]
    assert main(["eval", "temporal", "-o", str(tmp_path / "r.json"), *given]) == 2
    assert reason in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_each_planted_fault_is_ranked_by_its_measure() -> None:
    faults = load_program("eval/faults.py")
    result = faults.measure(clips=2, num_frames=25, side=64, decode=False)
    ranked = {
        fault: {name for name, row in rows.items() if row["ranks"]}
        for fault, rows in result["responses"].items()
    }
    assert "flicker" in ranked["flicker"]
    assert "frozen_share" in ranked["frozen"]
    assert {"warp_error", "seam"} <= ranked["pop"]
    assert "identity_drift_8" in ranked["morph"]
    assert "color_drift" in ranked["color drift"]
    assert "track_jerk" in ranked["jitter"]
    assert "seam" in ranked["seam"]
    assert {"first_frame_error", "first_step"} <= ranked["first frame"]
    assert "frozen_share" not in ranked["flicker"], "what sees nothing ranks nothing"
    page = faults.page(result)
    assert page.count("<svg") > 100
    assert "doesn&#39;t rank it" in page


def test_late_sound_is_ranked_by_its_bias() -> None:
    found = load_program("eval/faults.py").sound_offset(2)
    assert found["sync_bias"]["ranks"]
    first, *_, last = found["sync_bias"]["mean"]
    assert last - first == pytest.approx(0.1, abs=0.01)
