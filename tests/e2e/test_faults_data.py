"""Caches of fine-tuning data: killed anywhere or short of room, they end as if nothing happened."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from tests.clips import film, moving
from tests.faults import ForkServer, Job, can_mount

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="children are watched as on Linux")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three clips."""
    folder = tmp_path_factory.mktemp("data")
    for number in range(3):
        film(folder / f"{number}.mp4", moving(9, number, (32, 32)), caption=f"a cat {number}")
    return folder


def arguments(data: Path, cache: Path, model: Path) -> list[str]:
    return ["data", "cache", str(data), "-o", str(cache), "--model", str(model), "--workers", "1"]


def content(folder: Path) -> dict[str, bytes]:
    """Files by name, without what a killed process had in hand."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and not path.name.endswith(".tmp")}


@pytest.mark.parametrize("kills", [1, pytest.param(8, marks=pytest.mark.long)])
def test_killed_at_any_change_it_goes_on(
    server: ForkServer, data: Path, tiny_model: Path, tmp_path: Path, kills: int
) -> None:
    def run(records: Path, cache: Path, number: int) -> object:
        job = Job("tests.clips:at_event", (records, number, arguments(data, cache, tiny_model)))
        outcome = server.run(job)
        assert not outcome.failure, outcome.failure
        return outcome.result

    straight = run(tmp_path / "r", tmp_path / "straight", 0)
    assert straight is not None
    assert straight[0] == 0
    expected = content(tmp_path / "straight")
    assert len(expected) == 3 + 4 + 1
    count = straight[1]
    for number in range(3, count + 1, count // kills):
        records, cache = tmp_path / f"r{number}", tmp_path / f"c{number}"
        assert run(records, cache, number) is None, "it was killed"
        assert run(records, cache, 0)[0] == 0
        assert content(cache) == expected
        shutil.rmtree(cache)


@pytest.mark.skipif(not can_mount(), reason="needs root or user namespaces to mount a small disk")
@pytest.mark.parametrize("pages", [1, 4, 7])
def test_a_full_disk_is_reported_and_nothing_is_half_written(
    server: ForkServer, data: Path, tiny_model: Path, tmp_path: Path, pages: int
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    argv = arguments(data, disk / "cache", tiny_model)
    job = Job("tests.clips:when_full", (tmp_path / "r", disk, 4096 * pages, argv))
    outcome = server.run(job)
    assert not outcome.failure, outcome.failure
    first, left, second, sizes = outcome.result
    assert (first, second) == (2, 0)
    assert "no space left" in outcome.output or "are free" in outcome.output
    assert not [name for name in left if name.endswith(".tmp") or name == "index.json"]
    assert len([name for name in sizes if name.endswith(".safetensors")]) == 3 + 4
    assert all(sizes.values())


def test_a_long_clip_takes_no_more_memory_than_a_short_one(
    server: ForkServer, tiny_model: Path, tmp_path: Path
) -> None:
    path = film(tmp_path / "a.mp4", moving(121, 0, (256, 192)), crf=30)
    grown = {}
    for num_frames in (25, 121):
        job = Job("tests.clips:encode", (str(tiny_model), path, num_frames))
        outcome = server.run(job)
        assert outcome.result == [4, 1 + (num_frames - 1) // 4, 24, 32], outcome.failure
        grown[num_frames] = outcome.grown
    pixels = (121 - 25) * 256 * 192 * 3 * 4  # of the frames between, as the VAE takes them
    assert grown[121] - grown[25] < pixels / 2  # what an allocator keeps comes to a quarter
