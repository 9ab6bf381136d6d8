"""Tensors in files, read on demand: one safetensors file, shards with an index, or a `.pth`.

Files are memory-mapped: the operating system reads pages on first use, and may drop them again.
"""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from vidgen.core.errors import ModelError

WEIGHT_NAMES = ("model", "diffusion_pytorch_model")
"""Stems of transformers' and diffusers' weight files."""
SCALE = "_scale"
"""Suffix, after an int8 matrix's name, of its scales' name, as in compressed-tensors."""


def find_files(folder: Path) -> tuple[Path, ...]:
    """Return the safetensors files of a component folder: one, or all that its index lists.

    Raises:
        ModelError: no file, several files without an index, or missing shards.
    """
    singles = sorted(folder.glob("*.safetensors"))
    indices = sorted(folder.glob("*.safetensors.index.json"))
    for stem in WEIGHT_NAMES:
        if folder / f"{stem}.safetensors" in singles:
            return (folder / f"{stem}.safetensors",)
        if folder / f"{stem}.safetensors.index.json" in indices:
            return _shards(folder / f"{stem}.safetensors.index.json")
    if len(indices) == 1:
        return _shards(indices[0])
    if len(singles) == 1 and not indices:
        return (singles[0],)
    if not singles:
        raise ModelError(f"{folder} has no weights (*.safetensors); copy the whole folder again")
    names = ", ".join(path.name for path in (indices or singles)[:5])
    raise ModelError(
        f"{folder} has {names}, but not exactly one index of shards; copy its "
        "*.safetensors.index.json again, or keep only one model in the folder"
    )


