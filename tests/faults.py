"""Faults on demand: jobs in forked children that are killed, starved, or kept from writing.

A server process imports everything once and forks a child for each job, so that a job costs
milliseconds, a crash of the child is seen, and killing it is a real SIGKILL. `at_event` kills more
exactly than a clock can: before the n-th change that a job makes to the file system.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import resource
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from pkgutil import walk_packages
from typing import Any

import vidgen

ROOT = Path(__file__).parents[1]
CHANGES = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "os.link"}
"""Python's audit events of changes beside opening a file to write."""
_CLONE_NEWNS, _CLONE_NEWUSER = 0x20000, 0x10000000
_MS_REMOUNT, _MS_REC, _MS_PRIVATE = 0x20, 0x4000, 1 << 18
_CAPABILITY_V3 = 0x20080522


@dataclass(frozen=True)
class Job:
    """A call in a child of its own.

    Args:
        call: `module:function`, of picklable arguments and result.
        args: for it.
        folder: the child's working directory.
        kill_after_s: when to send SIGKILL; None: never.
        timeout_s: after this wall time it counts as hanging, and is killed.
        cpu_s: after this processor time it counts as hanging, and is killed.
        memory: bytes of address space it may take beside what it is born with.
        file_bytes: largest file it may write, beyond which a write fails as on a full disk.
        obey_permissions: root loses the right to write where permission bits forbid it.
    """

    call: str
    args: tuple[Any, ...] = ()
    folder: Path = ROOT
    kill_after_s: float | None = None
    timeout_s: float = 60.0
    cpu_s: int | None = None
    memory: int | None = None
    file_bytes: int | None = None
    obey_permissions: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    Attributes:
        result: what the call returned, None if it didn't.
        signal: what ended it, 0 if it left by itself.
        hung: whether it ran into `timeout_s` or `cpu_s`.
        failure: traceback of what it raised.
        output: what it printed.
        grown: bytes of memory it took at its peak beside what it was born with.
        seconds: wall time.
    """

    result: Any
    signal: int
    hung: bool
    failure: str
    output: str
    grown: int
    seconds: float


class ForkServer:
    """The process that forks; one job at a time."""

    def __enter__(self) -> ForkServer:
        ours, theirs = Pipe()
        self._connection = ours
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults", str(theirs.fileno())],
            pass_fds=[theirs.fileno()], cwd=ROOT, stdin=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        theirs.close()
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._process.wait(timeout=60)

    def run(self, job: Job) -> Outcome:
        """Run a job to its end, of whatever kind."""
        self._connection.send(job)
        outcome: Outcome = self._connection.recv()
        return outcome


def command(argv: list[str]) -> int:
    """A command line of `vidgen` as a job; returns its exit code.

    Its journal is kept after every step and every segment of 16 frames, so that there is more to
    be killed in.
    """
    from vidgen.cli.main import main
    from vidgen.media import write
    from vidgen.pipeline.journal import journal

    journal.PATIENCE, write.SEGMENT = 0, 16
    return main(argv)


def when_full(folder: Path, room: int, argv: list[str]) -> tuple[int, list[str], int, bytes]:
    """A command line on a disk of `room` bytes, and again with --resume once it has grown.

    Returns:
        Exit code and files that were left, exit code and content of x.mp4 after resuming.
    """
    mount(folder, room)
    os.chdir(folder)
    first, left = command(argv), [path.name for path in folder.rglob("*") if path.is_file()]
    mount(folder, 1 << 30, again=True)
    second = command([*argv, "--resume"])
    return first, left, second, Path("x.mp4").read_bytes()


def at_event(number: int, argv: list[str], once: str = "") -> tuple[int, int]:
    """A command line that is killed before its `number`-th change to the file system.

    Args:
        number: counted from 1.
        argv: the command line.
        once: only changes count that come when this path exists.

    Returns:
        Exit code and number of changes, where there were fewer.
    """
    count = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if event == "open" and isinstance(args[2], int):
            writes = bool(args[2] & (os.O_RDWR | os.O_WRONLY))
        else:
            writes = event in CHANGES
        if not writes or not Path(once).exists():
            return
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return command(argv), count


def spin() -> None:
    """Work for ever."""
    while True:
        pass


def take(num_bytes: int) -> None:
    """Use memory."""
    assert bytearray(b"x") * num_bytes


def can_mount() -> bool:
    """Whether a child may mount a disk of its own: as root, or where user namespaces are open."""
    done = subprocess.run(
        [sys.executable, "-c", "from tests import faults; faults.mount(faults.Path('/mnt'), 4096)"],
        cwd=ROOT, capture_output=True, check=False,
    )
    return done.returncode == 0


def mount(folder: Path, size: int, *, again: bool = False) -> None:
    """Mount a disk of `size` bytes in memory, seen by this process alone; or change its size."""
    libc = ctypes.CDLL(None, use_errno=True)
    group, user = os.getgid(), os.getuid()
    options = f"size={size}".encode()

    def call(function: Callable[..., int], *args: Any) -> None:
        if function(*args):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    if again:
        return call(libc.mount, b"none", os.fsencode(folder), b"tmpfs", _MS_REMOUNT, options)
    try:
        call(libc.unshare, _CLONE_NEWNS)
    except PermissionError:
        call(libc.unshare, _CLONE_NEWNS | _CLONE_NEWUSER)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    call(libc.mount, b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
    call(libc.mount, b"none", os.fsencode(folder), b"tmpfs", 0, options)


def _drop_privileges() -> None:
    """Take all capabilities from this process; root then obeys permission bits like anyone."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_V3, 0)
    if ctypes.CDLL(None).capset(header, (ctypes.c_uint32 * 6)()):
        raise PermissionError("capabilities can't be dropped")


