"""The service's queue, without HTTP: order, states, retries, retention, a full disk, kills."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
from dataclasses import fields

import pytest

from vidgen.core.errors import InputError, OutputError
from vidgen.server.hub import Hub, Metrics
from vidgen.server.jobs import Jobs, ServiceClock
from vidgen.server.scheduler import Scheduler
from vidgen.server.settings import Settings
from vidgen.server.types import ApiError, Call

NEW = {"kind": "video", "request": {"prompt": "a car"}, "spec": {"options": {}},
       "fingerprint": "f1"}
OF_CALL = {each.name for each in fields(Call)}


@pytest.fixture
def jobs(tmp_path):
    jobs = Jobs(tmp_path / "jobs.sqlite3")
    yield jobs
    jobs.close()


def added(jobs, **given):
    call = Call(**{"owner": "ann"} | {name: given[name] for name in OF_CALL & given.keys()})
    return jobs.add(call, **NEW | {name: given[name] for name in given.keys() - OF_CALL})


def add(jobs, **given):
    return added(jobs, **given)[0]


def finish(jobs, job, **changes):
    return jobs.finish(job, **{"result": {"seconds": 1.0}, "num_bytes": 10, "keep_s": 60.0,
                               **changes})


def test_an_old_sqlite_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 34, 1))
    monkeypatch.setattr(sqlite3, "sqlite_version", "3.34.1")
    with pytest.raises(InputError, match=r"3\.35.*3\.34\.1; install"):
        Jobs(tmp_path / "jobs.sqlite3")


def test_expired_clips_go_while_the_disk_is_full(jobs, tmp_path, monkeypatch):
    monkeypatch.setattr("vidgen.server.scheduler.LOOK_S", 0.0)
    settings = Settings(data=tmp_path)
    scheduler = Scheduler(settings, jobs, Hub(), Metrics())
    old, running = add(jobs), add(jobs, fingerprint="f2")
    finish(jobs, jobs.claim(), keep_s=-1.0)
    jobs.delete(running)
    folder = settings.job_folder(old.id)
    folder.mkdir(parents=True)
    tries = []

    def write():
        tries.append(folder.exists())
        if folder.exists() and len(tries) < 5:
            raise OutputError("no space is left")

    scheduler._release(running, write)
    assert tries == [True, False]
    assert jobs.get(old.id) is None


def test_first_come_first_served(jobs):
    ids = [add(jobs).id for _ in range(3)]
    assert [job.id for job in jobs.waiting()] == ids
    claimed = jobs.claim()
    assert (claimed.id, claimed.status, claimed.attempt) == (ids[0], "in_progress", 1)
    assert jobs.claim().id == ids[1]
    assert finish(jobs, claimed)
    assert jobs.get(ids[0]).status == "completed"
    assert jobs.get(ids[0]).result == {"seconds": 1.0}
    assert jobs.counts() == {"completed": 1, "in_progress": 1, "queued": 1}


def test_what_is_finished_is_finished(jobs):
    add(jobs)
    job = jobs.claim()
    assert finish(jobs, job)
    assert not finish(jobs, job)
    assert not finish(jobs, job, error=("cancelled", "too late"))
    assert jobs.get(job.id).status == "completed"
    assert [line["action"] for line in jobs.audit()] == ["completed", "started", "created"]


def test_a_result_of_an_earlier_attempt_does_not_count(jobs):
    add(jobs)
    first = jobs.claim()
    jobs.put_back(first, died=True)
    second = jobs.claim()
    assert (second.attempt, second.deaths) == (2, 1)
    assert not finish(jobs, first)
    assert finish(jobs, second)


def test_a_start_takes_up_what_was_left(jobs, tmp_path):
    running, waiting, deleted = add(jobs), add(jobs), add(jobs)
    jobs.claim()
    jobs.delete(deleted)
    jobs.close()
    again = Jobs(tmp_path / "jobs.sqlite3")
    assert again.recover() == [deleted.id]
    again.purge(deleted.id)
    assert again.claim().id == running.id
    assert again.claim().id == waiting.id
    assert [line["action"] for line in again.audit()][1] == "resumed"
    again.close()


def test_keys_see_their_own_jobs_alone(jobs):
    mine, other = add(jobs), add(jobs, owner="bob")
    assert jobs.get(mine.id, "bob") is None
    assert [job.id for job in jobs.page("video", "ann")[0]] == [mine.id]
    with pytest.raises(InputError, match="not one of your videos"):
        jobs.page("video", "ann", after=other.id)
    assert {line["owner"] for line in jobs.audit("bob")} == {"bob"}


def test_pages_follow_each_other(jobs):
    ids = [add(jobs).id for _ in range(5)]
    add(jobs, kind="film")
    first, more = jobs.page("video", "ann", limit=2, newest_first=False)
    second, _ = jobs.page("video", "ann", limit=2, newest_first=False, after=first[-1].id)
    last, no_more = jobs.page("video", "ann", limit=2, newest_first=False, after=second[-1].id)
    assert [job.id for job in (*first, *second, *last)] == ids
    assert (more, no_more) == (True, False)
    assert [job.id for job in jobs.page("video", "ann", limit=9)[0]] == ids[::-1]
    assert jobs.page("video", "ann", limit=0)[0] == []


def test_an_idempotency_key_is_one_job(jobs):
    job, is_new = added(jobs, idempotency_key="k")
    assert is_new
    assert added(jobs, idempotency_key="k") == (job, False)
    with pytest.raises(ApiError, match="another request"):
        added(jobs, idempotency_key="k", fingerprint="f2")
    assert added(jobs, idempotency_key="k", owner="bob")[1]
    jobs.delete(job)
    assert added(jobs, idempotency_key="k")[1]


def test_a_retry_finds_what_its_first_try_began(jobs):
    first = add(jobs)
    assert add(jobs).id != first.id  # asked twice on purpose
    latest = add(jobs)
    assert added(jobs, is_retry=True) == (latest, False)
    assert added(jobs, is_retry=True, fingerprint="f2")[1]


def test_a_first_try_that_comes_in_after_its_retry(jobs):
    arrived_at = jobs.clock()
    retried = add(jobs, is_retry=True, arrived_at=jobs.clock())
    assert added(jobs, arrived_at=arrived_at) == (retried, False)
    assert added(jobs, arrived_at=jobs.clock())[1]


def test_only_so_many_wait(jobs):
    added(jobs, most=2, most_of_owner=1)
    with pytest.raises(ApiError, match="at most 1 may be"):
        added(jobs, most=2, most_of_owner=1)
    added(jobs, owner="bob", most=2, most_of_owner=1)
    with pytest.raises(ApiError, match="at most 2 may be"):
        added(jobs, owner="eve", most=2, most_of_owner=1)
    done = jobs.claim()
    finish(jobs, done)
    added(jobs, most=2, most_of_owner=1)


def test_what_is_old_or_too_much_goes(jobs):
    made = []
    for _ in range(4):
        add(jobs)
        made.append(jobs.claim())
    finish(jobs, made[0], keep_s=-1.0)
    for job in made[1:]:
        finish(jobs, job)
    assert set(jobs.outdated(25)) == {made[0].id, made[1].id}
    assert jobs.outdated(1000) == [made[0].id]


def test_a_key_that_takes_much_drives_out_its_own_alone(jobs):
    made = []
    for owner in ("bob", "ann", "ann", "ann"):
        add(jobs, owner=owner)
        made.append(jobs.claim())
        finish(jobs, made[-1])
    assert jobs.outdated(1000, 25) == [made[1].id]
    assert jobs.outdated(1000) == []


def test_the_clock_neither_jumps_nor_runs_backwards(monkeypatch):
    clock = ServiceClock(not_before=time.time() + 1000)
    began = clock()
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert 0 <= clock() - began < 5
    assert began > 1000
    assert ServiceClock(not_before=began)() >= began


def test_a_file_of_another_version_or_kind(tmp_path):
    path = tmp_path / "jobs.sqlite3"
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version=99")
    with pytest.raises(InputError, match="format 99"):
        Jobs(path)
    path.write_bytes(b"no database at all" * 100)
    with pytest.raises(InputError, match="can't be used as a queue"):
        Jobs(path)


def test_a_full_disk_is_reported_and_nothing_is_half_done(jobs):
    job = add(jobs)
    pages = jobs._run("PRAGMA page_count").fetchone()[0]
    jobs._run(f"PRAGMA max_page_count={pages}")

    def fill():
        for _ in range(200):
            add(jobs, request={"prompt": "x" * 10_000})

    with pytest.raises(OutputError, match="no space is left"):
        fill()
    count = len(jobs.waiting())
    jobs._run("PRAGMA max_page_count=1000000")
    assert len(jobs.waiting()) == count
    assert jobs.claim().id == job.id


WRITER = """
import sys
from pathlib import Path
from vidgen.server.types import Call
from vidgen.server.jobs import Jobs, ServiceClock
jobs = Jobs(Path(sys.argv[1]))
jobs.recover()
while True:
    print("added", jobs.add(Call("ann"), "video", {}, {}, "f")[0].id, flush=True)
    job = jobs.claim()
    jobs.finish(job, result={}, num_bytes=1, keep_s=60)
    print("done", job.id, flush=True)
"""


def test_killed_at_any_moment_it_forgets_nothing_it_answered(tmp_path):
    path, told = tmp_path / "jobs.sqlite3", []
    for pause in (0.3, 0.05, 0.1, 0.15):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)],
                                  stdout=subprocess.PIPE, text=True, env=dict(os.environ))
        told.append(writer.stdout.readline().split())
        time.sleep(pause)
        writer.kill()
        told += [line.split() for line in writer.stdout if line.endswith("\n")]
        writer.wait()
    jobs = Jobs(path)
    status = {row["id"]: row["status"] for row in jobs._run("SELECT id, status FROM jobs")}
    assert {words[1] for words in told if words[0] == "added"} <= status.keys()
    assert all(status[words[1]] == "completed" for words in told if words[0] == "done")
    ends = [line["job"] for line in jobs.audit() if line["action"] == "completed"]
    assert len(ends) == len(set(ends)) >= sum(words[0] == "done" for words in told)
    jobs.close()
