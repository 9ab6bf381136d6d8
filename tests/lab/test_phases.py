"""Runs in phases: their shapes and rates, exact resume, batches in processes; a killed program."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.faults import ForkServer
from tests.programs import run_program
from train.toybox.phases import InPhases, Phase, PhasedRun, train
from train.toybox.tasks.latents import LatentShards
from vidgen.core.config import build
from vidgen.core.errors import InputError, OutputError
from vidgen.training.checkpoint import latest_checkpoint
from vidgen.training.config import OptimConfig
from vidgen.training.engines.distributed import Place
from vidgen.training.optim import build_optimizers
from vidgen.training.task import Batches

ROOT = Path(__file__).parents[2]


class Regression:
    """A small network whose first weights are changed by hand as its second phase begins."""

    def __init__(self, run: PhasedRun) -> None:
        torch.manual_seed(run.seed)
        self.run = run
        self.modules: dict[str, nn.Module] = {"net": nn.Linear(4, 4)}
        self.begun: list[int] = []

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return build_optimizers(self.modules, self.run.optim)

    def start_phase(self, index: int, _phase: Phase) -> bool:
        self.begun.append(index)
        if index == 1:
            with torch.no_grad():
                self.modules["net"].weight.zero_()
        return index == 1

    def batch(self, phase: Phase, step: int, micro: int) -> Tensor:
        draw = torch.Generator().manual_seed(step * 100 + micro)
        return torch.randn(phase.batch_size, phase.num_frames, 4, generator=draw)

    def loss(self, batch: Tensor, _step: int) -> tuple[Tensor, dict[str, Tensor]]:
        return (self.modules["net"](batch) - batch.flip(-1)).square().mean(), {}

    def validate(self, _step: int, _folder: Path) -> dict[str, float]:
        return {}


def make_run(folder: Path, **changes: object) -> PhasedRun:
    run = PhasedRun(
        folder=str(folder), phases=(Phase(6, 1, 8), Phase(6, 9, 4, accumulate=2)),
        optim=OptimConfig(lr=1e-2, warmup_steps=3), device="cpu", dtype="fp32", log_every=2,
        validate_every=4, ema_decay=0.9,
    )
    return replace(run, **changes)


def everything(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    target = latest_checkpoint(folder)
    assert target is not None
    return load_file(target / "state.safetensors")


def test_phases_give_a_run_its_steps_and_batches(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert (run.steps, run.begin_of(1)) == (12, 6)
    assert [run.micro_batches(step) for step in (0, 5, 6, 11)] == [(1, 8), (1, 8), (2, 4), (2, 4)]
    with pytest.raises(InputError, match="phases is empty"):
        make_run(tmp_path, phases=())
    phase = {"steps": 1, "num_frames": 1, "batch_size": 1, "lr_scale": math.inf}
    with pytest.raises(InputError, match=r"phase\.lr_scale is inf"):
        build(PhasedRun, {"folder": "unused", "phases": [phase]}, "run.yaml")
    with pytest.raises(InputError, match="unknown key 'steps'"):
        build(PhasedRun, {"folder": "unused", "steps": 3}, "run.yaml")


def test_a_phase_has_its_own_rate_and_warm_up() -> None:
    phases = (Phase(2, 1, 1), Phase(10, 5, 1, warmup_steps=4, lr_scale=0.5))
    run = PhasedRun(folder="unused", phases=phases, optim=OptimConfig(warmup_steps=0))
    assert [run.lr_scale(step) for step in range(7)] == [1, 1, 0.125, 0.25, 0.375, 0.5, 0.5]


@pytest.mark.parametrize("cut", [3, 6, 8])
def test_a_run_stopped_in_any_phase_continues_bit_for_bit(tmp_path: Path, cut: int) -> None:
    straight, stopped = make_run(tmp_path / "straight"), make_run(tmp_path / "stopped")
    task = Regression(straight)
    train(task, straight)
    assert task.begun == [0, 1]
    phases = (Phase(min(cut, 6), 1, 8),)
    if cut > 6:
        phases = (*phases, Phase(cut - 6, 9, 4, accumulate=2))
    train(Regression(stopped), replace(stopped, phases=phases))
    rest = Regression(stopped)
    train(rest, stopped, resume=True)
    assert rest.begun == ([1] if cut <= 6 else [])
    a, b = everything(tmp_path / "straight"), everything(tmp_path / "stopped")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_branch_starts_from_the_trunk_in_full_and_decays(tmp_path: Path) -> None:
    trunk = make_run(tmp_path / "trunk")
    train(Regression(trunk), trunk)
    decay = replace(trunk.optim, decay_from=12, decay_steps=4)
    branch = make_run(tmp_path / "branch", branch_from=str(tmp_path / "trunk"), optim=decay,
                      phases=(*trunk.phases, Phase(4, 9, 4)))
    task = Regression(branch)
    assert train(task, branch).step == 16
    assert task.begun == [2]
    curve = [json.loads(line) for line in (tmp_path / "branch" / "curve.jsonl").open()]
    assert min(record["step"] for record in curve) > 12
    with pytest.raises(InputError, match="nowhere holds no checkpoint"):
        train(task, make_run(tmp_path / "other", branch_from=str(tmp_path / "nowhere")))


@pytest.mark.parametrize("in_processes", [False, True])
def test_batches_made_ahead_are_the_same_in_the_same_order(
    tmp_path: Path, in_processes: bool
) -> None:
    run = make_run(tmp_path)
    task = InPhases(Regression(run), run, in_processes=in_processes)
    made = Batches(task, run, Place(), ahead=True)
    plain = Batches(InPhases(Regression(run), run), run, Place(), ahead=False)
    for step in [0, 1, 2, *range(1, run.steps)]:  # rolled back after the third
        for micro in range(run.micro_batches(step)[0]):
            assert torch.equal(made.get(step, micro), plain.get(step, micro))


def test_cached_latents_of_another_kind_are_refused(tmp_path: Path) -> None:
    shards = LatentShards(tmp_path, {"encoder": "a"})
    for index in range(2):
        shards.write(index, {"clips": torch.full((2, 3), float(index))})
    assert shards.load(2)["clips"][:, 0].tolist() == [0, 0, 1, 1]
    with pytest.raises(InputError, match="2 of the 3 shards"):
        shards.load(3)
    with pytest.raises(InputError, match="encoder is 'a' there, 'b' here"):
        LatentShards(tmp_path, {"encoder": "b"})
    with pytest.raises(OutputError, match="can't be written"):
        LatentShards(shards.path(0), {"encoder": "a"})


TINY_VAE = """
preset: tiny
height: 32
width: 32
validation_clips: 2
run:
  folder: {folder}
  phases: [{{steps: 3, num_frames: 1, batch_size: 2}}, {{steps: 5, num_frames: 9, batch_size: 1}}]
  device: cpu
  checkpoint_minutes: 0
  validate_every: 100
  log_every: 1
