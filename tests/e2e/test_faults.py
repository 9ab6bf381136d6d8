"""Killed, starved of disk, forbidden to write, damaged: what is made is whole or not there.

Every clip that was begun is finished by `--resume`, and decodes to the frames of one that was never
disturbed; or it is refused with the reason.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.faults import ForkServer, Job, Outcome, can_mount
from tests.mutations import mutate
from vidgen.media.clip import Clip

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="children are watched as on Linux")
PROMPT = "a red car bounces across the desert"
JOB = "x.mp4.vidgen-job"


def sizes(short: int, full: int) -> list[Any]:
    return [pytest.param(short, id="short"), pytest.param(full, id="full", marks=pytest.mark.long)]


@dataclass
class Bench:
    """A command line, and what comes of it where nothing happens.

    Attributes:
        frames: of the clip.
        num_changes: how often it changes the file system.
        seconds: it takes.
    """

    server: ForkServer
    argv: list[str]
    frames: bytes = b""
    num_changes: int = 0
    seconds: float = 0.0

    def run(self, folder: Path, *more: str, **limits: Any) -> Outcome:
        """Run the command in a folder."""
        job = Job("tests.faults:command", ([*self.argv, *more],), folder, **limits)
        return self.server.run(job)

    def kill_at(self, folder: Path, change: int, *more: str, once: str = "") -> Outcome:
        """Run the command until just before a change to the file system."""
        job = Job("tests.faults:at_event", (change, [*self.argv, *more], once), folder)
        return self.server.run(job)

    def finish(self, folder: Path, *more: str) -> None:
        """Resume, and find the same frames and nothing else."""
        done = self.run(folder, "--resume", *more)
        assert (done.result, done.failure) == (0, ""), done.output
        self.check(folder)
        names = {path.name for path in folder.iterdir()}
        assert names == {"x.mp4"} | (names & {"in.png"})

    def check(self, folder: Path) -> None:
        """The output holds the frames of an undisturbed one."""
        clip = Clip.from_file(folder / "x.mp4")
        assert clip.frames.tobytes() == self.frames
        assert clip.recipe is not None


def make_bench(server: ForkServer, model: Path, folder: Path, frames: int) -> Bench:
    argv = ["generate", PROMPT, "--model", str(model), "--seed", "7", "--frames", str(frames),
            "--steps", "3", "--dtype", "fp32", "-o", "x.mp4"]  # fmt: skip
    bench = Bench(server, argv)
    bench.seconds = bench.run(folder, "--overwrite").seconds
    code, bench.num_changes = bench.kill_at(folder, 0, "--overwrite").result
    assert code == 0
    return replace(bench, frames=Clip.from_file(folder / "x.mp4").frames.tobytes())


@pytest.fixture(scope="module")
def bench(server: ForkServer, tiny_model: Path, tmp_path_factory: Any) -> Bench:
    """A clip in one piece."""
    return make_bench(server, tiny_model, tmp_path_factory.mktemp("straight"), 17)


@pytest.fixture(scope="module")
def windows(server: ForkServer, tiny_model: Path, tmp_path_factory: Any) -> Bench:
    """A clip beyond what the model knows, made in windows."""
    return make_bench(server, tiny_model, tmp_path_factory.mktemp("straight"), 33)


def fails_cleanly(outcome: Outcome, *words: str) -> None:
    assert outcome.result == 2, outcome.failure or outcome.output
    assert "error: " in outcome.output
    assert "Traceback" not in outcome.output
    for word in words:
        assert word in outcome.output


@pytest.mark.parametrize("count", sizes(8, 250))
def test_killed_before_a_change_to_the_disk(
    bench: Bench, windows: Bench, tmp_path: Path, count: int
) -> None:
    """Spread over all of them; one in four is killed a second time, while it goes on."""
    rng = random.Random(count)
    for index in range(count):
        bench, windows = windows, bench
        folder = tmp_path / str(index)
        folder.mkdir()
        change = 1 + (index * bench.num_changes) // count
        assert bench.kill_at(folder, change).signal == signal.SIGKILL
        if (folder / "x.mp4").exists():
            bench.check(folder)
        if index % 4 == 0:
            bench.kill_at(folder, rng.randint(1, bench.num_changes), "--resume")
        bench.finish(folder)


@pytest.mark.parametrize("count", sizes(6, 250))
def test_killed_at_any_time(bench: Bench, windows: Bench, tmp_path: Path, count: int) -> None:
    rng, killed = random.Random(count), 0
    for index in range(count):
        bench, windows = windows, bench
        folder = tmp_path / str(index)
        folder.mkdir()
        for more in ((), ("--resume",)):
            at = rng.uniform(0, bench.seconds)
            killed += bench.run(folder, *more, kill_after_s=at).signal == signal.SIGKILL
            if (folder / "x.mp4").exists():
                bench.check(folder)
        bench.finish(folder)
    assert killed >= count // 2


@pytest.mark.parametrize("count", sizes(6, 10))
def test_killed_processes_go_on(windows: Bench, tmp_path: Path, count: int) -> None:
    """Real processes of one clip: half of them killed while it is sampled, half while written."""
    straight, argv = tmp_path / "straight", [*windows.argv, "--steps", "8"]
    straight.mkdir()
    rng, job, killed = random.Random(0), Job("vidgen.cli.main:main", (argv,), straight), 0
    assert windows.server.run(job).result == 0
    for attempt in range(count):
        process = subprocess.Popen(
            [sys.executable, "-m", "vidgen", *argv, "--resume", "--events", "-"],
            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert process.stdout is not None
        lines = rng.randint(1, 6)
        for line in process.stdout:
            lines -= 1
            if '"write ' in line or (attempt < count // 2 and lines == 0):
                break
        time.sleep(rng.uniform(0, 0.02))
        process.kill()
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
    assert killed > count // 2
    job = Job("vidgen.cli.main:main", ([*argv, "--resume"],), tmp_path)
    assert windows.server.run(job).result == 0
    replace(windows, frames=Clip.from_file(straight / "x.mp4").frames.tobytes()).check(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"x.mp4", "straight"}


def test_a_full_disk_leaves_nothing_half_written(bench: Bench, tmp_path: Path) -> None:
    """Whichever file is too large: the output may still fit where the journal doesn't."""
    codes = set()
    for index, limit in enumerate((2000, 3000, 9000, 15_000, 20_000, 10_000_000)):
        folder = tmp_path / str(index)
        folder.mkdir()
        done = bench.run(folder, file_bytes=limit)
        codes.add(done.result)
        if done.result == 0:
            bench.check(folder)
            assert [path.name for path in folder.iterdir()] == ["x.mp4"]
            continue
        fails_cleanly(done, "no space left for x.mp4")
        assert {path.name for path in folder.iterdir()} <= {JOB}
        bench.finish(folder)
    assert codes == {0, 2}


