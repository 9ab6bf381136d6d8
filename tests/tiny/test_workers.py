"""The scheduler with real processes: order, deaths, silence, stops; nothing is lost."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.labour import Labour, Unloadable
from vidgen.core.errors import Cancelled, InputError, VidgenError
from vidgen.pipeline.workers import scheduler
from vidgen.pipeline.workers.pool import LocalPool, WorkerPool
from vidgen.pipeline.workers.scheduler import results_of, run_jobs
from vidgen.pipeline.workers.types import Job, Outcome, Patience, WorkerOptions
from vidgen.story.script import Script

ROOT = Path(__file__).parents[2]


def quiet(_event: dict) -> None:
    pass


def by_key(outcomes) -> dict[str, Outcome]:
    return {outcome.job.key: outcome for outcome in outcomes}


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def gone(pids, seconds: float = 20.0) -> bool:
    until = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    return not any(map(alive, pids))


@pytest.mark.parametrize("workers", [1, 2])
def test_jobs_come_after_those_they_need(tmp_path, workers):
    jobs = [Job(f"{n}", ("square", n), tuple(f"{m}" for m in range(max(0, n - 2), n)))
            for n in range(6)]
    workers = WorkerOptions(workers, threads=1)
    outcomes = list(run_jobs(jobs, Labour(tmp_path), workers, quiet))
    assert [outcome.job.key for outcome in outcomes] == [str(n) for n in range(6)]
    assert [outcome.result for outcome in outcomes] == [n * n for n in range(6)]


def test_what_fails_takes_its_dependents_with_it_and_no_others(tmp_path):
    jobs = [Job("a", ("refuse", "no"), name="shot a"), Job("b", ("square", 2), ("a",)),
            Job("c", ("square", 3), ("b",)), Job("d", ("square", 4), ("never given",))]
    jobs += [Job(f"n{n}", ("square", n)) for n in range(32)]
    jobs += [Job("late", ("square", 5), ("a",))]
    found = by_key(run_jobs(iter(jobs), Labour(tmp_path), WorkerOptions(threads=1), quiet))
    assert len(found) == len(jobs)
    assert (type(found["a"].error), str(found["a"].error)) == (InputError, "no")
    assert [str(found[key].error) for key in ("b", "c", "late")] == [
        "it needs shot a, which could not be made", "it needs b, which could not be made",
        "it needs shot a, which could not be made"]
    assert found["d"].result == 16


def test_dead_workers_jobs_are_done_elsewhere(tmp_path, caplog):
    jobs = [Job("dies once", ("die", 1)), Job("warns", ("warn", "careful")),
            Job("refuses", ("refuse", "no")), Job("fails", ("fail", "gone"))]
    jobs += [Job(f"{n}", ("square", n)) for n in range(8)]
    told: list[dict] = []
    found = by_key(run_jobs(jobs, Labour(tmp_path), WorkerOptions(2, threads=1), told.append))
    assert [found[f"{n}"].result for n in range(8)] == [n * n for n in range(8)]
    pids = [each["pid"] for each in told if each.get("stage") == "die"]
    assert len(set(pids)) == 2
    assert found["dies once"].result == pids[-1]
    (note,) = [each["text"] for each in told if each["event"] == "note"]
    assert "was lost (killed by SIGKILL, possibly out of memory); its job, dies once" in note
    assert {each["worker"] for each in told} <= {1, 2}
    assert isinstance(found["refuses"].error, InputError)
    assert "KeyError: 'gone'" in str(found["fails"].error)
    assert "labour.py" in str(found["fails"].error)
    assert "careful" in caplog.text
    assert gone({each["pid"] for each in told if "pid" in each})


def test_a_job_that_ends_every_worker_is_given_up_with_its_reason(tmp_path):
    jobs = [Job("killer", ("die", 99), name="shot 'killer'"), Job("after", ("square", 3))]
    found = by_key(run_jobs(jobs, Labour(tmp_path), WorkerOptions(2, threads=1), quiet))
    assert str(found["killer"].error) == (
        "shot 'killer' ended 3 workers in a row; the last: killed by SIGKILL, possibly out of "
        "memory")
    assert found["after"].result == 9
    assert len(list(tmp_path.glob("SIGKILL-*"))) == 3


@pytest.mark.parametrize(("what", "patience", "reason"), [
    ("freeze", Patience(silence=5), "it sent nothing for 5 s"),
    ("hang", Patience(stall=3), "its job made no progress for 3 s"),
])
def test_workers_that_hang_are_replaced(tmp_path, what, patience, reason):
    told: list[dict] = []
    workers = WorkerOptions(2, threads=1, patience=patience)
    (outcome,) = run_jobs([Job("a", (what, 1))], Labour(tmp_path), workers, told.append)
    first, second = (each["pid"] for each in told if "pid" in each)
    assert outcome.result == second
    assert gone([first])
    assert any(reason in each.get("text", "") for each in told)


def test_a_job_is_cancelled_at_its_next_event_and_no_other(tmp_path):
    pool = LocalPool(pickle.dumps(Labour(tmp_path)), 1, 1)
    (worker,) = pool.workers

    def outcome(job):
        worker.begin(job)
        while True:
            for _, message in pool.listen(1.0):
                if message == ("event", {"event": "progress", "stage": "events", "done": 1}):
                    worker.cancel("enough")
                elif message[0] in ("done", "failed", "lost"):
                    return message

    kind, error = outcome(Job("a", ("events", 600)))
    worker.cancel("too late")
    assert (kind, type(error), str(error)) == ("failed", Cancelled, "enough")
    assert outcome(Job("b", ("square", 3))) == ("done", 9)
    worker.stop()
    worker.end(10.0)
    assert worker.process.returncode == 0


def test_an_interrupt_stops_all_and_lets_them_keep_what_they_have(tmp_path):
    pids: list[int] = []

    def tell(event: dict) -> None:
        pids.append(event["pid"])
        if len(pids) == 2:
            raise KeyboardInterrupt

    jobs = [Job(name, ("wait", name)) for name in ("x", "y")]
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        list(run_jobs(jobs, Labour(tmp_path), WorkerOptions(2, threads=1), tell))
    assert time.monotonic() - start < 60
    assert not any(map(alive, pids))
    assert {path.name for path in tmp_path.iterdir()} == {"x", "y"}


def test_workers_leave_when_their_scheduler_is_killed(tmp_path):
    program = (
        "import sys\nfrom pathlib import Path\nfrom tests.labour import Labour\n"
        "from vidgen.pipeline.workers.scheduler import Job, WorkerOptions, run_jobs\n"
        "jobs = [Job('x', ('wait', 'x')), Job('y', ('wait', 'y'))]\n"
        "tell = lambda event: print(event['pid'], flush=True)\n"
        "workers = WorkerOptions(2, threads=1)\n"
        f"list(run_jobs(jobs, Labour(Path({str(tmp_path)!r})), workers, tell))\n"
    )
    run = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE)
    pids = [int(run.stdout.readline()) for _ in range(2)]
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert gone(pids)
    assert {path.name for path in tmp_path.iterdir()} == {"x", "y"}
    run.stdout.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_functions_results_come_by_their_keys(workers):
    words = {1: "a.mp4", (2, "b"): "b.tar.gz"}
    assert dict(results_of(os.path.splitext, words, workers, print)) == {
        1: ("a", ".mp4"), (2, "b"): ("b.tar", ".gz")}
    assert list(results_of(os.path.splitext, {}, workers, print)) == []
    with pytest.raises(InputError, match="does not exist"):
        list(results_of(Script.read, {"x": "none.yaml", "y": "none.yml"}, workers, print))


def test_work_that_cannot_be_sent_or_opened_is_reported():
    jobs = [Job("a", ("square", 2))]
    with pytest.raises(InputError, match="can't be sent to other processes"):
        list(run_jobs(jobs, lambda *_: None, WorkerOptions(2, threads=1), quiet))
    with pytest.raises(VidgenError, match=r"can't be started: .*this can't be opened here"):
        list(run_jobs(jobs, Unloadable(), WorkerOptions(2, threads=1), quiet))


@pytest.mark.parametrize(("words", "message"), [
    ({"count": 0}, "workers is 0; give a whole number from 1 to 1024"),
    ({"threads": 5000}, "threads is 5000"),
])
def test_staff_out_of_range_is_refused(words, message):
    with pytest.raises(InputError, match=message):
        WorkerOptions(**words)


def test_threads_are_divided_unless_somebody_said_how_many(monkeypatch):
    import torch

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert [WorkerOptions(n).num_threads for n in (None, 1, 3, 99)] == [8, 8, 2, 1]
    assert WorkerOptions(4, threads=5).num_threads == 5
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert WorkerOptions(4).num_threads == 8
    assert os.environ["OMP_NUM_THREADS"] == "8"


def test_a_long_chain_fails_with_its_first_job(tmp_path):
    jobs = [Job("0", ("refuse", "no"))]
    jobs += [Job(f"{n}", ("square", n), (f"{n - 1}",)) for n in range(1, 1500)]
    outcomes = list(run_jobs(jobs, Labour(tmp_path), WorkerOptions(threads=1), quiet))
    assert [outcome.job.key for outcome in outcomes] == [str(n) for n in range(1500)]
    assert str(outcomes[-1].error) == "it needs 1498, which could not be made"


def test_workers_end_if_a_later_one_does_not_start():
    ended: list[int] = []

    class Started:
        def __init__(self, number: int) -> None:
            if number == 3:
                raise KeyboardInterrupt
            self.number = number

        def end(self, _grace_s: float) -> None:
            ended.append(self.number)

    with pytest.raises(KeyboardInterrupt):
        WorkerPool(Started, 3)
    assert ended == [1, 2]


def test_a_caller_that_leaves_closes_the_run(monkeypatch):
    jobs = [Job("a", None), Job("b", None)]
    run = (Outcome(job, 1) for job in jobs)
    monkeypatch.setattr(scheduler, "_run_here", lambda *_: run)
    outcomes = run_jobs(jobs, print, WorkerOptions(threads=1), quiet)
    next(outcomes)
    outcomes.close()
    assert run.gi_frame is None
