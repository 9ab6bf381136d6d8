"""The service without HTTP: its own processes that hang or die, and a queue that moves."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading

import httpx
import pytest
from PIL import Image

from tests.services import wait_for
from vidgen.core.errors import OptionError
from vidgen.server import app, checker, probe, scheduler
from vidgen.server.app import make_app
from vidgen.server.checker import Checker
from vidgen.server.probe import check_uploads
from vidgen.server.routes import require_completed
from vidgen.server.service import CHECKED_AT_ONCE, Service
from vidgen.server.settings import Limits, Settings
from vidgen.server.types import ApiError, Call

LONG = {"prompt": "a red car", "num_inference_steps": 200, "num_frames": 33}
SHORT = {"prompt": "a cat", "num_inference_steps": 2, "num_frames": 5}
ANN, BOB = Call("ann"), Call("bob")


@pytest.fixture(scope="module")
def service(tiny_model, tmp_path_factory):
    data = tmp_path_factory.mktemp("service")
    service = Service(Settings(data=data, model=str(tiny_model), limits=Limits(deaths=1)))
    service.start()
    yield service
    service.stop(0.0)


def seen(service, job):
    return service.scheduler.view(service.jobs.get(job.id))


def test_waiting_clients_see_that_others_leave_the_queue(service):
    running, ahead = service.clip("create", LONG, ANN), service.clip("create", LONG, ANN)
    waiting = service.clip("create", LONG, BOB)
    wait_for(lambda: (seen(service, running)["step"] or 0) > 5)  # so that its pace is known
    assert seen(service, waiting)["queue_position"] == 2

    async def next_place():
        with service.hub.listen("bob", None) as queue:
            service.scheduler.cancel(ahead)
            while event := await queue.get():
                assert event.owner == "bob"
                if event.name == "queue":
                    return event.data

    place = asyncio.run(asyncio.wait_for(next_place(), 60))
    assert (place["id"], place["queue_position"]) == (waiting.id, 1)
    assert place["eta_s"] > 0
    for job in (waiting, running):
        service.scheduler.cancel(job)


@pytest.mark.parametrize("how", ["cancel", "delete"])
def test_no_step_follows_the_one_that_a_job_is_ended_in(service, monkeypatch, how):
    job = service.clip("create", {**LONG, "size": "192x192"}, ANN)
    wait_for(lambda: (seen(service, job)["step"] or 0) > 1)
    told = []
    monkeypatch.setattr(service.scheduler, "_on_progress",
                        lambda _, message: told.append(message["done"]))
    getattr(service.scheduler, how)(service.jobs.get(job.id))
    wait_for(lambda: service.scheduler.state == "ready")
    assert len(told) <= 1, "the one that was told while the word was on its way"


def test_while_many_are_checked_others_are_answered(service, monkeypatch):
    may_go, checked = threading.Event(), []

    def slow(files, _limits):
        checked.append(files)
        assert may_go.wait(100)

    async def ask():
        transport = httpx.ASGITransport(make_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost",
                                     timeout=60) as client:
            wrong = {"prompt": "x", "num_frames": 8}
            asked = [asyncio.create_task(client.post("/v1/videos", json=wrong)) for _ in range(60)]
            while len(checked) < CHECKED_AT_ONCE:
                await asyncio.sleep(0.05)
            listed = await client.get("/v1/videos")
            assert not any(task.done() for task in asked)
            may_go.set()
            return listed, await asyncio.gather(*asked)

    monkeypatch.setattr(checker, "check_uploads", slow)
    listed, answers = asyncio.run(asyncio.wait_for(ask(), 100))
    assert listed.status_code == 200
    assert {answer.status_code for answer in answers} == {400}


def test_more_requests_than_can_be_answered_are_reported(service, monkeypatch):
    async def answers(*paths):
        transport = httpx.ASGITransport(make_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return [await client.get(path) for path in paths]

    monkeypatch.setattr(app, "MAX_REQUESTS", 0)
    refused, probe = asyncio.run(answers("/v1/models", "/health"))
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
    assert refused.headers["retry-after"] == "1"
    assert probe.status_code == 200
    monkeypatch.undo()
    assert asyncio.run(answers("/v1/models"))[0].status_code == 200


def test_a_process_that_hangs_is_ended_and_the_job_that_took_it_fails(service, monkeypatch):
    job = service.clip("create", LONG, ANN)
    behind = service.clip("create", SHORT, ANN)
    wait_for(lambda: (seen(service, job)["step"] or 0) > 0)
    hung = service.scheduler._child.process
    os.kill(hung.pid, signal.SIGSTOP)
    monkeypatch.setattr(scheduler, "SILENCE_S", 0.0)
    wait_for(lambda: hung.poll() is not None)
    monkeypatch.undo()
    wait_for(lambda: seen(service, job)["status"] == "failed")
    error = seen(service, job)["error"]
    assert error["code"] == "runner_died"
    assert "SIGKILL" in error["message"]
    wait_for(lambda: seen(service, behind)["status"] == "completed")


@pytest.mark.parametrize("how", ["cancel", "delete"])
def test_a_process_that_does_not_stop_is_ended_and_others_go_on(service, monkeypatch, how):
    job = service.clip("create", LONG, ANN)
    behind = service.clip("create", SHORT, ANN)
    wait_for(lambda: (seen(service, job)["step"] or 0) > 0)
    stuck = service.scheduler._child.process
    os.kill(stuck.pid, signal.SIGSTOP)
    getattr(service.scheduler, how)(service.jobs.get(job.id))
    assert stuck.poll() is None
    monkeypatch.setattr(scheduler, "STOP_PATIENCE_S", 0.0)
    wait_for(lambda: stuck.poll() is not None)
    monkeypatch.undo()
    wait_for(lambda: seen(service, behind)["status"] == "completed")
    if how == "cancel":
        assert seen(service, job)["error"]["code"] == "cancelled"
    else:
        assert service.jobs.get(job.id) is None
        assert not service.settings.job_folder(job.id).exists()


def test_a_clip_of_few_frames_may_not_last_for_hours(service):
    wrong = {"prompt": "x", "num_frames": 605, "num_inference_steps": 4, "fps": 1}
    with pytest.raises(ApiError, match=r"605 seconds .* allows 600; .* a higher fps"):
        service.clip("create", wrong, ANN)
    script = {"project": {"fps": 1}, "shots": [{"id": "one", "prompt": "x", "frames": 605}]}
    with pytest.raises(ApiError, match="605 seconds of shot one"):
        service.check_film({"script": script}, ANN)


def test_a_remix_needs_a_change_and_no_prompt(service):
    short = {"prompt": "a cat", "num_inference_steps": 2, "num_frames": 5, "seed": 3}
    source = service.clip("create", short, ANN)
    made = service.clip("remix", {"num_frames": 9}, ANN, source)
    asked = [made.request[name] for name in ("prompt", "seed", "num_frames")]
    assert asked == ["a cat", 3, 9]
    assert service.clip("remix", {"seed": "4"}, ANN, source).request["seed"] == 4
    for nothing in ({}, {"prompt": None}, {"model": "tiny"}):
        with pytest.raises(ApiError, match=r"no field is changed; .* a replay"):
            service.clip("remix", nothing, ANN, source)
    with pytest.raises(ApiError, match="the prompt is empty"):
        service.clip("remix", {"prompt": ""}, ANN, source)


def test_what_the_service_refuses_names_its_own_fields(service):
    fields = {"prompt": "a cat", "num_inference_steps": 2, "num_frames": 5}
    job = service.clip("create", fields, ANN)
    wait_for(lambda: seen(service, job)["status"] == "completed")
    with pytest.raises(ApiError, match="the field strength") as error:
        service.clip("create", {"prompt": "x", "video_reference": {"id": job.id}}, ANN)
    assert (error.value.code, error.value.param) == ("missing_parameter", "strength")
    gone = service.clip("create", LONG, ANN)
    service.scheduler.cancel(gone)
    with pytest.raises(ApiError, match=r"has failed; create another one \(the job was cancelled\)"):
        require_completed(service.jobs.get(gone.id))
    with pytest.raises(ApiError, match="has failed; give a completed one"):
        service.clip("edit", {"prompt": "x", "video": {"id": gone.id}}, ANN)


def test_a_service_takes_less_of_some_settings(tmp_path, tiny_model):
    made = Checker(str(tiny_model), Limits())
    options = {"prompt": "a red car", "frames": 9, "seed": 1}
    spec = {"options": {**options, "settings": {"encode_passes": 10}}}
    assert made.clip(tmp_path, spec)["num_frames"] == 9
    for passes, told in ((11, "11 encode_passes requested, this service allows 10"),
                         (101, "encode_passes is 101; give a whole number from 1 to 100")):
        spec["options"]["settings"] = {"encode_passes": passes}
        with pytest.raises(ApiError, match=told):
            made.clip(tmp_path, spec)


def picture(place, name="a.png"):
    Image.new("RGB", (64, 48)).save(place / name)
    return [("image", "picture", str(place / name))]


def test_a_request_outlives_one_reader_of_its_files_and_no_more(tmp_path, monkeypatch):
    files, started = picture(tmp_path), []
    popen = subprocess.Popen

    def deadly(*arguments, **options):
        process = popen(*arguments, **options)
        started.append(process)
        if len(started) <= deaths:
            process.kill()
        return process

    monkeypatch.setattr(probe.subprocess, "Popen", deadly)
    deaths = 1
    check_uploads(files, Limits())
    assert [process.returncode for process in started] == [-signal.SIGKILL, 0]
    started.clear()
    deaths = 2
    with pytest.raises(OptionError, match="crashes its reader"):
        check_uploads(files, Limits())
    assert len(started) == 2


def test_uploads_that_hang_or_unpack_to_too_much_are_refused(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "hangs.png")
    monkeypatch.setattr(probe, "PATIENCE_S", 2)
    with pytest.raises(OptionError, match="takes too long"):
        check_uploads([("image", "picture", str(tmp_path / "hangs.png"))], Limits())
    monkeypatch.undo()
    (tmp_path / "damaged.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    with pytest.raises(OptionError, match=r"image is not a picture|image is damaged"):
        check_uploads([("image", "picture", str(tmp_path / "damaged.png"))], Limits())
    with pytest.raises(OptionError, match="3,072 pixels of image requested"):
        check_uploads(picture(tmp_path), Limits(input_pixels=3000))


def test_a_reader_of_uploads_has_limits_of_its_own(tmp_path):
    order = json.dumps({"files": picture(tmp_path), "pixels": 1 << 30, "seconds": 1})
    program = ("import resource, signal\n"
               "from vidgen.server import probe\n"
               "probe.main()\n"
               "assert resource.getrlimit(resource.RLIMIT_AS)[0] == probe.MEMORY\n"
               "assert signal.alarm(0) > 60\n"
               "try:\n    bytearray(probe.MEMORY)\nexcept MemoryError:\n    print('full')\n")
    ended = subprocess.run([sys.executable, "-c", program], input=order, text=True, check=True,
                           capture_output=True)
    assert ended.stdout == "{}full\n"
