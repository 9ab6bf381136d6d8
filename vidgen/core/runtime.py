"""Operating system and devices: atomic writes, locks, hashes, memory, environment, fingerprints."""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import re
import secrets
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO, TextIO

from vidgen import __version__
from vidgen.core.errors import InputError, OutputError

if TYPE_CHECKING:
    import torch

LONGEST_NAME = 240
"""Most bytes of an output's name: file systems take 255, and temporary names are longer."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
ATTENTION_VARIABLE = "VIDGEN_ATTENTION"
"""Environment variable with the attention back end that `auto` stands for."""


def sync(path: str | Path) -> None:
    """Flush a file's content, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`; on exit, move the file or folder written there to it.

    An exception removes the temporary file or folder and leaves the target unchanged. An existing
    folder stays complete until the new one replaces it.

    Raises:
        OutputError: the place can't be written or the disk is full.
    """
    target = _link_target(path)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        for entry in temporary.rglob("*"):
            sync(entry)
        sync(temporary)
        if target.is_dir():
            _exchange(temporary, target)
        else:
            temporary.replace(target)
        sync(target.parent)
    except OSError as error:
        raise write_error(target, error, temporary) from error
    finally:
        if temporary.is_dir() and not temporary.is_symlink():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def _link_target(path: str | Path) -> Path:
    """Return the end of a symbolic link, so that writing keeps the link, or the path itself."""
    target = Path(path)
    try:
        return target.resolve() if target.is_symlink() else target
    except (OSError, RuntimeError):  # Python 3.11 and 3.13 for circular links
        raise OutputError(f"{target} can't be written: it is a link to itself; choose another "
                          "name") from None


def _exchange(new: Path, old: Path) -> None:
    """Exchange the content of two paths, atomically where the system can."""
    if sys.platform == "linux":
        import ctypes

        here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE; not all file systems support it
        rename = getattr(ctypes.CDLL(None), "renameat2", None)
        if rename and not rename(here, os.fsencode(new), here, os.fsencode(old), exchange):
            return
    aside = old.with_name(f".{old.name}.{secrets.token_hex(4)}.old")
    old.rename(aside)
    try:
        new.rename(old)
    except OSError:
        aside.rename(old)
        raise
    aside.rename(new)


def atomic_write(path: str | Path, content: bytes | Callable[[BinaryIO], None]) -> None:
    """Write a file atomically: readers see the old or the new content, never a part of it.

    Raises:
        OutputError: the place can't be written or the disk is full.
    """
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        if callable(content):
            content(file)
        else:
            file.write(content)


def link(source: Path, target: Path) -> None:
    """Make `target` a hard link to `source`, or a copy where the file system has no links."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def write_error(target: Path, error: OSError, partial: Path | None = None) -> OutputError:
    """Return the OutputError for an error of the operating system.

    Args:
        partial: file written so far, whose size a message about a full disk gives.
    """
    if error.errno in _FULL:
        written = partial.stat().st_size if partial and partial.is_file() else 0
        free = shutil.disk_usage(target.parent).free
        return OutputError(
            f"no space left for {target}: {size_text(written)} written, {size_text(free)} free; "
            "free some space or choose another disk"
        )
    reason = error.strerror or error
    return OutputError(f"{target} can't be written: {reason}; choose another place, or change "
                       "its permissions")


def check_output(path: str | Path, *, overwrite: bool = False, num_bytes: int = 0) -> None:
    """Check before long work that its result can be written to `path`.

    Args:
        num_bytes: upper estimate of the size of the result.

    Raises:
        OutputError: a name that is too long, an existing file without `overwrite`, a folder that
            doesn't exist or can't be written, or too little free space.
    """
    target, name = Path(path), os.fsencode(Path(path).name)
    if len(name) > LONGEST_NAME:
        raise OutputError(f"the name {target.name[:40]}... has {len(name)} bytes; shorten it to "
                          f"{LONGEST_NAME}")
    folder = _link_target(path).parent
    try:
        if os.path.lexists(target) and not overwrite:
            raise OutputError(f"{target} exists; give --overwrite (in Python overwrite=True) or "
                              "another name")
        if target.is_dir() and any(p.suffix not in (".png", ".json") for p in target.iterdir()):
            raise OutputError(f"{target} is a folder with other files in it; choose another name")
        if not folder.is_dir():
            why = (f"{folder} is not a folder" if folder.exists()
                   else f"the folder {folder} does not exist")
            raise OutputError(f"{target} can't be written: {why}; create the folder, or choose "
                              "another place")
        probe = folder / f".{target.name}.{secrets.token_hex(4)}.tmp"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise write_error(target, error) from error
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise OutputError(
            f"{target} may need {size_text(num_bytes)}, but only {size_text(free)} are free; "
            "free some space or choose another disk"
        )


def lock_file(path: Path) -> TextIO | None:
    """Lock a file; the lock lasts while the returned file is open.

    Returns:
        The open file, or None if the file system has no locks.

    Raises:
        BlockingIOError: another process has locked it.
    """
    import fcntl

    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if isinstance(error, BlockingIOError):
            raise
        return None
    return file


