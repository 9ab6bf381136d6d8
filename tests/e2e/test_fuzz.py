"""Damaged files of every kind: each is read or refused, and nothing else happens."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="children are watched as on Linux")


@pytest.mark.parametrize(
    "count", [240, pytest.param(10_000, marks=pytest.mark.long)], ids=["short", "full"]
)
def test_damaged_files_are_read_or_refused(tmp_path: Path, count: int) -> None:
    from tests.fuzzing import TARGETS, run_cases

    report = run_cases(tmp_path, count)
    assert not report.failures, "\n".join(report.failures.values())
    names = {target.name for target in TARGETS}
    assert names <= report.refused.keys(), "a reader that refuses nothing was not damaged"
    assert report.read.total() > count // 10, "damage that nothing survives tests only the door"


def test_what_is_not_damaged_is_read(tmp_path: Path) -> None:
    """All but the recipe of the samples, which tells too little to make a clip again."""
    from tests.fuzzing import TARGETS, run_cases

    report = run_cases(tmp_path, len(TARGETS), seed=None)
    assert not report.failures
    assert report.refused.keys() <= {"vidgen replay", "vidgen extend"}, report.text


def test_the_harness_sees_crashes_hangs_and_blow_ups() -> None:
    from tests.faults import ForkServer, Job
    from tests.fuzzing import Report

    report = Report()
    jobs = {
        "crashes with signal 11": Job("ctypes:string_at", (0,)),
        "hangs": Job("time:sleep", (60,), timeout_s=0.5),
        "hangs: ": Job("tests.faults:spin", cpu_s=1),
        "takes": Job("tests.faults:take", (1_200_000_000,)),
        "MemoryError": Job("tests.faults:take", (1_200_000_000,), memory=1 << 30),
        "ZeroDivisionError": Job("builtins:divmod", (1, 0)),
    }
    with ForkServer() as server:
        for number, job in enumerate(jobs.values()):
            report.add(number, server.run(job))
    assert len(report.failures) == len(jobs)
    for number, kind in enumerate(jobs):
        assert kind in report.failures[number]
