"""`vidgen generate` killed with -9 while it samples, then while it writes, and resumed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sounds import save, tone
from tests.tiny.diffusers_models import build_diffusers_model
from vidgen.cli.main import main
from vidgen.media.clip import Clip
from vidgen.pipeline.journal.job import JOB, MADE, job_facts, progress_text

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[2]


def kill_at(stage, command, kept="state.safetensors", done=2):
    """Run a command line in a process until it is in a stage with something kept, then kill it."""
    run = subprocess.Popen(
        [sys.executable, "-m", "tests.impatient", *command, "--events", "-"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    for line in run.stdout:
        event = json.loads(line)
        is_kept = Path("x.mp4.vidgen-job", kept).is_file()
        if event.get("stage", "").startswith(stage) and event["done"] > done and is_kept:
            break
    run.kill()
    run.communicate()
    assert run.returncode == -9
    assert not Path("x.mp4").exists()


def test_killed_twice_and_resumed_decodes_to_the_same_frames(
    tmp_path, tiny_model, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    save(Path("bed.wav"), tone(2.0, channels=2))
    command = ["generate", "a red car", "--model", str(tiny_model), "--seed", "1",
               "--frames", "129", "--steps", "24", "--audio", "bed.wav", "--audio-loop",
               "--say", "3=@bed.wav", "-o"]
    kill_at("sample", [*command, "x.mp4"])
    sampled = job_facts(Path("x.mp4.vidgen-job"))
    assert sampled["stage"] == "sample"
    assert 0 < sampled["done"] < 24
    kill_at("write", [*command, "x.mp4", "--resume"])
    assert job_facts(Path("x.mp4.vidgen-job"))["stage"] == "write"
    assert main([*command, "x.mp4", "--resume"]) == 0
    assert "x.mp4 resumes: write, frame" in capsys.readouterr().err
    assert main([*command, "straight.mp4"]) == 0
    resumed, straight = Clip.from_file("x.mp4"), Clip.from_file("straight.mp4")
    assert (resumed.frames == straight.frames).all()
    assert (resumed.sound == straight.sound).all()
    assert len(resumed.sound) == 129 * 4_000
    assert sorted(path.name for path in Path().iterdir()) == ["bed.wav", "straight.mp4", "x.mp4"]


def test_another_family_killed_twice_and_resumed(tmp_path, monkeypatch, capsys):
    """Its denoising starts anew; what its pipeline gave is decoded from where the writing was."""
    model = build_diffusers_model("ltx", tmp_path / "ltx")
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    command = ["generate", "a red car", "--model", str(model), "--seed", "1", "--size", "64x32",
               "--frames", "401", "--steps", "30", "--dtype", "fp32", "-o"]
    kill_at("sample", [*command, "x.mp4"], kept=JOB)
    assert progress_text(job_facts(Path("x.mp4.vidgen-job"))) == "sample, from the start"
    kill_at("write", [*command, "x.mp4", "--resume"], kept=MADE, done=100)
    facts = job_facts(Path("x.mp4.vidgen-job"))
    assert (facts["stage"], facts["total"]) == ("write", 401)
    assert main([*command, "x.mp4", "--resume", "--events", "events.jsonl"]) == 0
    assert "x.mp4 resumes: write, frame" in capsys.readouterr().err
    events = [json.loads(line) for line in Path("events.jsonl").read_text().splitlines()]
    assert "sample" not in {event.get("stage") for event in events}
    assert main([*command, "straight.mp4"]) == 0
    resumed, straight = Clip.from_file("x.mp4"), Clip.from_file("straight.mp4")
    assert resumed.num_frames == 401
    assert (resumed.frames == straight.frames).all()
    assert not Path("x.mp4.vidgen-job").exists()