def _pages(name: str) -> int:
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.split(f"{name}:")[1].split()[0])


def _work(job: Job, result: int) -> None:
    """In the child: take the job's limits, run it, hand over what it returned."""
    os.chdir(job.folder)
    if job.obey_permissions:
        _drop_privileges()
    limits = {resource.RLIMIT_CORE: 0, resource.RLIMIT_CPU: job.cpu_s,
              resource.RLIMIT_FSIZE: job.file_bytes,
              resource.RLIMIT_AS: job.memory and job.memory + _pages("VmSize")}  # fmt: skip
    module, _, function = job.call.partition(":")
    call = getattr(import_module(module), function)
    for which, limit in limits.items():
        if limit is not None:
            resource.setrlimit(which, (limit, resource.getrlimit(which)[1]))
    try:
        answer = pickle.dumps((call(*job.args), ""))
    except BaseException:  # whatever it was, it is told
        answer = pickle.dumps((None, traceback.format_exc()))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.getrlimit(resource.RLIMIT_FSIZE)[1],) * 2)
    os.pwrite(result, answer, 0)


def _fork(job: Job) -> Outcome:
    output, result = os.memfd_create("output"), os.memfd_create("result")
    born, start = _pages("RssAnon"), time.monotonic()  # a fork shares these at once
    pid = os.fork()
    if pid == 0:
        try:
            os.dup2(output, 1)
            os.dup2(output, 2)
            _work(job, result)
            sys.stdout.flush()
            sys.stderr.flush()
        except BaseException:
            os.write(output, traceback.format_exc().encode())
            os._exit(1)
        os._exit(0)
    hung = _await(pid, job)
    _, status, usage = os.wait4(pid, 0)
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    answer, failure = None, ""
    with suppress(EOFError), os.fdopen(result, "rb") as file:
        answer, failure = pickle.load(file)
    with os.fdopen(output, "r+b") as file:
        file.seek(0)
        text = file.read().decode(errors="replace")
    if not number and os.waitstatus_to_exitcode(status):
        failure = failure or text
    return Outcome(
        answer, number, hung or number == signal.SIGXCPU, failure, text,
        max(0, 1024 * usage.ru_maxrss - born), time.monotonic() - start,
    )


def _await(pid: int, job: Job) -> bool:
    """Wait for a child, or kill it when it is time; says whether it was for hanging."""
    handle = os.pidfd_open(pid)
    try:
        wait = job.timeout_s if job.kill_after_s is None else job.kill_after_s
        if select.select([handle], [], [], wait)[0]:
            return False
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        return job.kill_after_s is None
    finally:
        os.close(handle)


def serve(connection: Connection) -> None:
    """Fork a child for each job that comes, until the other side closes."""
    modules = (found.name for found in walk_packages(vidgen.__path__, "vidgen."))
    for name in ("tests.fuzzing", *modules):
        if name != "vidgen.__main__":
            import_module(name)
    with suppress(EOFError):
        while True:
            connection.send(_fork(connection.recv()))
    os._exit(0)  # without the seconds it takes to take down what was imported


if __name__ == "__main__":
    # Jobs are pickled as this module's, not as __main__'s.
    import_module("tests.faults").serve(Connection(int(sys.argv[1])))
