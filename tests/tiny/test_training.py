"""The training loop: exact resume, schedule, averages, refusals."""

from __future__ import annotations

import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vidgen.core.config import build
from vidgen.core.config_file import load_yaml
from vidgen.core.errors import InputError, ModelError
from vidgen.training import config as training_config
from vidgen.training import loop
from vidgen.training.checkpoint import latest_checkpoint, load_averages, lock_run, read_meta
from vidgen.training.config import OptimConfig, RunConfig
from vidgen.training.engines.distributed import Place
from vidgen.training.finetune.output import read_curve
from vidgen.training.loop import train
from vidgen.training.optim import build_optimizers
from vidgen.training.task import Batches, Task

ROOT = Path(__file__).parents[2]


class Regression(Task):
    """A small network learns a fixed random map; every batch depends on (step, micro) alone."""

    def __init__(
        self, run: RunConfig, stop_at: int | None = None, poison: frozenset[int] = frozenset()
    ) -> None:
        torch.manual_seed(run.seed)
        self.run, self.stop_at, self.poison = run, stop_at, poison
        self.net = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.1), nn.Linear(16, 4))
        self.modules = {"net": self.net}
        self.begun: list[int] = []

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return build_optimizers(self.modules, self.run.optim, use_muon=lambda name, _: "0." in name)

    def begin_step(self, step: int) -> bool:
        self.begun.append(step)
        return False

    def batch(self, step: int, micro: int) -> Tensor:
        draw = torch.Generator().manual_seed(step * 100 + micro)
        x = torch.randn(self.run.batch_size, 4, generator=draw)
        return x * math.nan if step in self.poison else x

    def loss(self, batch: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        if step == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        error = (self.net(batch).float() - batch.flip(-1)).square().mean()
        return error, {"error": error.detach()}

    def validate(self, _step: int, _folder: Path) -> dict[str, float]:
        error = self.net(torch.eye(4)) - torch.eye(4).flip(-1)
        return {"held_out": float(error.square().mean())}


def make_run(folder: Path, **changes: object) -> RunConfig:
    run = RunConfig(
        folder=str(folder), steps=12, batch_size=4, accumulate=2,
        optim=OptimConfig(lr=1e-2, muon_lr=1e-2, warmup_steps=3), device="cpu", dtype="fp32",
        log_every=2, validate_every=4, ema_decay=0.9,
    )
    return replace(run, **changes)


def everything(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(latest_checkpoint(folder) / "state.safetensors")


@pytest.mark.parametrize("stop_at", [2, 5, 6, 9])
def test_interrupted_and_resumed_equals_straight(tmp_path: Path, stop_at: int) -> None:
    straight, broken = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    train(Regression(straight), straight)
    first = train(Regression(broken, stop_at), broken)
    assert (first.step, first.finished, first.interrupted) == (stop_at + 1, False, True)
    second = train(Regression(broken), broken, resume=True)
    assert (second.finished, second.interrupted) == (True, False)
    a, b = everything(tmp_path / "a"), everything(tmp_path / "b")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert learned(tmp_path / "a") == learned(tmp_path / "b")


def learned(folder: Path) -> list[dict[str, Any]]:
    """A run's curve without what depends on the machine."""
    measured = {"samples_per_s", "seconds_per_step", "memory_mb"}
    return [{name: value for name, value in line.items() if name not in measured}
            for line in read_curve(folder / "curve.jsonl")]


def test_a_short_run_has_a_curve_and_a_torn_line_is_mended(tmp_path: Path) -> None:
    short = make_run(tmp_path, log_every=50, steps=3)
    train(Regression(short), short)
    assert [line["step"] for line in learned(tmp_path) if "loss" in line] == [3]
    with (tmp_path / "curve.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    longer = make_run(tmp_path, log_every=2, steps=6)
    train(Regression(longer), longer, resume=True)
    assert [line["step"] for line in learned(tmp_path) if "loss" in line] == [3, 4, 6]


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    run = make_run(tmp_path / "run")
    with pytest.raises(InputError, match="is a file; choose another folder"):
        train(Regression(run), run)
    assert (tmp_path / "run").read_text() == "mine"


@pytest.mark.parametrize(("settings", "message"), [
    ({"log_every": 0}, "log_every is 0; give a whole number of at least 1"),
    ({"validate_every": 0}, "validate_every is 0"),
    ({"minutes": 0.0}, "minutes is 0; give a number above 0"),
    ({"checkpoint_minutes": -1.0}, "checkpoint_minutes is -1; give a number of at least 0"),
    ({"ema_decay": 1.0}, r"ema_decay is 1.0; give a number in \[0, 1\)"),
    ({"spike_factor": math.nan}, "spike_factor is nan; give a number above 1"),
    ({"seed": 2**32}, "seed is 4294967296; give a number from 0 to 4294967295"),
    ({"optim": {"lr": math.nan}}, "optim.lr is nan; give a number from 0 to 100"),
    ({"optim": {"lr": 1e-3, "weight_decay": -0.1}}, "optim.weight_decay is -0.1"),
    ({"optim": {"betas": [0.9, 1.0]}}, r"optim.betas is .*; give two numbers in \[0, 1\)"),
    ({"optim": {"grad_clip": -1.0}}, "optim.grad_clip is -1;"),
    ({"steps": 0}, "run.steps is 0; give a whole number of at least 1"),
])
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(RunConfig, {"folder": "unused", **settings}, "run.yaml")


def test_the_spike_check_can_be_switched_off(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("{folder: unused, spike_factor: .inf}")
    run = build(RunConfig, load_yaml(tmp_path / "run.yaml"), "run.yaml")
    assert run.spike_factor == math.inf


def test_batches_made_ahead_are_the_same_in_the_same_order(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    task = Regression(run)
    ahead, plain = (Batches(task, run, Place(), ahead=flag) for flag in (True, False))
    for step in [0, 1, 2, *range(1, run.steps)]:  # restarted after the third
        for micro in range(run.accumulate):
            assert torch.equal(ahead.get(step, micro), plain.get(step, micro))


def test_schedule_warms_up_holds_and_decays() -> None:
    config = OptimConfig(warmup_steps=10, decay_from=100, decay_steps=16)
    assert config.scale_at(0) == pytest.approx(0.1)
    assert config.scale_at(50) == 1.0
    assert config.scale_at(103) == pytest.approx(1 - math.sqrt(4 / 16))
    assert config.scale_at(115) == 0.0


def test_a_checkpoint_has_the_scores_of_its_step(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=10, checkpoint_minutes=0, best="held_out")
    train(Regression(run), run)
    scores = {line["step"]: line["validation"]["held_out"] for line in learned(tmp_path)
              if "validation" in line}
    assert [*scores] == [4, 8, 10]
    meta = read_meta(latest_checkpoint(tmp_path))
    assert meta["best_step"] == min(scores, key=scores.__getitem__)
    assert meta["validated"] == 10
    assert meta["metrics"]["held_out"] == scores[10]


def test_an_unusable_loss_skips_the_step_and_then_stops(tmp_path: Path) -> None:
    run = make_run(tmp_path / "skip")
    train(Regression(run, poison=frozenset({3})), run)
    assert all(t.isfinite().all() for n, t in everything(tmp_path / "skip").items() if "model" in n)
    means = [line["loss"] for line in learned(tmp_path / "skip") if "lr_scale" in line]
    assert len(means) == 6
    assert all(math.isfinite(loss) for loss in means)
    run = make_run(tmp_path / "stop", steps=30, checkpoint_minutes=0)
    with pytest.raises(InputError, match="unusable for 10 steps"):
        train(Regression(run, poison=frozenset(range(4, 30))), run)
    assert latest_checkpoint(tmp_path / "stop").name == "step-00000004"


def test_an_imitated_dtype_is_warned_of_once(tmp_path: Path, monkeypatch, capsys) -> None:
    for best, dtype, times in (("fp32", "bf16", 1), ("fp32", "fp32", 0), ("bf16", "bf16", 0)):
        monkeypatch.setattr(loop, "best_dtype", lambda _device, best=best: best)
        run = make_run(tmp_path / f"{best}-{dtype}", dtype=dtype, steps=2)
        train(Regression(run), run)
        assert capsys.readouterr().err.count("--set run.dtype=auto") == times


def test_a_dtype_that_is_not_given_is_one_that_the_device_has(tmp_path: Path, monkeypatch) -> None:
    for best in ("bf16", "fp32"):
        monkeypatch.setattr(training_config, "best_dtype", lambda _device, best=best: best)
        assert make_run(tmp_path, dtype="auto").dtype == best
        assert make_run(tmp_path, device="cuda:1", dtype="auto").dtype == "bf16"  # elsewhere
    with pytest.raises(InputError, match="unknown device 'gpu'"):
        make_run(tmp_path, device="gpu", dtype="auto")


def test_a_run_is_neither_overwritten_nor_made_up(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    train(Regression(run), run)
    with pytest.raises(InputError, match="--resume"):
        train(Regression(run), run, record={"another": "run"})
    assert not (tmp_path / "run" / "task.json").exists()
    with pytest.raises(ModelError, match="no checkpoint"):
        load_averages(tmp_path / "nothing", "net")
    assert not (tmp_path / "run" / "pid").exists()
    assert load_averages(tmp_path / "run", "net").keys() == Regression(run).net.state_dict().keys()


def test_one_run_is_at_work_in_a_folder_at_a_time(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (tmp_path / "run").mkdir()
    with lock_run(tmp_path / "run"), pytest.raises(InputError, match=rf"\(pid {os.getpid()}\)"):
        train(Regression(run), run, record={})
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"lock"}
    train(Regression(run), run)


def test_incomplete_and_damaged_checkpoints_are_passed_over_or_reported(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    train(Regression(run), run)
    target = latest_checkpoint(tmp_path / "run")
    (tmp_path / "run" / "step-99999998").mkdir()  # without its position
    assert latest_checkpoint(tmp_path / "run") == target
    with pytest.raises(InputError, match="holds a run already; add --resume"):
        train(Regression(run), run)
    longer = make_run(tmp_path / "run", steps=run.steps + 1)
    assert train(Regression(longer), longer, resume=True).step == longer.steps
    target = latest_checkpoint(tmp_path / "run")
    for content in ("", "[]", "{}", '{"step": "x", "metrics": {}}', "[" * 100_000):
        (target / "state.json").write_text(content)
        with pytest.raises(ModelError, match=r"state.json is damaged .*to resume from step-"):
            train(Regression(run), run, resume=True)


def test_resuming_what_never_began_begins_and_says_so(tmp_path: Path, capsys) -> None:
    run = make_run(tmp_path / "run")
    assert train(Regression(run), run, resume=True).finished
    assert "run has no checkpoint to resume; starting at step 0" in capsys.readouterr().err
