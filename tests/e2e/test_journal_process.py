"""`vidgen generate` killed with -9 while it samples, then while it writes, and resumed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.sounds import save, tone
from vidgen.cli.main import main
from vidgen.media.clip import Clip
from vidgen.pipeline.job import job_facts


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def kill_at(stage, command):
    """Run a command line in a process until it is in a stage with something kept, then kill it."""
    run = subprocess.Popen(
        [sys.executable, "-m", "vidgen", *command, "--events", "-"], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    for line in run.stdout:
        event = json.loads(line)
        state = Path("x.mp4.vidgen-job/state.safetensors").is_file()
        if event.get("stage", "").startswith(stage) and event["done"] > 2 and state:
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
               "--frames", "129", "--steps", "60", "--audio", "bed.wav", "--audio-loop",
               "--say", "3=@bed.wav", "-o"]
    kill_at("sample", [*command, "x.mp4"])
    sampled = job_facts(Path("x.mp4.vidgen-job"))
    assert sampled["stage"] == "sample"
    assert 0 < sampled["done"] < 60
    kill_at("write", [*command, "x.mp4", "--resume"])
    assert job_facts(Path("x.mp4.vidgen-job"))["stage"] == "write"
    assert main([*command, "x.mp4", "--resume"]) == 0
    assert "x.mp4 goes on: write, frame" in capsys.readouterr().err
    assert main([*command, "straight.mp4"]) == 0
    resumed, straight = Clip.from_file("x.mp4"), Clip.from_file("straight.mp4")
    assert (resumed.frames == straight.frames).all()
    assert (resumed.sound == straight.sound).all()
    assert len(resumed.sound) == 129 * 4_000
    assert sorted(path.name for path in Path().iterdir()) == ["bed.wav", "straight.mp4", "x.mp4"]
