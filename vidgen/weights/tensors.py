"""Tensors on demand, a component's tensors by name, and the dtypes to which a module casts them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor


class MappedFile(Protocol):
    """A file of tensors, mapped on use."""

    path: Path

    def close(self) -> None:
        """Unmap the file, so that pages without a live tensor are freed."""


@dataclass(frozen=True, eq=False)
class Lazy:
    """A tensor that is read or computed on demand.

    Attributes:
        likeness: an empty tensor of the same shape and dtype on the meta device.
        get: return the tensor, on the CPU.
        files: files from which `get` reads.
        is_mapped: True if `get` returns a view of a mapped file.
        keeps_dtype: True for a part of a quantised weight, which a module never casts.
    """

    likeness: Tensor
    get: Callable[[], Tensor]
    files: tuple[MappedFile, ...] = ()
    is_mapped: bool = False
    keeps_dtype: bool = False

    @property
    def num_bytes(self) -> int:
        """Size as stored, in bytes."""
        return self.likeness.nbytes

    def bytes_as(self, dtype: torch.dtype) -> int:
        """Return the size in a module that casts the tensor to `dtype`, in bytes."""
        return dtype.itemsize * self.likeness.numel()


def derived(make: Callable[..., Tensor], *parts: Lazy) -> Lazy:
    """Return a tensor computed from others on demand: a part, a reshaped one, or several joined.

    The result of a single mapped tensor counts as mapped, so `make` should return a view of it.
    """
    return Lazy(
        make(*(part.likeness for part in parts)), lambda: make(*(part.get() for part in parts)),
        joined_files(parts),
        is_mapped=len(parts) == 1 and parts[0].is_mapped,
    )


def joined_files(parts: Iterable[Lazy]) -> tuple[MappedFile, ...]:
    """Return the files of several tensors, each once."""
    return tuple(dict.fromkeys(file for part in parts for file in part.files))


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
        """Size of all tensors as stored, in bytes."""
        return sum(lazy.num_bytes for lazy in self.values())

    def release(self) -> None:
        """Unmap the files until a tensor is read again."""
        for file in self._files():
            file.close()

    def _files(self) -> Iterator[MappedFile]:
        yield from dict.fromkeys(file for lazy in self.values() for file in lazy.files)


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
        lazy = self.tensors[name]
        stored = lazy.likeness.dtype
        if lazy.keeps_dtype or not stored.is_floating_point:
            return stored
        return torch.float32 if any(part in name for part in self._keep_fp32) else self._dtype

    def num_bytes(self, names: Iterable[str] | None = None) -> int:
        """Return the size in the module, in bytes, of all weights or of those in `names`."""
        chosen = self.tensors if names is None else names
        return sum(self.tensors[name].bytes_as(self.dtype(name)) for name in chosen)

    @cached_property
    def stay_mapped(self) -> bool:
        """True if nearly all tensors are stored in the module's dtype, so that they stay mapped.

        Otherwise all are copied, since one mapped tensor keeps its whole file's pages resident.
        """
        changed = sum(lazy.num_bytes for name, lazy in self.tensors.items()
                      if lazy.likeness.dtype != self.dtype(name) or not lazy.is_mapped)
        return changed <= 0.05 * self.tensors.num_bytes
