"""Resuming other families' clips from the command line: generate, replay, sweep, jobs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from tests.stopping import interrupt_in_journal
from tests.tiny.diffusers_models import build_diffusers_model
from vidgen.cli.main import main
from vidgen.media import write
from vidgen.media.clip import Clip
from vidgen.pipeline.journal import job, journal


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_diffusers_model("hunyuan", tmp_path_factory.mktemp("foreign") / "hunyuan")


@pytest.fixture
def cli(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Any:
    """Run a command line in an empty folder; gives (exit code, stdout, stderr).

    Where a journal's method is named, its n-th call is followed by an interruption.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(journal, "PATIENCE", 0)
    monkeypatch.setattr(write, "SEGMENT", 16)

    def run(*words: Any, stop: str | None = None, calls: int = 1) -> tuple[int, str, str]:
        with monkeypatch.context() as patch:
            if stop is not None:
                interrupt_in_journal(patch, stop, calls)
            code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def options(model: Path) -> list[Any]:
    return ["--model", model, "--size", "32x32", "--frames", 33, "--steps", 2, "--dtype", "fp32"]


@pytest.mark.parametrize(("stop", "where"), [
    ("keep_job", "sample, from the start"), ("keep_arrays", "write, frame 0 of 33"),
    ("keep", "write, frame 13 of 33"),
])
def test_an_interrupted_clip_goes_on(model: Path, cli: Any, stop: str, where: str) -> None:
    command = ["generate", "a cat", *options(model)]
    code, _, err = cli(*command, stop=stop)
    (folder,) = Path().iterdir()
    name = folder.name.removesuffix(job.SUFFIX)
    assert (code, f"{name} is not finished" in err) == (130, True)
    assert where in cli("jobs")[1]
    code, _, err = cli(*command, "-o", name)
    assert (code, where in err) == (2, True)
    command += ["-o", name]
    code, out, err = cli(*command, "--resume", "--json", "--events", "events.jsonl")
    assert (code, f"{name} resumes: {where}" in err) == (0, True)
    events = [json.loads(line) for line in Path("events.jsonl").read_text().splitlines()]
    sampled = [e for e in events if e.get("stage") == "sample"]
    assert len(sampled) == (2 if stop == "keep_job" else 0)
    (facts,) = json.loads(out)["clips"]
    assert cli(*command[:-1], "straight.mp4", "--seed", facts["seed"])[0] == 0
    resumed, straight = Clip.from_file(name), Clip.from_file("straight.mp4")
    assert np.array_equal(resumed.frames, straight.frames)
    assert "is done already" in cli(*command, "--seed", facts["seed"], "--resume")[2]
    assert not list(Path().glob(f"*{job.SUFFIX}"))


def test_of_several_clips_the_finished_ones_stay_and_a_replay_goes_on(
    model: Path, cli: Any
) -> None:
    command = ["generate", "a cat", *options(model), "--count", 2, "-o", "x.mkv"]
    assert cli(*command, stop="close")[0] == 130
    assert sorted(path.name for path in Path().iterdir()) == ["x-1.mkv", "x-2.mkv.vidgen-job"]
    before = Path("x-1.mkv").stat().st_mtime_ns
    code, _, err = cli(*command, "--resume")
    assert (code, "x-1.mkv is done already" in err) == (0, True)
    assert Path("x-1.mkv").stat().st_mtime_ns == before
    assert sorted(path.name for path in Path().iterdir()) == ["x-1.mkv", "x-2.mkv"]
    assert cli("replay", "x-2.mkv", "-o", "again.mkv", stop="keep_arrays")[0] == 130
    code, out, err = cli("replay", "x-2.mkv", "-o", "again.mkv", "--resume", "--json")
    assert (code, "again.mkv resumes: write" in err) == (0, True)
    assert json.loads(out)["identical"]
    assert not Path("again.mkv.vidgen-job").exists()


def test_a_sweeps_clip_goes_on(model: Path, cli: Any) -> None:
    command = ["sweep", "a cat", *options(model), "--over", "guidance=1,6", "--seed", 5,
               "-o", "x.png"]
    assert cli(*command, stop="keep_arrays")[0] == 130
    (folder,) = Path("x.cells").glob(f"*{job.SUFFIX}")
    assert job.job_facts(folder)["stage"] == "write"
    code, _, err = cli(*command)
    assert (code, Path("x.png").is_file()) == (0, True), err
    assert not list(Path("x.cells").glob(f"*{job.SUFFIX}"))
    assert len(list(Path("x.cells").glob("*.mp4"))) == 2


@pytest.mark.parametrize(("stop", "calls", "tried"), [
    ("keep_arrays", 1, 1), ("keep_job", 3, 0), ("keep_arrays", 5, 0),
])
def test_a_further_seed_goes_on(
    model: Path, cli: Any, tmp_path: Path, stop: str, calls: int, tried: int
) -> None:
    """This VAE shows nothing but grey, so every seed has a fault."""
    grey = shutil.copytree(model, tmp_path / "grey")
    vae = diffusers.AutoencoderKLHunyuanVideo.from_pretrained(grey / "vae")
    with torch.no_grad():
        for parameter in vae.decoder.conv_out.parameters():
            parameter.zero_()
    vae.save_pretrained(grey / "vae")
    command = ["generate", "a cat", *options(grey), "--seed", 5, "--retry", 1, "-o", "x.mkv"]
    assert cli(*command, stop=stop, calls=calls)[0] == 130
    code, out, err = cli(*command, "--resume", "--json")
    assert (code, err.count("trying seed 6")) == (0, tried)
    (facts,) = json.loads(out)["clips"]
    assert (facts["seed"], facts["checks"]["verdict"]) == (6, "fault")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grey", "x.mkv"]
