"""Kernels in C++ for CPUs with AVX512, or AVX2 and FMA, compiled on first use, cached per machine.

Without a compiler or such a CPU, or with `VIDGEN_NATIVE=0`, `kernels` returns None and everything
runs on PyTorch's own operators: the same results within rounding, but slower.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import secrets
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from vidgen.core.runtime import cache_folder

_SOURCES = ("attention.cpp", "attention_backward.cpp", "conv.cpp", "rows.cpp", "rows_backward.cpp")
_HEADERS = ("vectors.h", "tiles.h", "rows.h")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared")
_TIMEOUT_S = 120
WIDTHS = 16
"""Kernels on rows take widths that are multiples of this."""
MAX_WIDTH = 8192
"""Largest width of a row."""
MAX_TAPS = 27
"""Most taps of a convolution."""

_SUFFIXES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}
_MIXED = "mixed"
"""Float32 rows to which bfloat16 is added, as under autocast in training."""


class Unavailable(Exception):
    """Error for kernels that can't be compiled on this machine; the message is the reason."""


def kernels(*tensors: Tensor) -> ctypes.CDLL | None:
    """Return the kernels if they take these tensors: on the CPU, of a known dtype.

    The first call compiles them, which takes some seconds once per machine.
    """
    if torch.compiler.is_compiling() or tensors[0].device.type != "cpu":
        return None
    library = _loaded()[0]
    return library if library and tensors[0].dtype in known_dtypes() else None


def needs_gradient(*tensors: Tensor) -> bool:
    """Return whether autograd needs the gradient of one of these."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def why_not() -> str | None:
    """Return the reason why kernels aren't available here; None if they are."""
    return _loaded()[1]


@lru_cache(maxsize=1)
def known_dtypes() -> frozenset[torch.dtype]:
    """Return the kernels' dtypes; bfloat16 takes a CPU with AVX512-BF16."""
    library = _loaded()[0]
    return frozenset(
        dtype for dtype, suffix in _SUFFIXES.items()
        if library is not None and hasattr(library, f"attention_{suffix}")
    )


def call(name: str, dtype: torch.dtype, *arguments: object, mixed: bool = False) -> int:
    """Call a kernel: tensors by address, None as null, integers of 64 bits, floats of 32.

    PyTorch's number of threads is appended. With `mixed` rows are float32 and the rest bfloat16.
    Call it only after `kernels` returned the library.
    """
    library = _loaded()[0]
    assert library is not None
    passed = [_as_c(argument) for argument in arguments]
    function = getattr(library, f"{name}_{_MIXED if mixed else _SUFFIXES[dtype]}")
    return int(function(*passed, ctypes.c_int64(torch.get_num_threads())))


def _as_c(argument: object) -> object:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, int):
        return ctypes.c_int64(argument)
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    if isinstance(argument, tuple):
        return (ctypes.c_int64 * len(argument))(*argument)
    assert argument is None, argument
    return None


@lru_cache(maxsize=1)
def _loaded() -> tuple[ctypes.CDLL | None, str | None]:
    try:
        return ctypes.CDLL(str(_library())), None
    except (Unavailable, OSError, subprocess.SubprocessError) as error:
        return None, str(error)


def _library() -> Path:
    """Return the file compiled from these sources for this machine; compile it if it is missing.

    Raises:
        Unavailable: no compiler, no suitable CPU, or a failed compilation.
    """
    if os.environ.get("VIDGEN_NATIVE") == "0":
        raise Unavailable("switched off by VIDGEN_NATIVE=0")
    flags = _cpu_flags()
    if "avx512f" not in flags and not {"avx2", "fma"} <= set(flags):
        raise Unavailable("the CPU has neither AVX512 nor AVX2 with FMA")
    names = (os.environ.get("CXX", ""), "g++", "c++", "clang++")
    compiler = next(filter(None, map(shutil.which, names)), None)
    if compiler is None:
        raise Unavailable("no C++ compiler was found; install g++ for faster kernels")
    here = Path(__file__).parent
    digest = hashlib.sha256(" ".join((*_FLAGS, compiler, torch.__version__, *flags)).encode())
    for name in (*_SOURCES, *_HEADERS):
        digest.update((here / name).read_bytes())
    target = cache_folder() / "native" / f"{digest.hexdigest()[:24]}.so"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        _compile(compiler, [here / name for name in _SOURCES], target)
    return target


def _compile(compiler: str, sources: list[Path], target: Path) -> None:
    # PyTorch's own OpenMP library, so that both share one pool of threads
    bundled = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    link = [f"-L{bundled[0].parent}", f"-l:{bundled[0].name}"] if bundled else []
    temporary = target.with_name(f".{secrets.token_hex(4)}.so")
    command = [compiler, *_FLAGS, *map(str, sources), "-o", str(temporary), *link]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S,
                              check=False)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line]
            raise Unavailable(f"{compiler} failed: {(lines or ['no error message'])[0]}")
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _cpu_flags() -> list[str]:
    info = Path("/proc/cpuinfo")
    if platform.system() != "Linux" or platform.machine() != "x86_64" or not info.is_file():
        raise Unavailable("kernels are written for Linux on x86-64")
    match = re.search(r"^flags\s*: (.*)$", info.read_text(), re.MULTILINE)
    return sorted(match[1].split()) if match else []
