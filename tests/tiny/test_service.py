"""The service without HTTP: its own processes that hang or die, and a queue that moves."""

from __future__ import annotations

import asyncio
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.services import wait_for
from vidgen.server import scheduler
from vidgen.server.judging import Refusal
from vidgen.server.service import Call, Service
from vidgen.server.settings import Limits, Settings

LONG = {"prompt": "a red car", "num_inference_steps": 200, "num_frames": 33}
ANN, BOB = Call("ann"), Call("bob")


@pytest.fixture(scope="module")
def service(tiny_model, tmp_path_factory):
    data = tmp_path_factory.mktemp("service")
    service = Service(Settings(data, model=str(tiny_model), limits=Limits(deaths=1)))
    service.start()
    yield service
    service.stop(0.0)


@pytest.fixture
def asking():
    with ThreadPoolExecutor(1) as pool:
        yield pool


def seen(service, job):
    return service.scheduler.view(service.jobs.get(job.id))


def test_who_waits_hears_that_others_leave_the_queue(service):
    running, ahead = service.video(LONG, ANN), service.video(LONG, ANN)
    waiting = service.video(LONG, BOB)
    wait_for(lambda: seen(service, running)["status"] == "in_progress")
    assert seen(service, waiting)["queue_position"] == 2

    async def next_place():
        listener = service.hub.listen("bob", None)
        service.scheduler.cancel(ahead)
        async for event in service.hub.stream(listener, 60.0):
            assert event is not None, "nothing was told"
            assert event.owner == "bob"
            if event.name == "queue":
                return event.data

    place = asyncio.run(next_place())
    assert (place["id"], place["queue_position"]) == (waiting.id, 1)
    assert place["eta_s"] > 0
    for job in (waiting, running):
        service.scheduler.cancel(job)


def test_a_process_that_hangs_is_ended_and_the_job_that_took_it_fails(service, monkeypatch):
    job = service.video(LONG, ANN)
    behind = service.video({"prompt": "a cat", "num_inference_steps": 2, "num_frames": 5}, ANN)
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


def test_a_question_outlives_one_process_that_judges_and_no_more(service, asking):
    def killed_while_asked(answer):
        wait_for(lambda: service.judge._is_ready)
        child = service.judge._child
        os.kill(child.process.pid, signal.SIGSTOP)
        answer = answer or asking.submit(service.video, LONG, BOB)
        wait_for(lambda: service.judge._open)
        os.kill(child.process.pid, signal.SIGKILL)
        wait_for(lambda: service.judge._child is not child)
        return answer

    job = killed_while_asked(None).result(60)
    assert job.ask["num_steps"] == 200
    service.scheduler.cancel(job)
    with pytest.raises(Refusal, match="brings the reader"):
        killed_while_asked(killed_while_asked(None)).result(60)
    service.scheduler.cancel(service.video(LONG, BOB))
