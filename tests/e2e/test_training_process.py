"""Runs on ranks that die, lose their disk or are started by torchrun: real processes, killed."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.lab.test_phases import TINY_VAE
from tests.ranks import Launch
from tests.velocity import join_and_follow, make_run
from vidgen.core.errors import OutputError
from vidgen.training import checkpoint
from vidgen.training.checkpoint import latest_checkpoint, load_averages

pytest.importorskip("deepspeed")
ROOT = Path(__file__).parents[2]
LIMIT_S = 300  # the machine may be busy; a rank that hangs waits for half an hour


def learn(folder: Path, kill_at: int | None = None, engine: str | None = None) -> None:
    """Six steps with a checkpoint after each."""
    run = make_run(folder, deepspeed=engine, checkpoint_minutes=0.0)
    join_and_follow(run, resume=latest_checkpoint(folder) is not None, kill_at=kill_at, dropout=0.3)


def learn_with_long_saves(folder: Path, engine: str | None) -> None:
    """The same, with saves that a kill from outside finds on a busy machine, too."""
    write = checkpoint.save_rng
    checkpoint.save_rng = lambda *args: (time.sleep(0.5), write(*args))
    learn(folder, None, engine)


def learn_on_a_full_disk(folder: Path, full: int, late: int, engine: str | None) -> None:
    """One rank can write no large file; the other comes late, when the first has given up."""
    run = make_run(folder, deepspeed=engine, checkpoint_minutes=0.0)
    rank = int(os.environ["RANK"])
    if rank == late:
        write = checkpoint.save_rng
        checkpoint.save_rng = lambda *args: (time.sleep(1.0), write(*args))
    if rank != full:
        join_and_follow(run, resume=True)
        return
    with small_files():
        join_and_follow(run, resume=True)


@contextmanager
def small_files() -> Iterator[None]:
    """Inside, no file can be written beyond 3,000 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def same(a: Path, b: Path) -> bool:
    """Whether two runs ended with the same averages, bit for bit."""
    mine, other = (load_averages(folder, "transformer") for folder in (a, b))
    assert latest_checkpoint(a).name == latest_checkpoint(b).name == "step-00000006"
    return mine.keys() == other.keys() and all(torch.equal(mine[n], other[n]) for n in mine)


def finish(folder: Path, run: Path, engine: str | None) -> None:
    launch = Launch(2, folder, learn, run, None, engine)
    assert launch.codes(LIMIT_S) == [0, 0], launch.logs[0].read_text()[-2000:]


def test_a_dead_rank_stops_the_others_with_the_reason(tmp_path):
    launch = Launch(2, tmp_path, learn, tmp_path / "run", 3)
    launch.ranks[1].wait(LIMIT_S)
    died = time.monotonic()
    assert launch.codes(60)[0] == 1
    assert time.monotonic() - died < 60
    assert "rank 1 of 2 doesn't respond" in launch.logs[0].read_text()
    assert latest_checkpoint(tmp_path / "run").name == "step-00000003"
    finish(tmp_path, tmp_path / "run", None)
    finish(tmp_path, tmp_path / "straight", None)
    assert same(tmp_path / "run", tmp_path / "straight")


@pytest.mark.long
def test_killed_while_it_saves_a_run_continues_bit_for_bit(tmp_path):
    launch = Launch(2, tmp_path, learn_with_long_saves, tmp_path / "run", "zero2")
    until, run = time.monotonic() + LIMIT_S, tmp_path / "run"
    while not ((run / "step-00000002").exists() and any(run.glob(".step-*.tmp"))):
        assert time.monotonic() < until
        time.sleep(0.01)
    launch.kill()
    assert not (tmp_path / "run/step-00000006").exists()
    finish(tmp_path, tmp_path / "run", "zero2")
    finish(tmp_path, tmp_path / "straight", "zero2")
    assert same(tmp_path / "run", tmp_path / "straight")
    assert not list((tmp_path / "run").glob(".*.tmp"))


@pytest.fixture(scope="module")
def halfway(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str | None], Path]:
    """A run that ended with its second checkpoint, by its engine."""
    made: dict[str | None, Path] = {}

    def of(engine: str | None) -> Path:
        if engine not in made:
            made[engine] = folder = tmp_path_factory.mktemp("halfway")
            Launch(2, folder, learn, folder / "run", 2, engine).codes(LIMIT_S)
            assert latest_checkpoint(folder / "run").name == "step-00000002"
        return made[engine] / "run"

    return of


@pytest.mark.parametrize(("engine", "full", "late"), [
    (None, 0, 1), pytest.param(None, 1, 0, marks=pytest.mark.long),
    pytest.param("zero1", 1, 0, marks=pytest.mark.long),
])
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, halfway, engine, full, late):
    run = tmp_path / "run"
    shutil.copytree(halfway(engine), run)
    launch = Launch(2, tmp_path, learn_on_a_full_disk, run, full, late, engine)
    codes = launch.codes(LIMIT_S)
    told = [log.read_text() for log in launch.logs]
    assert (codes[full], codes[1 - full]) == (2, 1), told
    ours, theirs = told[full], told[1 - full]
    assert "error: " in ours, told
    assert "no space left" in ours or "the disk may be full" in ours, told
    assert f"error: rank {full} of 2 failed: " in theirs, told
    assert "no space left" in theirs or "the disk may be full" in theirs, told
    assert latest_checkpoint(run).name == "step-00000002"


def test_torchrun_starts_a_program_on_two_ranks(tmp_path):
    config = tmp_path / "vae.yaml"
    config.write_text(TINY_VAE.format(folder=tmp_path / "run"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
         "-m", "train.toybox.vae", "-c", str(config), "--set", "run.engine.deepspeed=zero2",
         "--set", "run.phases=[{steps: 2, num_frames: 1, batch_size: 2}]"],
        env=environment, capture_output=True, text=True, timeout=600, check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [scores] = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert scores["step"] == 2
    assert (latest_checkpoint(tmp_path / "run") / "manifest.json").exists()


def test_one_process_on_a_full_disk_says_so(tmp_path):
    run = make_run(tmp_path / "run", checkpoint_minutes=0.0)
    with small_files(), pytest.raises(OutputError, match="no space left"):
        join_and_follow(run)
    assert latest_checkpoint(tmp_path / "run") is None
