"""Starts of this repository's programs without the seconds of importing torch, by forking.

`start_warm` lets `subprocess.Popen` fork `python -m PROGRAM` from a process, the stem, that has
imported all of `vidgen`. The new process is a child of its parent, with the command line, working
directory, environment and files of a real start; a program that starts others has a stem of its
own. Starts with another environment for libraries or a `preexec_fn` stay real ones.
"""

from __future__ import annotations

import atexit
import ctypes
import fcntl
import gc
import os
import pickle
import runpy
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from itertools import chain
from pathlib import Path
from pkgutil import walk_packages
from typing import Any, NoReturn

ROOT = Path(__file__).parents[1]
HARNESS = frozenset({"tests.faults", "tests.impatient", "tests.ranks"})
PRODUCT = frozenset({
    "vidgen", "vidgen.pipeline.workers.process", "torch.distributed.run", "eval.toybox",
    "deepspeed.launcher.runner", "deepspeed.launcher.launch", "train.toybox.dit",
    "train.toybox.vae", "train/finetune.py",
})  # fmt: skip
STARTERS = {"vidgen", "torch.distributed.run", "deepspeed.launcher.runner",
            "deepspeed.launcher.launch", "eval.toybox"}  # fmt: skip
"""Programs that start others."""
ZERO = ("deepspeed", "torch._inductor.compile_fx", "torch._functorch.partitioners", "networkx")
LIBRARIES = {
    "": ("torch.distributed.tensor", "torch.distributed.fsdp", "uvicorn"),
    "torch.distributed.run": ("torch.distributed.run",), "vidgen train": ("peft",),
    "deepspeed.launcher.runner": ("deepspeed.launcher.runner", "deepspeed.launcher.launch", *ZERO),
    "train/finetune.py": ("peft",), "train.toybox.vae": ("train.toybox.vae",),
    "train.toybox.dit": ("train.toybox.dit",), "eval.toybox": ("eval.toybox.judge",),
    "tests.faults": ("tests.fuzzing",),
    "tests.ranks": ("tests.ranks", "tests.velocity", *ZERO),
}
"""Imported before the first program is forked, and before the first with these words."""
AT_IMPORT = ("GOMP", "HF_", "KMP", "LANG", "LC_", "LD_", "MKL", "OMP", "OPENBLAS", "PYTHON",
             "TRANSFORMERS", "VIDGEN_NATIVE")  # fmt: skip
"""Beginnings of environment variables that libraries read as they are imported."""
ROOM = 8192
"""Bytes that a stem keeps for command lines."""
_PR_SET_CHILD_SUBREAPER = 36
_REAL = subprocess.Popen._execute_child
_libc = ctypes.CDLL(None, use_errno=True)


class Stem:
    """This process's side of the stem, which is started with the first program.

    Args:
        programs: that are forked.
        link: to a stem that runs; None: start one.
    """

    def __init__(self, programs: frozenset[str], link: socket.socket | None) -> None:
        self._programs, self._link = programs, link
        self._owner, self._lock = os.getpid(), threading.Lock()
        self._environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.is_paused = False

    def can_start(self, args: Any, env: dict[str, str] | None) -> bool:
        """Whether a command line may be forked."""
        if self.is_paused or os.getpid() != self._owner or not isinstance(args, list | tuple):
            return False
        words = [os.fspath(word) for word in args]
        if words[:1] != [sys.executable] or _split(words)[0] not in self._programs:
            return False
        return _read_at_import(env or os.environ) == _read_at_import(self._environment)

    def start(
        self, args: list[str], cwd: str | None, env: dict[str, str], files: dict[int, int],
        *, new_session: bool,
    ) -> int:
        """Fork a program, with `files` (ours by their numbers there); returns its process id."""
        order = pickle.dumps((args, cwd or str(Path.cwd()), env, list(files), new_session))
        with self._lock:
            if self._link is None:
                self._link = _start_stem(self._environment)
            _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)  # the process between is to leave it to us
            try:
                socket.send_fds(self._link, [order], list(files.values()))
                return int(self._link.recv(64))
            finally:
                _libc.prctl(_PR_SET_CHILD_SUBREAPER, 0)


_stem: Stem | None = None


def start_warm(programs: frozenset[str], link: socket.socket | None = None) -> None:
    """Fork some programs from here on."""
    global _stem  # noqa: PLW0603
    _stem = Stem(programs, link)
    subprocess.Popen._execute_child = _execute_child


@contextmanager
def cold() -> Iterator[None]:
    """Start programs as users do, inside."""
    before = _stem is not None and _stem.is_paused
    if _stem is not None:
        _stem.is_paused = True
    yield
    if _stem is not None:
        _stem.is_paused = before


def _split(words: list[str]) -> tuple[str, list[str]]:
    """The program of `python [-u] [-m] PROGRAM ...` and what follows it; "" of another line."""
    rest = words[2:] if words[1:2] == ["-u"] else words[1:]
    rest = rest[1:] if rest[:1] == ["-m"] else rest
    return (rest[0], rest[1:]) if rest else ("", [])


def _read_at_import(env: Any) -> dict[str, str]:
    return {name: value for name, value in env.items()
            if name.startswith(AT_IMPORT) and name != "PYTHONPATH"}