"""


def start_vae(config: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "train.toybox.vae", "-c", str(config)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


@pytest.mark.long
def test_a_killed_program_continues_bit_for_bit(server: ForkServer, tmp_path: Path) -> None:
    configs = []
    for name in ("straight", "killed"):
        configs.append(tmp_path / f"{name}.yaml")
        configs[-1].write_text(TINY_VAE.format(folder=tmp_path / name))
    killed = start_vae(configs[1])
    deadline = time.monotonic() + 300
    while not (tmp_path / "killed" / "step-00000004").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    killed.kill()
    killed.communicate()
    for words in ([configs[0]], [configs[1], "--resume"]):
        ended = run_program(server, "train/toybox/vae.py", "-c", *map(str, words))
        assert ended.returncode == 0, ended.stderr
    a, b = everything(tmp_path / "straight"), everything(tmp_path / "killed")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert json.loads((tmp_path / "killed" / "task.json").read_text())["preset"] == "tiny"


def test_a_bad_run_file_names_the_key(server: ForkServer, tmp_path: Path) -> None:
    config = tmp_path / "bad.yaml"
    config.write_text(TINY_VAE.format(folder=tmp_path / "run").replace("height", "hieght"))
    ended = run_program(server, "train/toybox/vae.py", "-c", str(config))
    assert ended.returncode == 2
    assert "height" in ended.stderr
    assert "Traceback" not in ended.stderr
