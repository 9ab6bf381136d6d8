"""Damaged files of every kind: each is read or refused, and nothing else happens."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.faults import ForkServer, Job
from tests.fuzzing import TARGETS, Report, run_cases, samples_in

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="children are watched as on Linux")


@pytest.fixture(scope="module")
def bench(
    server: ForkServer, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ForkServer, Path]:
    return server, samples_in(tmp_path_factory.mktemp("fuzz"), server)


@pytest.mark.parametrize(
    "count", [4 * len(TARGETS), pytest.param(10_000, marks=pytest.mark.long)],
    ids=["short", "full"],
)
def test_damaged_files_are_read_or_refused(bench: tuple[ForkServer, Path], count: int) -> None:
    report = run_cases(*bench, range(count))
    assert not report.failures, "\n".join(report.failures.values())
    names = {target.name for target in TARGETS}
    assert names <= report.refused.keys(), "a reader that refuses nothing was not damaged"
    assert report.read.total() > count // 10, "damage that nothing survives tests only the door"


def test_what_is_not_damaged_is_read(bench: tuple[ForkServer, Path]) -> None:
    """All but the recipe of the samples, which tells too little to make a clip again."""
    report = run_cases(*bench, range(len(TARGETS)), seed=None)
    assert not report.failures
    assert report.refused.keys() <= {"vidgen replay", "vidgen extend"}, report.text


def test_the_harness_sees_crashes_hangs_and_blow_ups(bench: tuple[ForkServer, Path]) -> None:
    report = Report()
    jobs = {
        "crashes with signal 11": Job("ctypes:string_at", (0,)),
        "hangs": Job("time:sleep", (60,), timeout_s=0.5),
        "hangs: ": Job("tests.faults:spin", cpu_s=1),
        "takes": Job("tests.faults:take", (1_200_000_000,)),
        "MemoryError": Job("tests.faults:take", (1_200_000_000,), memory=1 << 30),
        "ZeroDivisionError": Job("builtins:divmod", (1, 0)),
    }
    for number, job in enumerate(jobs.values()):
        report.add(number, bench[0].run(job))
    assert len(report.failures) == len(jobs)
    for number, kind in enumerate(jobs):
        assert kind in report.failures[number]
