"""`vidgen eval PROMPTS`: clips made once by one or many workers, measured, and put on one page."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.mutations import mutate
from vidgen.cli.main import main
from vidgen.core.errors import InputError, OutputError
from vidgen.core.store import ScoreLog
from vidgen.evaluation.leaderboard import Entry, page, read_entries
from vidgen.evaluation.scale import SuiteRun
from vidgen.media.probe import read_recipe

PROMPTS = ("a red car bounces", "a cat/dog moves left", "a cat, camera pans left")
FAST = ("--steps", "1", "--frames", "9", "--dtype", "fp32")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("suite")
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    return root


def evaluate(root: Path, name: str, model: Path, *words: str, code: int = 0) -> dict[str, Any]:
    output = root / f"{name}.json"
    assert main(["eval", str(root / "prompts.txt"), "--model", str(model), "-o", str(output), *FAST,
                 *words]) == code
    return json.loads(output.read_text()) if code < 2 else {}


@pytest.fixture(scope="module")
def results(root: Path, tiny_model: Path) -> dict[str, Any]:
    return evaluate(root, "one", tiny_model, "--seeds", "2")


@pytest.fixture(scope="module")
def other_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with another transformer."""
    folder = tmp_path_factory.mktemp("models") / "other"
    shutil.copytree(tiny_model, folder)
    path = folder / "transformer/model.safetensors"
    torch.manual_seed(1)
    weights = {k: v + 0.05 * torch.randn_like(v) for k, v in load_file(path).items()}
    save_file(weights, path)
    info = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(info | {"name": "other", "files": {}}))
    return folder


def test_results_say_what_was_made_and_by_what(results: dict[str, Any]) -> None:
    made = results["generation"]
    assert made["model"]["name"] == "tiny"
    assert len(made["model"]["sha256"]) == 64
    assert (made["seeds"], made["clips"], made["dtype"]) == ([0, 1], 6, "fp32")
    assert made["settings"] == {"steps": 1, "frames": 9}
    assert results["prompt_suite"]["name"] == "prompts.txt"
    (folder,) = results["folders"]
    assert (folder["fps"], folder["sizes"]) == (["12"], [[32, 32]])
    assert folder["missing_prompts"] == []
    assert folder["models"][0]["seeds"] == [0, 1] * 3
    assert {clip["prompt"] for clip in folder["clips"]} == set(PROMPTS)
    assert [clip["name"] for clip in folder["clips"]] == sorted(
        f"{prompt.replace('/', '_')}-{n}" for prompt in PROMPTS for n in (0, 1))


@pytest.mark.usefixtures("results")
def test_clips_have_their_prompts_names_and_seeds(root: Path) -> None:
    recipe = read_recipe(root / "one.clips/named/a cat_dog moves left-1.mp4")
    assert (recipe["plan"]["prompt"], recipe["plan"]["seed"]) == (PROMPTS[1], 1)


def test_two_workers_give_the_same_numbers(
    root: Path, results: dict[str, Any], tiny_model: Path
) -> None:
    words = ("--seeds", "2", "--workers", "2", "--threads")
    many = evaluate(root, "many", tiny_model, *words, str(results["generation"]["threads"]))
    for told in (many, results):
        for clip in told["folders"][0]["clips"]:
            clip["path"] = Path(clip["path"]).name
        told["folders"][0] ["path"] = ""
    assert many["folders"] == results["folders"]
    assert many["generation"] == results["generation"]


