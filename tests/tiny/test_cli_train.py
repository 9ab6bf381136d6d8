"""`vidgen train` from the command line: killed and resumed, refused, its three doors."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.finetuning import build_clips, settings_of
from vidgen.cli.main import main
from vidgen.training.checkpoint import latest_checkpoint

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    return build_clips(tmp_path_factory.mktemp("data") / "clips", count=3)


@pytest.fixture
def run_file(tiny_model, clips, tmp_path):
    def write(name: str, **changes) -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(settings_of(tiny_model, clips, tmp_path / name, **changes)))
        return path

    return write


def start(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *arguments], env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_killed_with_9_and_resumed_equals_straight(run_file, tmp_path):
    """Through `python -m vidgen`, killed between or during saves, then train/finetune.py."""
    long = {"steps": 14, "checkpoint_minutes": 0, "validate_every": 7}
    straight, killed = run_file("straight", run=long), run_file("killed", run=long)
    assert main(["train", "-c", str(straight)]) == 0
    process = start("-m", "vidgen", "train", "-c", str(killed))
    deadline = time.monotonic() + 200
    while not latest_checkpoint(tmp_path / "killed"):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    at = json.loads((latest_checkpoint(tmp_path / "killed") / "state.json").read_text())["step"]
    assert at < 14
    assert not (tmp_path / "killed" / "output").exists()
    process = start("train/finetune.py", "--local_rank=0", "-c", str(killed), "--resume", "--json")
    out, log = process.communicate(timeout=300)
    assert process.returncode == 0, log
    assert json.loads(out)["step"] == 14
    names = ("straight", "killed")
    one, other = (load_file(tmp_path / n / "output" / "tiny.safetensors") for n in names)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_interrupt_is_distinguished_from_an_end_of_minutes(run_file, tmp_path):
    path = run_file("run", run={"steps": 1_000_000, "checkpoint_minutes": 0, "minutes": 60,
                                "validate_every": 1_000_000})
    process = start("-m", "vidgen", "train", "-c", str(path), "--json")
    deadline = time.monotonic() + 200
    while not latest_checkpoint(tmp_path / "run"):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, log = process.communicate(timeout=100)
    assert process.returncode == 130, log
    step = json.loads(out)["step"]
    assert latest_checkpoint(tmp_path / "run").name == f"step-{step:08d}"
    words = ["train", "-c", str(path), "--resume", "--set", "run.minutes=1e-9"]
    assert main(words) == 1
    assert latest_checkpoint(tmp_path / "run").name == f"step-{step + 1:08d}"


def test_results_and_events_are_for_programs(run_file, tmp_path, capsys):
    path, events = run_file("run", run={"steps": 2}), tmp_path / "events.jsonl"
    assert main(["train", "-c", str(path), "--set", "output.name=mine", "--json", "--events",
                 str(events)]) == 0  # fmt: skip
    result = json.loads(capsys.readouterr().out)
    assert result["use"] == [str(tmp_path / "run" / "output" / "mine.safetensors")]
    told = [json.loads(line) for line in events.read_text().splitlines()]
    progress = [event for event in told if event.get("stage") == "train"]
    assert [(event["done"], event["total"]) for event in progress] == [(1, 2), (2, 2)]
    assert progress[-1]["eta_s"] == 0
    assert {"validation", "written", "note"} <= {event["event"] for event in told}
    again = main(["train", "-c", str(path)])
    assert again == 2
    assert "holds a run already; add --resume" in capsys.readouterr().err


def test_no_effect_is_exit_code_1_and_a_mistake_is_2(run_file, tmp_path, capsys):
    path = run_file("run", run={"steps": 1, "optim": {"lr": 0.0}})
    assert main(["train", "-c", str(path)]) == 1
    assert "error: the run in" in (told := capsys.readouterr().err)
    assert "has no effect" in told
    assert main(["train", "-c", str(path), "--set", "lora.rnak=3"]) == 2
    assert "unknown key 'rnak'; did you mean 'rank'" in capsys.readouterr().err
    assert main(["train", "-c", str(tmp_path / "none.yaml")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert main(["train", "-c", str(path), "--accept-changes"]) == 2
    assert "--accept-changes goes with --resume" in capsys.readouterr().err


LAUNCHERS = {
    "torchrun": (["torch.distributed.run", "--standalone", "--nproc-per-node", "2"], "zero3.json"),
    "deepspeed": (["deepspeed.launcher.runner", "--num_gpus", "2"], "zero2_offload"),
}


@pytest.mark.parametrize("launcher", [  # by torchrun e2e/test_training_process starts two, too
    pytest.param("torchrun", marks=pytest.mark.long), "deepspeed",
])
def test_two_ranks_by_a_launcher_learn_what_one_process_learns(
    launcher, run_file, tmp_path, monkeypatch
):
    """Two ranks of one micro-batch are one rank of two; one of them speaks for both."""
    words, zero = LAUNCHERS[launcher]
    if launcher == "deepspeed":
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
        words = [*words, "--master_port", str(free_port())]
    sheet = {"validation": {"sheet_every": 4}}
    alone = run_file("alone", run={"accumulate": 2}, **sheet)
    shared = run_file("shared", **sheet, run={"engine": {"deepspeed": zero}})
    assert main(["train", "-c", str(alone)]) == 0
    process = start("-m", *words, "train/finetune.py", "-c", str(shared), "--json", "--events",
                    str(tmp_path / "events"))  # fmt: skip
    out, log = process.communicate(timeout=400)
    assert process.returncode == 0, log
    [result] = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert result["finished"]
    events = [json.loads(line) for line in (tmp_path / "events").read_text().splitlines()]
    assert [e["done"] for e in events if e.get("stage") == "train"] == [1, 2, 3, 4]
    names = ("alone", "shared")
    one, other = (load_file(tmp_path / n / "output" / "tiny.safetensors") for n in names)
    assert one.keys() == other.keys()
    for name, factor in one.items():
        torch.testing.assert_close(other[name].float(), factor.float(), rtol=0.02, atol=1e-4)
    assert (tmp_path / "shared" / "sheet-00000004.png").exists()
