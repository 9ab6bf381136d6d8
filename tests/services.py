"""`vidgen serve` as a real process, and clients of it."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI
from PIL import Image

PATIENCE_S = 120.0
SCRIPT = """
version: 1
shots:
  - {id: one, prompt: a red car, frames: 9}
  - {id: two, prompt: a cat moves left, frames: 9, transition: cut}
"""


class Served:
    """A service on this machine; killed at the end of the `with` block, if it still runs.

    Args:
        model: the folder it serves.
        data: its own folder.
        options: of the command line.
        key: that clients send.
        prepare: called in the new process before it begins.
    """

    def __init__(
        self, model: Path, data: Path, *options: str, key: str = "none",
        prepare: Callable[[], None] | None = None,
    ) -> None:
        self.data, self.key, self._prepare = data, key, prepare
        self._command = [
            sys.executable, "-m", "vidgen", "serve", "--model", str(model), "--data", str(data),
            "--port", "0", "--events", str(data.with_suffix(".events")), *options,
        ]
        self.start()

    def start(self) -> None:
        """Start it, or start it anew, and wait until it answers."""
        events = self.data.with_suffix(".events")
        events.unlink(missing_ok=True)
        log = self.data.with_suffix(".log").open("ab")
        self.process = subprocess.Popen(
            self._command, stderr=log, stdout=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"}, preexec_fn=self._prepare,  # noqa: PLW1509
        )
        log.close()
        wait_for(lambda: (events.is_file() and "ready" in events.read_text()) or self._check())
        self.url = json.loads(events.read_text().splitlines()[0])["url"]
        self.http = httpx.Client(
            base_url=self.url, timeout=60, headers={"Authorization": f"Bearer {self.key}"},
            trust_env=False,
        )

    def _check(self) -> bool:
        assert self.process.poll() is None, self.data.with_suffix(".log").read_text()[-3000:]
        return False

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def client(self, **options: Any) -> OpenAI:
        """The official client."""
        return OpenAI(base_url=f"{self.url}/v1", api_key=self.key,
                      http_client=httpx.Client(trust_env=False), **options)

    def kill(self) -> None:
        """End it as kill -9 does."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """End it as an operator does; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE_S)

    def children(self) -> dict[str, int]:
        """Process ids of the service's own processes, by their modules."""
        found = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                words = stat.read_text().rpartition(")")[2].split()
                command = (stat.parent / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if int(words[1]) == self.process.pid and len(command) > 2 and command[2]:
                found[command[2].decode()] = int(stat.parent.name)
        return found

    def video(self, video_id: str) -> dict[str, Any]:
        """A clip as it stands."""
        return self.http.get(f"/v1/videos/{video_id}").json()

    def create(self, prompt: str = "a red car", **fields: Any) -> dict[str, Any]:
        """Ask for a clip."""
        answer = self.http.post("/v1/videos", json={"prompt": prompt, **fields})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def finished(self, job_id: str) -> dict[str, Any]:
        """A job once it is finished."""
        room = "films" if job_id.startswith("film_") else "videos"
        found: dict[str, Any] = {}

        def is_done() -> bool:
            found.update(self.http.get(f"/v1/{room}/{job_id}").json())
            return found["status"] in ("completed", "failed")

        wait_for(is_done)
        return found

    def events(self, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Server-sent events: name and data."""
        with self.http.stream("GET", path, timeout=PATIENCE_S) as answer:
            assert answer.status_code == 200
            name = ""
            for line in answer.iter_lines():
                if line.startswith("event: "):
                    name = line.removeprefix("event: ")
                elif line.startswith("data: "):
                    yield name, json.loads(line.removeprefix("data: "))


def wait_for(
    is_true: Callable[[], bool], patience_s: float = PATIENCE_S, every_s: float = 0.05
) -> None:
    """Wait until something holds."""
    until = time.monotonic() + patience_s
    while not is_true():
        assert time.monotonic() < until, "it never came true"
        time.sleep(every_s)


def is_alive(pid: int) -> bool:
    """Whether one of the service's own processes is still there."""
    try:
        return b"vidgen.server" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def png(width: int = 64, height: int = 64, colour: tuple[int, int, int] = (200, 30, 30)) -> bytes:
    """A picture's file."""
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, "PNG")
    return file.getvalue()


def refused(
    served: Served, status: int, code: str, param: str | None = None, **request: Any
) -> str:
    """The message of a request that has to be refused so; `path` is where it goes."""
    answer = served.http.post(request.pop("path", "/v1/videos"), **request)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["code"] == code, error
    assert set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in answer.text
    assert param is None or error["param"] == param, error
    return str(error["message"])
