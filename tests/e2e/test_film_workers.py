"""Films by two workers, one of which dies on the way, equal the film by one: here and by Ray."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from vidgen.media.clip import Clip
from vidgen.media.probe import read_recipe

FILM = """\
version: 1
project: {dtype: fp32, defaults: {duration: 1, steps: 60}}
shots:
  - {id: one, prompt: a red car bounces}
  - {id: two, prompt: a red car moves left, continue_from: one, steps: 2}
  - {id: three, prompt: a cat, takes: 2}
  - {id: four, prompt: a cat moves left}
  - {id: same, prompt: a cat moves left, seed: 5, steps: 2}
  - {id: twin, prompt: a cat moves left, seed: 5, steps: 2}
"""


class Run:
    """`vidgen script` as a process, its events read as they come."""

    def __init__(self, *words: str | Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vidgen", "script", "film.yaml", *map(str, words), "--events",
             "-"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"},
        )
        self.events: list[dict[str, Any]] = []

    def until(self, **facts: Any) -> dict[str, Any]:
        """Read on to an event with these facts."""
        for line in self.process.stdout:
            if not line.startswith("{"):
                break
            self.events.append(json.loads(line))
            if facts and facts.items() <= self.events[-1].items():
                return self.events[-1]
        return {}

    def end(self, code: int = 0) -> list[dict[str, Any]]:
        """Read all the rest."""
        self.until()
        err = self.process.communicate(timeout=600)[1]
        assert self.process.returncode == code, err
        return self.events

    def workers(self, name: str) -> list[psutil.Process]:
        """Processes below, of which something in the command line holds a name."""
        below = psutil.Process(self.process.pid).children(recursive=True)
        return [each for each in below if any(name in word for word in each.cmdline())]


@pytest.fixture(scope="module")
def straight(tiny_model, tmp_path_factory) -> Path:
    """The film by one worker."""
    folder = tmp_path_factory.mktemp("straight")
    (folder / "film.yaml").write_text(FILM)
    run = subprocess.run(
        [sys.executable, "-m", "vidgen", "script", "film.yaml", "--model", tiny_model],
        cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, check=False,
    )
    assert run.returncode == 0, run.stderr
    return folder


def assert_same(folder: Path, straight: Path) -> None:
    def shots(place: Path) -> list[dict[str, Any]]:
        return read_recipe(place / "film.mp4")["film"]["shots"]

    assert shots(folder) == shots(straight)
    for shot in shots(straight):
        name = f"{shot['address']}.mp4"
        mine, theirs = (Clip.from_file(place / "film.shots" / name).frames
                        for place in (folder, straight))
        assert (mine == theirs).all(), name
    assert (Clip.from_file(folder / "film.mp4").frames
            == Clip.from_file(straight / "film.mp4").frames).all()
    assert not list((folder / "film.shots").glob("*.vidgen-job"))


@pytest.mark.long
def test_interrupted_and_robbed_of_a_worker_the_film_is_the_same(
    tmp_path, tiny_model, straight, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("film.yaml").write_text(FILM)
    command = ["--model", tiny_model, "--workers", "2"]
    first = Run(*command)
    assert first.until(stage="sample", done=3)
    workers = first.workers("workers.process")
    assert len(workers) == 2
    start = time.monotonic()
    first.process.send_signal(signal.SIGINT)
    events = first.end(130)
    assert time.monotonic() - start < 60
    assert not any(each.is_running() for each in workers)
    assert any("Run the same command to continue." in each.get("text", "") for each in events)
    assert list(Path("film.shots").glob("*.vidgen-job"))
    assert not Path("film.mp4").exists()

    second = Run(*command)
    at = second.until(stage="sample", done=10)
    second.workers("workers.process")[at["worker"] - 1].kill()
    events = second.end()
    notes = [each["text"] for each in events if each["event"] == "note"]
    assert any("was lost (killed by SIGKILL" in note and "starts again" in note
               for note in notes), notes
    assert {each.get("worker") for each in events if each.get("stage") == "sample"} == {1, 2}
    told = [each for each in events if each.get("worker") and each["event"] == "progress"]
    assert all(0 <= each["fraction"] <= 1 for each in told)
    assert_same(tmp_path, straight)


def test_by_ray_with_an_actor_killed_the_film_is_the_same(
    tmp_path, tiny_model, straight, monkeypatch
):
    pytest.importorskip("ray")
    monkeypatch.chdir(tmp_path)
    Path("film.yaml").write_text(FILM)
    run = Run("--model", tiny_model, "--ray", "local", "--workers", "2")
    assert run.until(stage="sample", done=10), run.end()
    actors = run.workers("ray::Actor")
    assert len(actors) == 2
    actors[0].kill()
    events = run.end()
    assert any("was lost" in each.get("text", "") for each in events)
    assert_same(tmp_path, straight)


def test_a_cluster_that_is_not_there_is_reported(tmp_path, tiny_model, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.chdir(tmp_path)
    Path("film.yaml").write_text("shots: [{prompt: a cat, steps: 1}]")
    run = Run("--model", tiny_model, "--ray", "127.0.0.1:1")
    run.until()
    err = run.process.communicate(timeout=600)[1]
    assert run.process.returncode == 2
    assert "can't be joined" in err
    assert "Traceback" not in err