def _execute_child(self: Any, *given: Any) -> None:
    """Stand for the method of `Popen`, with its arguments."""
    args, executable, preexec_fn, close_fds, pass_fds, cwd, env, _, _, shell = given[:10]
    pipes, (_, gid, gids, uid, umask, new_session, group) = given[10:16], given[16:]
    usual = (None, None, True, False, None, None, None, -1, -1)
    assert _stem is not None
    if (executable, preexec_fn, close_fds, shell, gid, gids, uid, umask, group) != usual or (
        not _stem.can_start(args, env)
    ):
        _REAL(self, *given)
        return
    files = {number: number if pipe == -1 else pipe
             for number, pipe in enumerate((pipes[0], pipes[3], pipes[5]))}
    files |= {number: number for number in pass_fds}
    self.pid = _stem.start([os.fspath(word) for word in args], cwd and os.fspath(cwd),
                           dict(os.environ if env is None else env), files, new_session=new_session)
    self._child_created = True
    self._close_pipe_fds(*pipes)


def _start_stem(environment: dict[str, str]) -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        subprocess.Popen(
            [sys.executable, "-m", "tests.warm", str(theirs.fileno()), "." * ROOM], cwd=ROOT,
            pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
            env={**environment, "OPENBLAS_NUM_THREADS": "1"},  # one thread, which is forked
        )
    return ours


def _serve(link: socket.socket) -> NoReturn:
    """Fork a program for each order, until the other side is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _show([])
    while True:
        order, files, *_ = socket.recv_fds(link, 1 << 20, 64)
        if not order:
            os._exit(0)  # without the seconds it takes to take down what was imported
        words = set(pickle.loads(order)[0])
        for name in chain(*(names for key, names in LIBRARIES.items() if {*key.split()} <= words)):
            with suppress(ImportError):  # of a library that is not installed
                import_module(name)
        told, tell = os.pipe()
        hold, go = os.pipe()
        between = os.fork()
        if between == 0:
            child = os.fork()
            if child == 0:
                for number in (told, tell, go):
                    os.close(number)
                link.close()
                _become(pickle.loads(order), files, hold)
            os.write(tell, str(child).encode())
            os._exit(0)
        os.waitpid(between, 0)
        link.send(os.read(told, 64))
        for number in (told, tell, hold, go, *files):  # the end of `go` lets the program begin
            os.close(number)


def _become(order: tuple[Any, ...], files: list[int], hold: int) -> NoReturn:
    """Run a program in this process, as `python -m` does."""
    args, cwd, env, numbers, new_session = order
    os.read(hold, 1)
    os.close(hold)
    program, words = _split(args)
    link = _own_stem(files) if program in STARTERS else None
    moved = [fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 512) for number in files]
    kept = None if link is None else fcntl.fcntl(link.detach(), fcntl.F_DUPFD_CLOEXEC, 512)
    for number in _open_files():
        if number not in (*moved, kept):
            with suppress(OSError):
                os.close(number)
    for number, file in zip(numbers, moved, strict=True):
        os.dup2(file, number)
        os.close(file)
    if new_session:
        os.setsid()
    os.chdir(cwd)
    old = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ.clear()
    os.environ.update(env)
    path = [entry for entry in env.get("PYTHONPATH", "").split(os.pathsep) if entry]
    first = str(Path(program).parent) if program.endswith(".py") else cwd
    sys.path[:] = [first, *path, *(entry for entry in sys.path[1:] if entry not in old)]
    for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        at_once = number == 2 or "-u" in args[:2]
        setattr(sys, name, os.fdopen(number, mode, 1 if at_once else -1, closefd=False))
        setattr(sys, f"__{name}__", getattr(sys, name))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _show(args)
    if kept is not None:
        start_warm(PRODUCT, socket.socket(fileno=kept))
    _run(program, words)


def _own_stem(files: list[int]) -> socket.socket:
    """Fork a stem for this process alone."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        ours.close()
        for number in files:
            os.close(number)
        _serve(theirs)
    theirs.close()
    return ours


def _open_files() -> list[int]:
    return [int(name) for name in os.listdir("/proc/self/fd")]  # noqa: PTH208


def _show(args: list[str]) -> None:
    """Let the system show these as this process's command line."""
    stat = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(stat[45]), int(stat[46])
    ctypes.memset(start, 0, end - start)
    line = "".join(f"{word}\0" for word in args).encode()[: end - start - 1]
    ctypes.memmove(start, line, len(line))


def _run(program: str, words: list[str]) -> NoReturn:
    code: Any = 0
    sys.argv = [program, *words]
    sys.modules.pop(program, None)  # it may have been imported, but is to run
    try:
        if program.endswith(".py"):
            runpy.run_path(program, run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    except SystemExit as left:
        code = left.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code & 255)


def _main(number: int) -> NoReturn:
    import vidgen

    modules = (found.name for found in walk_packages(vidgen.__path__, "vidgen."))
    for name in (*LIBRARIES[""], *modules):
        if name != "vidgen.__main__":
            import_module(name)
    gc.collect()
    gc.freeze()
    _serve(socket.socket(fileno=number))


if __name__ == "__main__":
    _main(int(sys.argv[1]))
