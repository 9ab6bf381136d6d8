"""A service under load that is killed again and again: what it promises, counted.

    python -m tests.soaking --jobs 1000 --kills 100

Clients ask for clips by the official client, whose own retries bridge the time that the service is
down. During the first half the service, or a process of its own, is killed with -9 at random
moments and started anew; the second is asked for when that is over, and the processes' memory is
watched. At the end every clip must be there, made once, and readable.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import socket
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import openai

from tests.services import Served, is_alive, wait_for
from vidgen.core.errors import VidgenError
from vidgen.media.video_reader import VideoReader

CLIENTS, AHEAD = 3, 20
VICTIMS = {"service": 3, "workers.process": 2}
"""Who is killed, and how often of five times."""
SETTLED = 4
"""Jobs after which a process has all that it keeps."""


@dataclass
class Outcome:
    """What came of it.

    Attributes:
        jobs: that were asked for.
        kills: by whom they hit.
        asked: that the queue knows; more than `jobs` were doubled, fewer lost.
        completed: of them.
        completed_twice: by the audit log.
        unreadable: clips that don't decode, or have another length.
        resumed: jobs that went on after a kill.
        growth_mb: the most that one process grew behind its first few jobs.
        watched: jobs during which it was watched.
        seconds: of it all.
    """

    jobs: int
    kills: dict[str, int] = field(default_factory=lambda: dict.fromkeys(VICTIMS, 0))
    asked: int = 0
    completed: int = 0
    completed_twice: int = 0
    unreadable: int = 0
    resumed: int = 0
    growth_mb: float = 0.0
    watched: int = 0
    seconds: float = 0.0

    @property
    def is_clean(self) -> bool:
        """Nothing lost, doubled or broken."""
        return (self.asked, self.completed) == (self.jobs, self.jobs) and not (
            self.completed_twice or self.unreadable)


def soak(model: Path, data: Path, num_jobs: int, num_kills: int, seed: int = 0) -> Outcome:
    """Run a service under load and kill it.

    Args:
        model: that it serves.
        data: its folder.
        num_jobs: clips to ask for.
        num_kills: times to kill.
        seed: of the moments and victims.
    """
    start, outcome, draw = time.monotonic(), Outcome(num_jobs), random.Random(seed)
    port = _free_port()
    with Served(model, data, "--port", str(port), "--pending", str(num_jobs + 1),
                "--per-minute", "100000") as served:
        load = _Load(served, num_jobs)
        clients = [threading.Thread(target=load.ask, daemon=True) for _ in range(CLIENTS)]
        for client in clients:
            client.start()
        memory = _Memory(served)
        for kill in range(1, num_kills + 1):
            load.wait(kill * num_jobs // (2 * (num_kills + 1)))
            time.sleep(draw.uniform(0.0, 0.5))
            victim = draw.choices(list(VICTIMS), list(VICTIMS.values()))[0]
            outcome.kills[victim] += 1
            _kill(served, victim)
        load.second_half.set()
        load.wait(num_jobs, memory.look)
        for client in clients:
            client.join()
        outcome.growth_mb, outcome.watched = round(memory.growth_mb, 1), memory.watched
        ended = served.stop()
        assert ended == 0, ended
    _count(data, outcome)
    outcome.seconds = round(time.monotonic() - start, 1)
    return outcome


class _Load:
    """Clients that ask for clips, and how many of these are there.

    Args:
        served: whom they ask.
        num_jobs: that they ask for, each with a seed of its own.

    Attributes:
        second_half: to be set when the second half may be asked for.
    """

    def __init__(self, served: Served, num_jobs: int) -> None:
        self._served, self._num_jobs = served, num_jobs
        self._seeds, self.second_half = iter(range(num_jobs)), threading.Event()
        self._lock, self._num_sent = threading.Lock(), 0
        self._refused: list[Exception] = []

    def ask(self) -> None:
        """A client that asks for one clip after the other, until none is left or one is refused."""
        client = self._served.client(max_retries=100)
        try:
            while (seed := self._next_seed()) is not None:
                self._ask_for(client, seed)
                while self._num_sent - self.num_finished() > AHEAD and (
                    self._num_sent < self._num_jobs
                ):
                    time.sleep(0.2)
        except Exception as error:
            self._refused.append(error)

    def wait(self, target: int, look: Callable[[int], None] = lambda _count: None) -> None:
        """Wait until so many clips are there, and look at how many are meanwhile."""
        def is_there() -> bool:
            assert not self._refused, self._refused
            count = self.num_finished()
            look(count)
            time.sleep(0.1)
            return count >= target

        wait_for(is_there, 3600)

    def num_finished(self) -> int:
        """Clips that are there; 0 while the service is down."""
        try:
            text = self._served.http.get("/metrics", timeout=5).text
        except Exception:
            return 0
        return sum(int(float(line.split()[-1])) for line in text.splitlines()
                   if line.startswith('vidgen_jobs{status="completed"}'))

    def _next_seed(self) -> int | None:
        with self._lock:
            seed = next(self._seeds, None)
        if seed is not None and seed >= self._num_jobs // 2:
            self.second_half.wait()
        return seed

    def _ask_for(self, client: openai.OpenAI, seed: int) -> None:
        while True:
            try:
                client.videos.create(prompt="a red car", extra_body={
                    "seed": seed, "num_frames": 5, "num_inference_steps": 2 + seed % 20})
                break
            except openai.APIConnectionError:  # its retries were too few
                time.sleep(0.5)
        with self._lock:
            self._num_sent += 1


def _kill(served: Served, victim: str) -> None:
    children = served.children()
    if victim == "service":
        served.kill()
        wait_for(lambda: not any(map(is_alive, children.values())))
        served.start()
        return
    for module, pid in children.items():
        if victim in module:
            os.kill(pid, signal.SIGKILL)


class _Memory:
    """How much the processes grow once they have made a few jobs.

    Args:
        served: whose processes they are; none of them ends any more.
    """

    def __init__(self, served: Served) -> None:
        self._served = served
        self.growth_mb, self.watched = 0.0, 0
        self._first: int | None = None
        self._settled: dict[int, float] = {}

    def look(self, count: int) -> None:
        """Measure them, once they have made a few of `count` jobs."""
        self._first = count if self._first is None else self._first
        if count - self._first < SETTLED:
            return
        self.watched = count - self._first - SETTLED
        for pid in (self._served.process.pid, *self._served.children().values()):
            status = Path(f"/proc/{pid}/status").read_text()
            size_mb = int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1000
            grown = size_mb - self._settled.setdefault(pid, size_mb)
            self.growth_mb = max(self.growth_mb, grown)


def _count(data: Path, outcome: Outcome) -> None:
    """Look into the queue, the audit log and every clip."""
    from vidgen.server.jobs import Jobs

    jobs = Jobs(data / "jobs.sqlite3")
    lines = jobs.audit()
    found, _ = jobs.page("video", "local", limit=10 * outcome.jobs)
    outcome.asked = len(found)
    assert len({job.request["seed"] for job in found}) == outcome.asked
    outcome.completed = sum(job.status == "completed" for job in found)
    ends = Counter(line["job"] for line in lines if line["action"] == "completed")
    outcome.completed_twice = sum(count > 1 for count in ends.values())
    outcome.resumed = sum(job.attempt > 1 for job in found)
    for job in found:
        try:
            with VideoReader(data / "videos" / job.id / "video.mp4") as reader:
                outcome.unreadable += sum(1 for _ in reader) != 5
        except VidgenError:
            outcome.unreadable += 1
    jobs.close()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def main() -> None:
    """Run it at any size and print what came of it."""
    from tests.models import build_tiny_model

    warnings.simplefilter("ignore", DeprecationWarning)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = build_tiny_model(Path(folder) / "tiny")
        outcome = soak(model, Path(folder) / "data", args.jobs, args.kills, args.seed)
    print(json.dumps(asdict(outcome), indent=1))


if __name__ == "__main__":
    main()
