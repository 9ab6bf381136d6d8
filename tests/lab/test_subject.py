"""A reserved sprite learned as a subject: its clips, its prompts, its score; programs for real."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from eval.toybox.judge import Judge, JudgeConfig
from tests.programs import run_program
from train.toybox.model_files import save_module
from train.toybox.world.cast import RESERVED_SPRITES
from train.toybox.world.subject import Subject
from vidgen.cli.main import main
from vidgen.core.config_file import apply_overrides, load_yaml, packaged_config
from vidgen.core.errors import InputError


@pytest.mark.parametrize("sprite", RESERVED_SPRITES)
def test_what_is_asked_for_was_never_shown_and_never_named(sprite):
    subject = Subject(sprite, seed=3)
    shown = subject.clips(12)
    asked = subject.prompts(60, "dev")
    assert all(scene.actors[0].sprite == sprite for scene in shown)
    motions, places = ({scene.actors[0].motion for scene in shown},
                       {scene.place for scene in shown})  # fmt: skip
    assert len({(scene.actors[0].motion, scene.place) for scene in shown}) == 12
    assert not motions & {scene.actors[0].motion for scene, _ in asked}
    assert not places & {scene.place for scene, _ in asked}
    texts = [subject.caption(scene, wording) for scene in shown for wording in range(8)]
    texts += [prompt for _, prompt in asked]
    assert all(text.count("<subject_0>") == 1 for text in texts)
    assert not any(sprite in text.lower() for text in texts)
    assert subject.clips(12) == shown
    assert not {s.seed for s in shown} & {s.seed for s in Subject(sprite, seed=4).clips(12)}


def test_only_reserved_sprites_are_subjects():
    with pytest.raises(InputError, match="'unicron' is no reserved sprite; did you mean 'unicorn'"):
        Subject("unicron")
    with pytest.raises(InputError, match="'car' is no reserved sprite"):
        Subject("car")


@pytest.mark.long
@pytest.mark.parametrize("kind", ["tiny_model", "tiny_experts"])
def test_a_subject_goes_from_clips_to_a_score(kind, tmp_path, server, request):
    model = request.getfixturevalue(kind)
    out = tmp_path / "subject"
    made = run_program(server,
        "train/toybox/subject_clips.py", "--sprite", "unicorn", "--out", str(out),
                       "--clips", "3", "--others", "2", "--frames", "9", "--size",
                       "32")  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert len(list((out / "clips").glob("*.mkv"))) == 3
    first_line, *_ = (out / "clips" / "captions.jsonl").read_text().splitlines()
    wordings = json.loads(first_line)["caption"]
    assert len(wordings) == 8
    assert all("<subject_0>" in text for text in wordings)
    assert "unicorn" not in json.dumps(wordings)
    other = run_program(server,
        "train/toybox/subject_clips.py", "--sprite", "scooter", "--out", str(out))
    assert other.returncode == 2
    assert "another subject" in other.stderr

    run = tmp_path / "run.yaml"
    settings = apply_overrides(load_yaml(packaged_config("train/subject_toybox.yaml")), [
        f"model={model}", f"run.folder={tmp_path / 'run'}", "run.steps=6", "run.device=cpu",
        "run.batch_size=2", "run.validate_every=6", "validation.sheet_every=6",
        "validation.steps=1", f"data.folders.0.path={out / 'clips'}",
        f"data.folders.1={out / 'others'}", f"data.cache={tmp_path / 'cache'}",
        "data.sizes=32x32", "data.frames=9", "lora.targets=attention",
    ])  # fmt: skip
    run.write_text(yaml.safe_dump(json.loads(json.dumps(settings))))
    assert main(["data", "cache", "-c", str(run)]) == 0
    trained = run_program(server, "train/finetune.py", "-c", str(run), "--json")
    assert trained.returncode == 0, trained.stderr
    use = json.loads(trained.stdout)["use"]
    assert len(use) == (1 if kind == "tiny_model" else 2)

    torch.manual_seed(0)
    judge = Judge(JudgeConfig())
    save_module(judge.state_dict(), judge.config, tmp_path / "judge", torch.float32)
    results = tmp_path / "results.json"
    loras = [word for path in use for word in ("--lora", path)]
    call = ("eval/toybox/subject.py", "-o", str(results), "--clips", str(out), *loras, "--model",
            str(model), "--count", "2", "--others", "2", "--steps", "1", "--frames", "9",
            "--size", "32x32", "--judge", str(tmp_path / "judge"))  # fmt: skip
    scored = run_program(server, *call)
    assert scored.returncode == 0, scored.stderr
    scores = json.loads(results.read_text())["scores"]
    assert scores["subject"]["sprite"]["with"]["clips"] == 2
    low, high = scores["others"]["sprite"]["difference"]
    assert -1 <= low <= high <= 1
    first = results.with_name("results.json.jsonl").read_text()
    assert len(first.splitlines()) == 8
    assert run_program(server, *call).returncode == 0
    assert results.with_name("results.json.jsonl").read_text() == first
