"""Tensors in files: one safetensors file, shards with an index, or a published `.pth`.

Files are mapped: the operating system reads pages when they are used, and may drop them again.
"""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from vidgen.core.errors import ModelError

WEIGHT_NAMES = ("model", "diffusion_pytorch_model")
"""Stems of transformers' and diffusers' weight files."""
SCALE = "_scale"
"""Suffix of the name of an int8 matrix's scales, as in compressed-tensors."""


def find_files(folder: Path) -> tuple[Path, ...]:
    """Return the safetensors files of a component folder: one, or all that its index names.

    Raises:
        ModelError: none, several without an index, or shards that are missing.
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
        f"{folder} has {names} and no one index that joins them; copy its *.safetensors.index.json "
        "again, or leave only one model in the folder"
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


class TensorStore:
    """The tensors of one component by name, mapped from its files, which are opened on first use.

    A matrix or kernel [n, ...] stored in int8 with scales [n, 1] appears as bfloat16.

    Args:
        files: safetensors shards, or `.pth` files of plain state dicts, which are read as tensors
            only, never as code.

    Raises:
        ModelError: on first use: a file is missing, truncated or not of its format, or two hold the
            same tensor.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = tuple(files)
        self._readers: dict[Path, Callable[[str], Tensor]] = {}

    @cached_property
    def _entries(self) -> dict[str, tuple[Path, Tensor]]:
        """File of each tensor, and an empty tensor like it on the meta device."""
        entries: dict[str, tuple[Path, Tensor]] = {}
        for path in self.files:
            names, read = _open(path)
            self._readers[path] = read
            for name in names:
                if name in entries:
                    raise ModelError(
                        f"tensor {name} lies in {entries[name][0].name} and in {path.name} of "
                        f"{path.parent}; leave only one model in the folder"
                    )
                entries[name] = path, read(name).to("meta")
        return entries

    @cached_property
    def _scales(self) -> dict[str, str]:
        """Name of an int8 matrix -> name of its scales."""
        every, found = self._entries, {}
        for name, (_, stored) in every.items():
            _, scales = every.get(name + SCALE, (None, None))
            rows = (*stored.shape[:1], 1)
            packed = stored.dtype == torch.int8 and stored.ndim > 1
            if packed and scales is not None and scales.shape == rows:
                found[name] = name + SCALE
        return found

    @property
    def names(self) -> tuple[str, ...]:
        """All names, in the files' order."""
        hidden = set(self._scales.values())
        return tuple(name for name in self._entries if name not in hidden)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        return tuple(self._entries[name][1].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor without reading it."""
        return torch.bfloat16 if name in self._scales else self._entries[name][1].dtype

    def is_mapped(self, name: str) -> bool:
        """Return whether `get` returns a tensor in the mapped file."""
        return name not in self._scales

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(tensor.nbytes for _, tensor in self._entries.values())

    def get(self, name: str) -> Tensor:
        """Return a tensor on the CPU, mapped if `is_mapped`."""
        value = self._read(name)
        scales = self._scales.get(name)
        if scales is None:
            return value
        rows = value.flatten(1) * self._read(scales)
        return rows.bfloat16().view(value.shape)

    def _read(self, name: str) -> Tensor:
        path = self._entries[name][0]
        read = self._readers.get(path)
        if read is None:
            read = self._readers[path] = _open(path)[1]
        return read(name)

    def release(self) -> None:
        """Close the files, so that pages without a tensor leave memory; `get` reopens them."""
        self._readers = {}


class Weights:
    """A store's tensors as weights of a module, by its names and in its dtype.

    Args:
        keep_fp32: parts of names of weights that stay float32.
        names: stored name -> the module's, where they differ.

    Raises:
        ModelError: unreadable files, or two tensors for one weight.
    """

    def __init__(
        self, store: TensorStore, dtype: torch.dtype, keep_fp32: tuple[str, ...] = (),
        names: Mapping[str, str] | None = None,
    ) -> None:
        self.store, self._dtype, self._keep_fp32 = store, dtype, keep_fp32
        self._stored: dict[str, str] = {}
        for stored in store.names:
            name = (names or {}).get(stored, stored)
            if name in self._stored:
                raise ModelError(
                    f"{self.place} has two tensors for {name}: {self._stored[name]} and {stored}; "
                    "leave only one model in the folder"
                )
            self._stored[name] = stored

    @property
    def place(self) -> Path:
        """The file, or the folder of shards."""
        files = self.store.files
        return files[0] if len(files) == 1 else files[0].parent

    @property
    def names(self) -> tuple[str, ...]:
        """The module's names, in the files' order."""
        return tuple(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a weight."""
        return self.store.shape(self._stored[name])

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a weight in the module."""
        stored = self.store.dtype(self._stored[name])
        if not stored.is_floating_point:
            return stored
        return torch.float32 if any(part in name for part in self._keep_fp32) else self._dtype

    def num_bytes(self, names: Iterable[str] | None = None) -> int:
        """Return the bytes of all weights, or of the named ones, in the module."""
        chosen = self.names if names is None else names
        return sum(self.dtype(name).itemsize * math.prod(self.shape(name)) for name in chosen)

    def get(self, name: str) -> Tensor:
        """Return a tensor as stored, mapped."""
        return self.store.get(self._stored[name])

    @cached_property
    def stay_mapped(self) -> bool:
        """Whether nearly all tensors are stored in the module's dtype, so that they stay mapped.

        Otherwise all are copied, since one mapped tensor keeps its whole file's pages resident.
        """
        def changes(name: str, stored: str) -> bool:
            return (self.store.dtype(stored) != self.dtype(name)
                    or not self.store.is_mapped(stored))

        changed = sum(
            self.store.dtype(stored).itemsize * math.prod(self.shape(name))
            for name, stored in self._stored.items() if changes(name, stored)
        )
        return changed <= 0.05 * self.store.num_bytes


def _open(path: Path) -> tuple[tuple[str, ...], Callable[[str], Tensor]]:
    """Return the names in a file, and a function that maps one of them."""
    if not path.is_file():
        raise ModelError(f"{path} is missing; copy it again")
    try:
        if path.suffix == ".safetensors":
            handle = safe_open(path, framework="pt", device="cpu")
            return tuple(handle.keys()), handle.get_tensor
        state = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{path} holds more than tensors, or is damaged; vidgen reads only plain state dicts: "
            "copy it again from where it was published"
        ) from error
    except Exception as error:  # damaged pickles lead torch's unpickler to any
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise ModelError(
            f"{path} can't be read ({reason}); it may be truncated: copy it again"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ModelError(f"{path} is no plain state dict of tensors; give the published weights")
    return tuple(state), state.__getitem__
