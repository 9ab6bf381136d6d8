"""Decode uploads in a separate process, with limits on time and memory, before they are used.

A crash, a hang or a file that unpacks to gigabytes ends only that process. Run it by `python -m`
with an order as JSON on stdin; it writes a JSON object to stdout, empty if all files are valid, or
else with `text`, the reason, and `option`, the file's name.
"""

from __future__ import annotations

import json
import logging
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vidgen.core.errors import InputError, OptionError
from vidgen.core.runtime import child_environment
from vidgen.server.settings import Limits, at_most

NamedFile = tuple[str, str, str]
"""A file's name in messages, its medium or "script", and its path."""
PATIENCE_S = 120
"""Time limit for all files of a request, in seconds."""
MEMORY = 4 << 30
"""Limit of address space, in bytes."""
MAX_DEATHS = 2
"""Crashes after which a request is refused; a single one may have another cause."""
_SMALLER = "send a smaller file"
_AT_ONCE = threading.BoundedSemaphore(4)
log = logging.getLogger(__name__)


def check_uploads(files: Sequence[NamedFile], limits: Limits) -> None:
    """Decode files in a separate process.

    Raises:
        OptionError: a file is damaged, exceeds the limits, takes too long, or crashes its reader.
        RuntimeError: the process itself failed.
    """
    if not files:
        return
    order = {"files": files, "pixels": limits.input_pixels, "seconds": limits.input_seconds}
    with _AT_ONCE:
        answer = _answer(json.dumps(order).encode())
    if "text" in answer:
        raise OptionError(answer["text"], answer["option"])


def _answer(order: bytes) -> dict[str, str]:
    late = OptionError("reading the file takes too long; send it in a common format")
    for _ in range(MAX_DEATHS):
        try:
            ended = subprocess.run(
                [sys.executable, "-m", "vidgen.server.probe"], input=order, capture_output=True,
                timeout=PATIENCE_S, start_new_session=True, check=False,
                env=child_environment(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1"))
        except subprocess.TimeoutExpired:
            raise late from None
        if ended.returncode == 0:
            answer: dict[str, str] = json.loads(ended.stdout)
            return answer
        if ended.returncode > 0:
            raise RuntimeError(ended.stderr.decode(errors="replace").strip())
        died_by = signal.Signals(-ended.returncode)
        log.error("a reader of uploads was killed by %s", died_by.name)
        if died_by in (signal.SIGALRM, signal.SIGXCPU):
            raise late
    raise OptionError("the file crashes its reader; send it in another format")


def main() -> None:
    """Decode the files of the order on stdin; write the answer to stdout."""
    order = json.load(sys.stdin.buffer)
    _limit()
    answer = {}
    try:
        for name, content, path in order["files"]:
            answer["option"] = name
            _CHECKS[content](name, Path(path), order)
    except InputError as error:
        answer["text"] = str(error)
    except MemoryError:
        answer["text"] = f"reading the file takes more than {MEMORY >> 30} GiB; {_SMALLER}"
    json.dump(answer if "text" in answer else {}, sys.stdout)


def _limit() -> None:
    """Limit this process, so that it ends even after its parent has died."""
    signal.alarm(PATIENCE_S)
    for kind, limit in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CPU, 4 * PATIENCE_S),
                        (resource.RLIMIT_CORE, 0)):
        with suppress(OSError, ValueError):  # not supported, or a lower limit exists
            resource.setrlimit(kind, (limit, limit))


def _check_picture(name: str, path: Path, limits: dict[str, Any]) -> None:
    from PIL import Image

    from vidgen.media.read import decoding

    with decoding(name, "save it again"), Image.open(path) as image:
        at_most(f"pixels of {name}", image.width * image.height, limits["pixels"], _SMALLER)
        image.load()


def _check_streams(name: str, path: Path, limits: dict[str, Any]) -> None:
    from vidgen.media.probe import probe
    from vidgen.media.sound import SoundReader
    from vidgen.media.video_reader import VideoReader

    facts = probe(path)
    for stream in facts["streams"]:
        area = stream.get("width", 0) * stream.get("height", 0)
        at_most(f"pixels of {name}", area, limits["pixels"], _SMALLER)
    at_most(f"seconds of {name}", facts.get("duration_s") or 0.0, limits["seconds"],
            "send a shorter file")
    with _damage_allowed(), VideoReader(path) as reader:
        for _ in reader:
            pass
    with _damage_allowed():
        for _ in SoundReader(path):
            pass


@contextmanager
def _damage_allowed() -> Iterator[None]:
    """Suppress errors except lack of memory: the plan reports damage where it matters."""
    try:
        yield
    except InputError as error:
        if isinstance(error.__cause__, MemoryError):
            raise error.__cause__ from None


def _check_font(_name: str, path: Path, _limits: dict[str, Any]) -> None:
    from PIL import ImageFont

    with suppress(OSError):
        ImageFont.truetype(str(path), 16).getbbox("vidgen")


def _check_script(_name: str, path: Path, _limits: dict[str, Any]) -> None:
    from vidgen.core.config_file import load_yaml

    load_yaml(path, "script")


_CHECKS = {"picture": _check_picture, "video": _check_streams, "sound": _check_streams,
           "font": _check_font, "script": _check_script}

if __name__ == "__main__":
    main()