def _shards(index: Path) -> tuple[Path, ...]:
    try:
        names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        paths = tuple(index.parent / name for name in sorted(names))
        missing = [path.name for path in paths if not path.is_file()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = str(error)[:200]
        raise ModelError(f"{index} can't be read as an index ({reason}); copy it again") from error
    if missing:
        raise ModelError(
            f"{index.parent} lacks {len(missing)} of {len(paths)} shards: {', '.join(missing)}; "
            "copy them again"
        )
    return paths


class TensorFile:
    """A file of tensors, mapped from its first use until `close`; the next use maps it again.

    Args:
        path: a safetensors file, or a `.pth` with a plain state dict. Pickles are read with
            `weights_only`, so they can't run code.

    Raises:
        ModelError: on use, if the file is missing, truncated or of another format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._opened: tuple[tuple[str, ...], Callable[[str], Tensor]] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, in the file's order."""
        return self._open()[0]

    def read(self, name: str) -> Tensor:
        """Return a tensor as stored, mapped."""
        return self._open()[1](name)

    def close(self) -> None:
        """Unmap the file, so that pages without a live tensor are freed."""
        self._opened = None

    def _open(self) -> tuple[tuple[str, ...], Callable[[str], Tensor]]:
        if self._opened is None:
            self._opened = _open(self.path)
        return self._opened


@dataclass(frozen=True, eq=False)
class Lazy:
    """A tensor that is read or computed on demand.

    Attributes:
        likeness: an empty tensor of the same shape and dtype on the meta device.
        get: return the tensor, on the CPU.
        files: files from which `get` reads.
        is_mapped: True if `get` returns a view of a mapped file.
    """

    likeness: Tensor
    get: Callable[[], Tensor]
    files: tuple[TensorFile, ...] = ()
    is_mapped: bool = False


def derived(make: Callable[..., Tensor], *parts: Lazy) -> Lazy:
    """Return a tensor computed from others on demand: a part, a reshaped one, or several joined.

    The result of a single mapped tensor counts as mapped, so `make` should return a view of it.
    """
    return Lazy(
        make(*(part.likeness for part in parts)), lambda: make(*(part.get() for part in parts)),
        tuple(dict.fromkeys(file for part in parts for file in part.files)),
        is_mapped=len(parts) == 1 and parts[0].is_mapped,
    )


def held(value: Tensor, dtype: torch.dtype | None = None) -> Lazy:
    """Wrap a tensor that is in memory; `get` returns it on the CPU, cast to `dtype` if given."""
    dtype = dtype or value.dtype
    like = torch.empty(value.shape, dtype=dtype, device="meta")
    return Lazy(like, lambda: value.detach().to("cpu", dtype))


class Tensors(dict[str, Lazy]):
    """Tensors on demand, by name."""

    @property
    def files(self) -> tuple[Path, ...]:
        """Paths of the files with the tensors."""
        return tuple(file.path for file in self._files())

    @property
    def num_bytes(self) -> int:
        """Size of all tensors, in bytes."""
        return sum(lazy.likeness.nbytes for lazy in self.values())

    def release(self) -> None:
        """Unmap the files until a tensor is read again."""
        for file in self._files():
            file.close()

    def _files(self) -> Iterator[TensorFile]:
        yield from dict.fromkeys(file for lazy in self.values() for file in lazy.files)


def open_tensors(paths: Iterable[Path]) -> Tensors:
    """Open the tensors of one component, from one or several files.

    A matrix or kernel [n, ...] stored in int8 with scales [n, 1] is read as bfloat16.

    Raises:
        ModelError: an unreadable file, see `TensorFile`, or a tensor that is in two files.
    """
    tensors = Tensors()
    for file in map(TensorFile, paths):
        for name in file.names:
            if name in tensors:
                raise ModelError(
                    f"tensor {name} is in {tensors[name].files[0].path.name} and in "
                    f"{file.path.name} of {file.path.parent}; keep only one model in the folder"
                )
            tensors[name] = Lazy(file.read(name).to("meta"), partial(file.read, name), (file,),
                                 is_mapped=True)
    for name, lazy in [*tensors.items()]:
        like, scales = lazy.likeness, tensors.get(name + SCALE)
        if like.dtype != torch.int8 or like.ndim < 2 or scales is None:
            continue
        if scales.likeness.shape == (len(like), 1):
            tensors[name] = _dequantized(lazy, tensors.pop(name + SCALE))
    return tensors


def _dequantized(rows: Lazy, scales: Lazy) -> Lazy:
    like = torch.empty(rows.likeness.shape, dtype=torch.bfloat16, device="meta")

    def dequantize() -> Tensor:
        return (rows.get().flatten(1) * scales.get()).bfloat16().view(like.shape)

    return Lazy(like, dequantize, tuple(dict.fromkeys(rows.files + scales.files)))


class Weights:
    """Tensors as a module's weights, and the dtypes to which the module casts them.

    Args:
        tensors: by the module's names.
        dtype: dtype of floating-point weights in the module.
        keep_fp32: name parts of the weights that stay float32.
    """

    def __init__(
        self, tensors: Tensors, dtype: torch.dtype, keep_fp32: tuple[str, ...] = ()
    ) -> None:
        self.tensors, self._dtype, self._keep_fp32 = tensors, dtype, keep_fp32

    @property
    def place(self) -> Path:
        """Path of the only file, or the folder of several."""
        files = self.tensors.files
        return files[0] if len(files) == 1 else files[0].parent

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a weight."""
        return tuple(self.tensors[name].likeness.shape)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype that a weight has in the module."""
        stored = self.tensors[name].likeness.dtype
        if not stored.is_floating_point:
            return stored
        return torch.float32 if any(part in name for part in self._keep_fp32) else self._dtype

    def num_bytes(self, names: Iterable[str] | None = None) -> int:
        """Return the size in the module, in bytes, of all weights or of those in `names`."""
        chosen = self.tensors if names is None else names
        return sum(self.dtype(name).itemsize * math.prod(self.shape(name)) for name in chosen)

    @cached_property
    def stay_mapped(self) -> bool:
        """True if nearly all tensors are stored in the module's dtype, so that they stay mapped.

        Otherwise all are copied, since one mapped tensor keeps its whole file's pages resident.
        """
        changed = sum(lazy.likeness.nbytes for name, lazy in self.tensors.items()
                      if lazy.likeness.dtype != self.dtype(name) or not lazy.is_mapped)
        return changed <= 0.05 * self.tensors.num_bytes


def _open(path: Path) -> tuple[tuple[str, ...], Callable[[str], Tensor]]:
    """Return the names of a file's tensors, and a function that reads one by its name."""
    if not path.is_file():
        raise ModelError(f"{path} is missing; copy it again")
    try:
        if path.suffix == ".safetensors":
            handle = safe_open(path, framework="pt", device="cpu")
            return tuple(handle.keys()), handle.get_tensor
        state = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{path} contains more than tensors, or is damaged; vidgen reads only plain state "
            "dicts: download it again"
        ) from error
    except Exception as error:  # torch's unpickler raises any error for a damaged file
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise ModelError(
            f"{path} can't be read ({reason}); it may be truncated: copy it again"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ModelError(f"{path} is not a plain state dict of tensors; use the published weights")
    return tuple(state), state.__getitem__
