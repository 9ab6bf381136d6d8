"""scripts/quiet stops and continues real processes in a checkout of its own."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "quiet"
COUNTER = """
import pathlib, sys, time
out = pathlib.Path(sys.argv[1])
for number in range(100_000):
    out.write_text(str(number))
    time.sleep(0.01)
"""


@pytest.fixture
def checkout(tmp_path):
    """A checkout with one training that counts in a process group of its own."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "train" / "toybox").mkdir(parents=True)
    (tmp_path / "runs" / "dit").mkdir(parents=True)
    shutil.copy(SCRIPT, tmp_path / "scripts" / "quiet")
    (tmp_path / "train" / "toybox" / "dit.py").write_text(COUNTER)
    training = subprocess.Popen(
        [sys.executable, "train/toybox/dit.py", "count"], cwd=tmp_path, start_new_session=True
    )
    (tmp_path / "runs" / "dit" / "pid").write_text(str(training.pid))
    wait_for((tmp_path / "count").exists)
    yield tmp_path
    training.kill()
    training.wait()


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def stands_still(checkout):
    before = (checkout / "count").read_text()
    time.sleep(0.3)
    return (checkout / "count").read_text() == before


def wait_until_counting(checkout):
    """A busy machine may keep a running process waiting: it counts on when its number changes."""
    before = (checkout / "count").read_text()
    wait_for(lambda: (checkout / "count").read_text() not in ("", before))


def state(checkout):
    pid = (checkout / "runs" / "dit" / "pid").read_text()
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]


def quiet(checkout, *command, **options):
    return subprocess.Popen(["bash", checkout / "scripts" / "quiet", *command], **options)


def test_training_stands_still_during_the_command_and_continues_after(checkout):
    wait_until_counting(checkout)
    run = quiet(checkout, "sleep", "1.5")
    wait_for(lambda: state(checkout) == "T")
    assert stands_still(checkout)
    assert run.wait() == 0
    wait_until_counting(checkout)


def test_the_commands_exit_code_is_passed_on(checkout):
    assert quiet(checkout, "bash", "-c", "exit 7").wait() == 7
    wait_until_counting(checkout)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_training_continues_even_if_quiet_is_killed(checkout, number):
    run = quiet(checkout, "sleep", "2", start_new_session=True)
    wait_for(lambda: state(checkout) == "T")
    os.killpg(run.pid, number)
    run.wait()
    wait_for(lambda: state(checkout) != "T")
    wait_until_counting(checkout)


def test_a_quiet_inside_a_quiet_leaves_the_training_to_the_outer_one(checkout):
    still = "grep -q 'T (stopped)' /proc/$(cat runs/dit/pid)/status"
    inner = f"bash {checkout}/scripts/quiet true; {still}"
    assert quiet(checkout, "bash", "-c", inner, cwd=checkout).wait() == 0
    wait_until_counting(checkout)


def test_stale_and_foreign_numbers_are_left_alone(checkout):
    other = subprocess.Popen(["sleep", "30"], start_new_session=True)
    try:
        for name, text in (("old", "999999999"), ("odd", "x"), ("sleep", str(other.pid))):
            (checkout / "runs" / name).mkdir()
            (checkout / "runs" / name / "pid").write_text(text)
        check = f"grep -q 'S (sleeping)' /proc/{other.pid}/status"
        assert quiet(checkout, "bash", "-c", check).wait() == 0
    finally:
        other.kill()
        other.wait()


def test_it_works_where_nothing_was_ever_trained(tmp_path):
    (tmp_path / "scripts").mkdir()
    shutil.copy(SCRIPT, tmp_path / "scripts" / "quiet")
    done = subprocess.run(
        ["bash", tmp_path / "scripts" / "quiet", "echo", "a b"],
        capture_output=True, text=True, check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "a b\n", "")