def size_text(num_bytes: int) -> str:
    """Format a size in bytes, MB or GB, in powers of 1000."""
    if num_bytes >= 1e9:
        return f"{num_bytes / 1e9:.1f} GB"
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 1e5 else f"{num_bytes} bytes"


def time_text(seconds: float) -> str:
    """Format a duration, such as 45 s, 12 min, 1 h 12 min or 2 d 5 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h {minutes % 60} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"


def slug(text: str) -> str:
    """Return the first words of a text, at most 48 characters, as a file name."""
    words = re.sub(r"[^\w]+", "-", text.lower()).strip("-")
    return words[:48].rstrip("-") or "clip"


def sha256_file(path: str | Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def choose_device(name: str = "auto") -> torch.device:
    """Return the device called `name`; "auto" is the first GPU, or the CPU without one.

    Raises:
        InputError: an unknown or missing device.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"unknown device {name!r}; give auto, cpu, cuda or cuda:N") from None
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise InputError(f"device {name!r} doesn't exist: PyTorch finds {count} GPUs; give cpu or "
                         "auto")
    return device


def best_dtype(device: torch.device) -> str:
    """Return the fastest dtype of a device with float32's range: "bf16" or "fp32".

    oneDNN emulates bf16 on x86 CPUs that have only AVX512, at a fifth of float32's speed.
    """
    import torch

    if device.type == "cuda":
        return "bf16"
    fast = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if platform.machine().lower() in ("x86_64", "amd64"):
        fast &= torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if fast else "fp32"


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Set environment variables inside the block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def attention_by(backend: str) -> AbstractContextManager[None]:
    """Make attention's "auto" stand for `backend` inside the block, also in child processes."""
    return environment(**{} if backend == "auto" else {ATTENTION_VARIABLE: backend})


def given_rank() -> tuple[int, int] | None:
    """Return (rank, number of ranks) of this process under torchrun with several; else None."""
    names = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    if not names <= os.environ.keys() or os.environ["WORLD_SIZE"] == "1":
        return None
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def available_memory(device: torch.device, root: Path = Path("/")) -> int | None:
    """Return the available bytes of memory on a device; None where the system doesn't report it.

    For the CPU they are the free and reclaimable memory without swap, within a container's limit.

    Args:
        root: folder that contains `proc` and `sys`.
    """
    if device.type == "cuda":
        import torch

        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    try:
        info = (root / "proc/meminfo").read_text()
        free = 1024 * int(re.search(r"MemAvailable:\s+(\d+)", info)[1])  # type: ignore[index]
    except (OSError, TypeError):
        return None
    for limit, used in (("memory.max", "memory.current"),
                        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        try:  # control groups, version 2 and 1; "max" is no limit
            group = root / "sys/fs/cgroup"
            stat = ((group / limit).parent / "memory.stat").read_text()
            cached = sum(map(int, re.findall(r"^(?:in)?active_file (\d+)", stat, re.MULTILINE)))
            taken = int((group / used).read_text()) - cached
            free = min(free, int((group / limit).read_text()) - taken)
        except (OSError, ValueError):
            continue
    return max(free, 0)


def reuse_freed_memory(largest: int = 32 << 20) -> None:
    """Let glibc keep freed memory instead of returning it to the system, and use large pages.

    The system zeroes memory page by page when it is allocated again, which takes up to a third of
    the time of a network's pointwise operations; with pages of 2 MB it is several times as fast.
    `trim_memory` still returns the memory of a network that was freed.

    Args:
        largest: largest block to keep, in bytes; glibc before 2.35 allows at most 32 MB.
    """
    if sys.platform != "linux":
        return
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by torch at its first allocation
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # only glibc has it
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3
        if not mallopt(mmap_threshold, largest):
            mallopt(mmap_threshold, 32 << 20)
        mallopt(trim_threshold, 1 << 30)


def cache_folder() -> Path:
    """Return the cache folder: `$XDG_CACHE_HOME/vidgen`, or `~/.cache/vidgen`."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "vidgen"


def child_environment(**more: str) -> dict[str, str]:
    """Return the environment for a child process that imports this package, with more variables."""
    here = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, **more}


def exit_text(code: int, errors: IO[bytes]) -> str:
    """Describe the end of a process, for a message.

    Args:
        code: exit code as of `subprocess`, negative for a signal.
        errors: its stderr, of which the last line is quoted.
    """
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + (", possibly out of memory" if code == -9 else "")
    errors.seek(0)
    lines = errors.read().decode(errors="replace").strip().splitlines()
    return f"exited with code {code}" + (f" ({lines[-1][:200]})" if lines else "")


def fingerprint() -> dict[str, Any]:
    """Return the versions, processor and thread count that the bits of a result may depend on."""
    import av
    import torch

    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.is_file() else []
    return {
        "vidgen": __version__,
        "python": platform.python_version(),
        "system": f"{sys.platform}-{platform.machine()}",
        "torch": torch.__version__,
        "av": av.__version__,
        "libavcodec": ".".join(map(str, av.library_versions["libavcodec"])),
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
    }
