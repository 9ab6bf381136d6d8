"""Measure how many clips a minute a warm service makes, and what it adds to the engine's own time.

    python eval/serving.py --clips 10 -o serving.json
    python eval/serving.py --model models/Wan2.1-T2V-1.3B --clips 2 -o wan.json

A service is started on its own port with a folder of its own, makes one clip to be warm, then
the others one after the other, as a client sees it: from the request to the file's last byte.
`overhead_s` is what that takes beyond the time that the engine tells of.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from vidgen.core.errors import VidgenError, exit_code
from vidgen.core.runtime import atomic_write, fingerprint

POLL_S = 0.05
PROMPT = "a red car bounces across the desert"


def call(url: str, body: dict[str, Any] | None = None) -> bytes:
    """An answer's content."""
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(url, data, {"Content-Type": "application/json"}), timeout=600) as answer:
        content: bytes = answer.read()
        return content


def make_clip(url: str, seed: int) -> tuple[float, float]:
    """Seconds until a clip's last byte is here, and those that the engine took."""
    start = time.monotonic()
    video = json.loads(call(f"{url}/v1/videos", {"prompt": PROMPT, "seed": seed}))
    while video["status"] in ("queued", "in_progress"):
        time.sleep(POLL_S)
        video = json.loads(call(f"{url}/v1/videos/{video['id']}"))
    if video["status"] == "failed":
        raise VidgenError(f"the service failed: {video['error']['message']}")
    call(f"{url}/v1/videos/{video['id']}/content")
    return time.monotonic() - start, video["inference_time_s"]


def start(model: str, folder: Path) -> tuple[subprocess.Popen[bytes], str, float]:
    """A service, its address, and the seconds until it answers."""
    events, began = folder / "events", time.monotonic()
    service = subprocess.Popen(
        [sys.executable, "-m", "vidgen", "serve", "--model", model, "--port", "0", "--data",
         str(folder / "data"), "--events", str(events)], stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL)
    while not (events.is_file() and events.read_text().count("\n")):
        if service.poll() is not None:
            raise VidgenError(f"vidgen serve --model {model} left with {service.returncode}")
        time.sleep(POLL_S)
    url = json.loads(events.read_text().splitlines()[0])["url"]
    return service, url, time.monotonic() - began


def run(args: argparse.Namespace) -> None:
    """Start, warm, measure, write."""
    with tempfile.TemporaryDirectory() as folder:
        service, url, answers_s = start(args.model, Path(folder))
        try:
            first_s, _ = make_clip(url, 0)
            took = [make_clip(url, seed) for seed in range(1, args.clips + 1)]
        finally:
            service.terminate()
            service.wait()
    median_s = statistics.median(each for each, _ in took)
    result = {
        "model": args.model, "clips": args.clips, "clips_per_minute": round(60 / median_s, 2),
        "median_s": round(median_s, 3), "answers_s": round(answers_s, 3),
        "first_clip_s": round(first_s, 3),
        "overhead_s": round(statistics.median(all_s - own_s for all_s, own_s in took), 3),
        "seconds": [round(each, 3) for each, _ in took], "machine": fingerprint(),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if args.output:
        atomic_write(args.output, text.encode())


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="toybox")
    parser.add_argument("--clips", type=int, default=10)
    parser.add_argument("-o", "--output")
    run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(exit_code(main))