def test_clips_begin_with_the_pictures_that_are_there(
    root: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = root / "pictures"
    pictures.mkdir()
    words = ("--first-images", str(pictures))
    evaluate(root, "begun", tiny_model, *words, code=2)
    assert "no picture of" in capsys.readouterr().err
    for name in ("a cat_dog moves left", "a cat"):  # the latter also before ", camera pans left"
        Image.new("RGB", (32, 32), "red").save(pictures / f"{name}.png")
    told = evaluate(root, "begun", tiny_model, *words)
    errors = {clip["prompt"]: clip["figures"]["first_frame_error"]
              for clip in told["folders"][0]["clips"]}  # fmt: skip
    assert errors[PROMPTS[0]] is None
    assert None not in (errors[PROMPTS[1]], errors[PROMPTS[2]])
    assert "1 of 3 prompts of prompts.txt have no picture" in capsys.readouterr().err
    begun = read_recipe(root / "begun.clips/named/a cat, camera pans left-0.mp4")
    assert "a cat.png" in json.dumps(begun)


@pytest.mark.usefixtures("results")
def test_what_is_there_is_not_made_again(root: Path, tiny_model: Path) -> None:
    made = sorted((root / "one.clips/made").glob("*.mp4"))
    before = [path.stat().st_mtime_ns for path in made]
    made[0].unlink()
    evaluate(root, "one", tiny_model, "--seeds", "2", "--overwrite")
    after = [path.stat().st_mtime_ns for path in made]
    assert (before[0] < after[0], before[1:] == after[1:]) == (True, True)
    evaluate(root, "one", tiny_model, "--overwrite")
    assert len(list((root / "one.clips/named").glob("*.mp4"))) == 3, "one seed alone"
    assert len(list((root / "one.clips/made").glob("*.mp4"))) == 6


def test_a_prompt_that_cannot_be_made_is_named_and_the_others_go_on(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n" + "a red car " * 300)
    told = evaluate(tmp_path, "r", tiny_model, code=1)
    (failed,) = told["folders"][0]["failed"].values()
    assert "this model reads" in failed
    assert [clip["prompt"] for clip in told["folders"][0]["clips"]] == ["a cat"]
    assert "not measured: " in capsys.readouterr().err


def test_models_stand_on_one_page_by_what_they_share(
    root: Path, tiny_model: Path, other_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(root, "a", tiny_model)
    evaluate(root, "b", other_model)
    evaluate(root, "apart", tiny_model, "--seeds", "2")
    capsys.readouterr()
    named = [word for name in ("a", "b", "apart") for word in
             ("--results", str(root / f"{name}.json"))]
    assert main(["eval", "leaderboard", *named, "-o", str(root / "board.html"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    together, alone = told["tables"]
    assert {row["name"] for row in together["rows"]} == {"tiny", "other"}
    assert together["rows"][0]["verdict"] == "the first"
    assert "too few pairs" in together["rows"][1]["verdict"]
    steadiness = [row["figures"]["steadiness"]["value"] for row in together["rows"]]
    assert steadiness == sorted(steadiness, reverse=True)
    assert alone["conditions"]["clips a prompt"] == 2
    page = (root / "board.html").read_text()
    assert page.count("<h2>Table") == 2
    assert together["rows"][0]["model"].split()[1] in page
    assert "dtype fp32" in together["rows"][0]["settings"]
    assert together["rows"][0]["settings"] in page
    assert "src=" not in page
    assert "href=" not in page


@pytest.mark.parametrize(("words", "message"), [
    (["temporel", "-o", "r.json"], "unknown suite 'temporel'; did you mean 'temporal'?"),
    (["none.txt", "-o", "r.json"], "does not exist"),
    (["prompts.txt", "-o", "r.json", "--seeds", "0"], "seeds is 0; give a whole number"),
    (["prompts.txt", "-o", "r.json", "--workers", "0"], "workers is 0"),
    (["prompts.txt", "-o", "r.json", "--frames", "10"], "frames"),
    (["prompts.txt", "-o", "r.json", "--videos", "x"], "unknown option --videos"),
    (["prompts.txt", "-o", "r.txt"], "results are JSON"),
    (["prompts.txt", "-o", "taken.json"], "holds no clips of an evaluation"),
    (["temporal", "-o", "r.json", "--seeds", "3"], "unknown option --seeds"),
    (["leaderboard", "-o", "r.json"], "a leaderboard is HTML"),
    (["leaderboard", "-o", "r.html"], "no results"),
    (["leaderboard", "-o", "r.html", "--results", "prompts.txt"], "holds no results"),
    (["leaderboard", "-o", "r.html", "--results", "none.json"], "can't be read"),
])
def test_wrong_commands_are_reported(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], words: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a cat\n")
    Path("taken.clips").mkdir()
    model = ["--model", str(tiny_model)] if words[0].endswith(".txt") else []
    assert main(["eval", *words, *model]) == 2
    assert message in capsys.readouterr().err
    assert not list(Path().glob("r.*"))


def test_folders_of_other_prompts_stand_in_tables_of_their_own() -> None:
    def entry(*prompts: str, failed: str | None = None) -> Entry:
        folder = {"clips": [{"prompt": prompt} for prompt in prompts], "fps": ["12"], "sizes": [],
                  "failed": {failed: "damaged"} if failed else {}}
        return Entry("r.json", folder, {"prompt_suite": None, "networks": {},
                                        "measures_version": 1})

    one = entry("a cat", "a car").conditions
    assert one == entry("a car", "a cat", "a cat").conditions
    assert one == entry("a car", failed="a cat-0.mp4").conditions
    assert one != entry("a cat", "a dog").conditions


def test_a_log_of_scores_leaves_out_what_is_none(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'{"key": "a", "scores": {"x": 1}}\n[]\n{"key": "b"}\n'
                     b'{"key": [], "scores": {}}\n\xff\n3\n{"key": "c", "sco')
    log = ScoreLog(path)
    assert log.scores == {"a": {"x": 1}}
    log.add([("d", {"x": 2})])
    assert ScoreLog(path).scores == {"a": {"x": 1}, "d": {"x": 2}}
    with pytest.raises(InputError, match="can't be read"):
        ScoreLog(tmp_path)
    with pytest.raises(OutputError, match="can't be written"):
        ScoreLog(tmp_path / "gone" / "r.jsonl").add([("d", {})])


def test_names_are_files_names_and_no_two_alike() -> None:
    from vidgen.evaluation.scale import _stem

    taken: dict[str, int] = {}
    long = "é" * 400
    assert [_stem(text, taken) for text in ("a/b", "a_b", "a cat")] == ["a_b", "a_b~2", "a cat"]
    assert len(_stem(long, taken).encode()) <= 180
    assert _stem(long + "x", taken).endswith("~2")
    with pytest.raises(InputError, match="no results"):
        read_entries([])
    with pytest.raises(InputError, match="seeds is 2000"):
        SuiteRun("x.txt", seeds=2000)


@pytest.mark.usefixtures("results")
def test_damaged_results_are_shown_or_refused_by_name(root: Path, tmp_path: Path) -> None:
    rng, path, told = Random(0), tmp_path / "damaged.json", []
    content = (root / "one.json").read_bytes()
    for _ in range(150):
        path.write_bytes(mutate(content, path.name, b"{}", rng))
        try:
            page(read_entries([path]))
        except InputError as error:
            told.append(str(error))
    assert 20 < len(told) < 150
    assert all("damaged.json holds no results" in each for each in told)
