"""The service killed, stopped and starved: no job is lost, none is made twice."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest

from tests.services import Served, is_alive, wait_for
from tests.soaking import soak
from vidgen.media.clip import Clip

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
LONG = {"num_inference_steps": 120, "num_frames": 33, "seed": 3}


@pytest.fixture(scope="module")
def served(tiny_model, tmp_path_factory):
    data = tmp_path_factory.mktemp("serve") / "data"
    with Served(tiny_model, data, "--drain-seconds", "0.2") as served:
        yield served


def is_at_step(served, job, step):
    def is_there():
        kept = served.data / "videos" / job["id"] / "video.mp4.vidgen-job" / "state.safetensors"
        return (served.video(job["id"])["step"] or 0) >= step and kept.is_file()

    return is_there


def first_step(served, job):
    """The first step that is told of a job."""
    for name, data in served.events(f"/v1/videos/{job['id']}/events"):
        if name == "progress" and data["step"]:
            return data["step"]
    raise AssertionError("no step was told")


def frames(served, job, path):
    path.write_bytes(served.http.get(f"/v1/videos/{job['id']}/content").content)
    return Clip.from_file(path).frames


def test_killed_while_it_denoises_it_continues_there(served, tmp_path):
    job, waiting = served.create(**LONG), served.create("a cat", seed=1)
    wait_for(is_at_step(served, job, 30))
    children = served.children()
    assert set(children) == {"vidgen.pipeline.workers.process"}
    served.kill()
    wait_for(lambda: not any(map(is_alive, children.values())))
    served.start()
    assert served.video(waiting["id"])["status"] == "queued"
    assert first_step(served, job) > 5
    done = served.finished(job["id"])
    assert (done["status"], done["resumed"], done["seed"]) == ("completed", 1, 3)
    assert served.finished(waiting["id"])["status"] == "completed"
    straight = served.http.post(f"/v1/videos/{job['id']}/replay").json()
    assert served.finished(straight["id"])["resumed"] == 0
    assert np.array_equal(frames(served, job, tmp_path / "a.mp4"),
                          frames(served, straight, tmp_path / "b.mp4"))
    actions = [line["action"] for line in served.http.get("/v1/audit").json()["data"]
               if line["job"] == job["id"]]
    assert actions == ["completed", "resumed", "started", "created"]


def test_a_film_killed_continues_in_the_shot_at_work(served, tmp_path):
    shots = [{"id": "one", "prompt": "a cat", "frames": 9, "steps": 2},
             {"id": "two", "prompt": "a red car", "frames": 17, "steps": 120}]
    film = served.http.post("/v1/films", json={"script": {"shots": shots}}).json()
    kept = served.data / "films" / film["id"]
    for name, data in served.events(f"/v1/films/{film['id']}/events"):
        if name == "progress" and data["shot"] == "two" and (data["step"] or 0) >= 30 and (
            any(kept.rglob("state.safetensors"))
        ):
            break
    children = served.children()
    served.kill()
    wait_for(lambda: not any(map(is_alive, children.values())))
    served.start()
    again = next(data for name, data in served.events(f"/v1/films/{film['id']}/events")
                 if name == "progress" and data["step"])
    assert again["shot"] == "two", "the first is there"
    assert again["step"] > 5
    done = served.finished(film["id"])
    assert (done["status"], done["resumed"]) == ("completed", 1), done
    straight = served.http.post("/v1/films", json={"script": {"shots": shots}}).json()
    assert served.finished(straight["id"])["resumed"] == 0
    made = []
    for each in (film, straight):
        (tmp_path / "x.mp4").write_bytes(
            served.http.get(f"/v1/films/{each['id']}/content").content)
        made.append(Clip.from_file(tmp_path / "x.mp4").frames)
    assert np.array_equal(*made)


def test_when_stopped_it_returns_the_job_and_the_process_at_work_may_be_killed(served):
    job = served.create(**{**LONG, "num_frames": 49})  # not done before it is looked at
    wait_for(is_at_step(served, job, 20))
    assert served.stop() == 0
    served.start()
    assert first_step(served, job) >= 20
    assert served.video(job["id"])["resumed"] == 1
    os.kill(served.children()["vidgen.pipeline.workers.process"], signal.SIGKILL)
    assert served.http.get("/health").status_code == 200
    wait_for(lambda: served.video(job["id"])["status"] == "queued", every_s=0.0)
    wait_for(lambda: served.video(job["id"])["resumed"] == 2)
    assert served.finished(job["id"])["status"] == "completed"
    assert served.finished(served.create("a cat")["id"])["status"] == "completed"


def test_a_soak_with_kills(tiny_model, tmp_path):
    outcome = soak(tiny_model, tmp_path / "data", 16, 2)
    assert outcome.is_clean, outcome
    assert outcome.watched >= 3, outcome
    assert outcome.growth_mb < 50, outcome


@pytest.mark.long
def test_a_thousand_jobs_and_a_hundred_kills(tiny_model, tmp_path):
    outcome = soak(tiny_model, tmp_path / "data", 1000, 100)
    assert outcome.is_clean, outcome
    assert outcome.watched >= 400, outcome
    assert outcome.growth_mb < 50, outcome
