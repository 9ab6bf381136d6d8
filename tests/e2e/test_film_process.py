"""`vidgen script` as a process: killed in the midst of a shot, and with the embedded model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vidgen.media.clip import Clip
from vidgen.media.probe import read_recipe
from vidgen.pipeline.journal.job import job_facts

FILM = """\
version: 1
project: {dtype: fp32, defaults: {steps: 24}}
shots:
  - {id: one, prompt: a red car bounces, duration: 1, steps: 2}
  - {id: two, prompt: a red car moves left, duration: 11, continue_from: one}
  - {id: three, prompt: a cat, duration: 1, first_frame: {shot: two}, steps: 2}
"""


def start(*words):
    return subprocess.Popen(
        [sys.executable, "-m", "vidgen", "script", *map(str, words)], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def kill_at(stage, *words):
    """Run until shot two is in a stage with something kept, then kill it; tells its job."""
    run = start(*words, "--events", "-")
    for line in run.stdout:
        event = json.loads(line)
        kept = list(Path("film.shots").glob("*.vidgen-job/**/*.safetensors"))
        if (event.get("stage"), event.get("shot")) == (stage, "two") and kept:
            break
    run.kill()
    run.communicate()
    assert run.returncode == -9
    assert not Path("film.mp4").exists()
    (job,) = Path("film.shots").glob("*.vidgen-job")
    return job_facts(job)


def finish(*words):
    out, err = (run := start(*words, "--json")).communicate(timeout=600)
    assert run.returncode == 0, err
    return json.loads(out)


def test_killed_twice_a_film_continues_and_has_the_same_frames(tmp_path, tiny_model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("film.yaml").write_text(FILM)
    command = ["film.yaml", "--model", tiny_model, "-o"]
    sampled = kill_at("sample", *command, "film.mp4")
    assert sampled["stage"] == "sample"
    assert kill_at("write", *command, "film.mp4")["stage"] == "write"
    told = finish(*command, "film.mp4")
    assert [shot["made"] for shot in told["shots"]] == [False, True, True]
    straight = finish(*command, "straight.mp4")
    assert all(shot["made"] for shot in straight["shots"])
    assert (Clip.from_file("film.mp4").frames == Clip.from_file("straight.mp4").frames).all()
    assert Clip.from_file("film.mp4").num_frames == 13 * 12
    assert list(Path("film.shots").glob("*.vidgen-job")) == []
    assert Path("film.yaml").read_text() == FILM


@pytest.mark.embedded
def test_a_film_of_the_embedded_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("film.yaml").write_text(
        "version: 1\n"
        "project: {size: 64x64, style: by day, defaults: {duration: 1, steps: 4}}\n"
        "characters: {car: {description: a red car, seed: 3}}\n"
        "places: {desert: the desert}\n"
        "shots:\n"
        "  - {id: one, place: desert, prompt: '{car} drives to the right through {place}'}\n"
        "  - {id: two, prompt: '{car} bounces in {desert}', continue_from: one, camera: static}\n"
        "  - {id: three, prompt: a cat spins in a room, takes: 2}\n"
    )
    told = finish("film.yaml", "-o", "film.mp4")
    film = Clip.from_file("film.mp4")
    assert (film.num_frames, film.size, film.fps) == (36, (64, 64), 12)
    assert film.frames.std() > 10
    one, two, three = told["shots"]
    assert read_recipe(two["path"])["hand_over"] == "latents"
    assert "the camera stays still, by day" in read_recipe(two["path"])["plan"]["prompt"]
    assert three["choice"]["takes"][0]["verified"][0]["names"] == "cat"
    join = film.frames[11:13].astype(int)
    within = abs(film.frames[1:11].astype(int) - film.frames[:10]).mean()
    assert abs(join[1] - join[0]).mean() < 4 * within + 4  # no cut between the two
    assert one["seed"] == two["seed"] == 3