@pytest.mark.skipif(not can_mount(), reason="needs root or user namespaces to mount a small disk")
@pytest.mark.parametrize("all_pages", [
    pytest.param((1, 4, 8, 20), id="short"),
    pytest.param((0, 1, 2, 4, 6, 8, 12, 20, 40), id="full", marks=pytest.mark.long),
])
def test_a_small_disk_that_grows_is_gone_on_with(
    bench: Bench, tmp_path: Path, all_pages: tuple[int, ...]
) -> None:
    for pages in all_pages:
        job = Job("tests.faults:when_full", (tmp_path, 4096 * max(pages, 1), bench.argv))
        done = bench.server.run(job)
        assert not done.failure, done.failure
        first, left, second, content = done.result
        assert second == 0, done.output
        assert first in (0, 2)
        assert "Traceback" not in done.output
        assert ("x.mp4" in left) == (first == 0)
        assert not [name for name in left if name.endswith(".tmp")]
        (tmp_path / "x.mp4").write_bytes(content)
        bench.check(tmp_path)


def test_a_folder_that_may_not_be_written_is_refused(bench: Bench, tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    done = bench.run(tmp_path, obey_permissions=True)
    fails_cleanly(done, "x.mp4 can't be written", "Permission denied")
    assert list(tmp_path.iterdir()) == []
    tmp_path.chmod(0o755)


@pytest.fixture
def killed(bench: Bench, tmp_path: Path) -> Path:
    """A job with finished latents and a segment."""
    return killed_after(bench, tmp_path, "segments/00000.safetensors")


def killed_after(bench: Bench, folder: Path, made: str, *more: str) -> Path:
    outcome = bench.kill_at(folder, 1, *more, once=f"{JOB}/{made}")
    assert outcome.signal == signal.SIGKILL, outcome.output
    assert (folder / JOB / made).exists()
    return folder


def test_a_journal_that_may_not_be_written_costs_only_the_journal(
    bench: Bench, killed: Path
) -> None:
    (killed / JOB / "segments").chmod(0o555)
    (killed / JOB).chmod(0o555)
    done = bench.run(killed, "--resume", obey_permissions=True)
    (killed / JOB).chmod(0o755)
    (killed / JOB / "segments").chmod(0o755)
    assert "Traceback" not in done.output
    assert done.result in (0, 2)
    if done.result == 0:
        bench.check(killed)
    else:
        bench.finish(killed)


@pytest.mark.parametrize("count", sizes(6, 300))
def test_a_damaged_journal_is_refused_or_does_no_harm(
    bench: Bench, killed: Path, count: int
) -> None:
    rng, refused = random.Random(count), 0
    template = killed / JOB
    names = sorted(path for path in template.rglob("*") if path.suffix in (".json", ".safetensors"))
    assert len(names) == 3
    for index in range(count):
        folder = killed / str(index)
        shutil.copytree(template, folder / JOB)
        victim = folder / JOB / names[index % len(names)].relative_to(template)
        other = rng.choice(names).read_bytes()
        victim.write_bytes(mutate(victim.read_bytes(), victim.name, other, rng))
        jobs = bench.server.run(Job("tests.faults:command", (["jobs", "--json"],), folder))
        assert jobs.result == 0, jobs.output
        assert len(json.loads(jobs.output)) == 1
        done = bench.run(folder, "--resume")
        if done.result == 0:
            bench.check(folder)
            continue
        refused += 1
        fails_cleanly(done, str(victim.relative_to(folder)))
        anew = bench.run(folder, "--overwrite")
        assert anew.result == 0, anew.output
        bench.check(folder)
    assert refused > count // 2


def test_another_request_or_model_is_refused(bench: Bench, killed: Path, tmp_path: Path) -> None:
    model = bench.argv[bench.argv.index("--model") + 1]
    fails_cleanly(bench.run(killed, "--resume", "--steps", "4"), "num_steps was 3, is 4")
    fails_cleanly(bench.run(killed), "--resume")
    shutil.copytree(model, tmp_path / "model")
    weights = tmp_path / "model" / "vae" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1000] ^= 64
    weights.write_bytes(content)
    other = bench.run(killed, "--resume", "--model", str(tmp_path / "model"))
    fails_cleanly(other, "model.safetensors")
    shutil.rmtree(tmp_path / "model")
    bench.finish(killed)


def test_an_input_that_changed_is_refused(bench: Bench, tmp_path: Path) -> None:
    from PIL import Image

    picture = tmp_path / "in.png"
    Image.new("RGB", (32, 32), "red").save(picture)
    given = picture.read_bytes()
    killed_after(bench, tmp_path, "state.safetensors", "--image", "in.png")
    Image.new("RGB", (32, 32), "blue").save(picture)
    fails_cleanly(bench.run(tmp_path, "--resume", "--image", "in.png"), "inputs")
    picture.write_bytes(given[:40])
    fails_cleanly(bench.run(tmp_path, "--resume", "--image", "in.png"), "in.png")
    picture.unlink()
    fails_cleanly(bench.run(tmp_path, "--resume", "--image", "in.png"), "in.png does not exist")
    picture.write_bytes(given)
    assert bench.run(tmp_path, "--resume", "--image", "in.png").result == 0
