"""Open files of tensors: safetensors, shards with an index, GGUF, or a `.pth`.

Files are memory-mapped: the operating system reads pages on first use, and may drop them again.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from vidgen.core.errors import ModelError
from vidgen.core.runtime import size_text
from vidgen.ops.quantized import Packing
from vidgen.weights.packed import find_packed, packed
from vidgen.weights.tensors import Lazy, Tensors, derived

WEIGHT_NAMES = ("model", "diffusion_pytorch_model")
"""Stems of transformers' and diffusers' weight files."""
SCALE = "_scale"
"""Suffix, after an int8 matrix's name, of its scales' name, as in compressed-tensors."""
_SAFETENSORS = (".safetensors", ".sft")
_GGUF_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


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


class _Opened(NamedTuple):
    """An opened file: `packings` has the forms of GGUF's quantised tensors."""

    names: tuple[str, ...]
    read: Callable[[str], Tensor]
    headers: Mapping[str, str] = {}
    packings: Mapping[str, Packing] = {}


class TensorFile:
    """A file of tensors, mapped from its first use until `close`; the next use maps it again.

    Args:
        path: safetensors, GGUF, or a `.pth` with a plain state dict. Pickles are read with
            `weights_only`, so they can't run code.

    Raises:
        ModelError: on use, if the file is missing, truncated or of another format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._opened: _Opened | None = None

    def read(self, name: str) -> Tensor:
        """Return a tensor as stored, mapped."""
        return self.opened.read(name)

    def close(self) -> None:
        """Unmap the file, so that pages without a live tensor are freed."""
        self._opened = None

    @property
    def opened(self) -> _Opened:
        """Contents of the file."""
        if self._opened is None:
            self._opened = _open(self.path)
        return self._opened

    def tensors(self) -> dict[str, Lazy]:
        """Return all tensors by name, in the file's order."""
        found = {}
        for name in self.opened.names:
            lazy = Lazy(self.read(name).to("meta"), partial(self.read, name), (self,),
                        is_mapped=True)
            packing = self.opened.packings.get(name)
            found[name] = lazy if packing is None else packed(packing, {"weight": lazy})
        return found


def open_tensors(paths: Iterable[Path]) -> Tensors:
    """Open the tensors of one component, from one or several files.

    Quantised weights are found and become one tensor each; see `weights.packed`. A matrix or
    kernel [n, ...] stored by vidgen in int8 with bfloat16 scales [n, 1] is read as bfloat16.

    Raises:
        ModelError: an unreadable file, see `TensorFile`, or a tensor that is in two files.
    """
    stored, headers = dict[str, Lazy](), dict[str, str]()
    for file in map(TensorFile, paths):
        for name, lazy in file.tensors().items():
            if name in stored:
                raise ModelError(
                    f"tensor {name} is in {stored[name].files[0].path.name} and in "
                    f"{file.path.name} of {file.path.parent}; keep only one model in the folder"
                )
            stored[name] = lazy
        headers |= file.opened.headers
    for name, lazy in [*stored.items()]:
        like, scales = lazy.likeness, stored.get(name + SCALE)
        if like.dtype == torch.int8 and like.ndim > 1 and scales is not None and (
                scales.likeness.shape == (len(like), 1)
                and scales.likeness.dtype == torch.bfloat16):
            stored[name] = derived(_dequantized, lazy, stored.pop(name + SCALE))
    return find_packed(file.path, stored, headers) if stored else Tensors()


def _dequantized(rows: Tensor, scales: Tensor) -> Tensor:
    return (rows.flatten(1) * scales).bfloat16().view(rows.shape)


def _open(path: Path) -> _Opened:
    """Map a file; see `TensorFile` for errors."""
    _check_contents(path)
    try:
        if path.suffix in _SAFETENSORS:
            handle = safe_open(path, framework="pt", device="cpu")
            return _Opened(tuple(handle.keys()), handle.get_tensor, handle.metadata() or {})
        if path.suffix == ".gguf":
            return _open_gguf(path)
        state = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except ModelError:
        raise
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
    return _Opened(tuple(state), state.__getitem__)


def _check_contents(path: Path) -> None:
    """Raise ModelError if a file's first bytes show that it isn't a file of weights."""
    if not path.is_file():
        raise ModelError(f"{path} is missing; copy it again")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(512)
    if not size:
        raise ModelError(f"{path} is empty; copy it again")
    if start.startswith(b"version https://git-lfs"):
        raise ModelError(f"{path} is a Git LFS pointer instead of the file; run git lfs pull, or "
                         "copy it again")
    if start.lstrip()[:9].lower().startswith((b"<!doctype", b"<html")):
        raise ModelError(f"{path} is a web page instead of weights, perhaps one that asks for a "
                         "login; log in, accept the licence and download it again")
    length = int.from_bytes(start[:8], "little")
    if path.suffix in _SAFETENSORS and (size < 8 + length or start[8:9] != b"{"):
        raise ModelError(f"{path} isn't a whole safetensors file: it has {size_text(size)}, its "
                         f"header alone would have {size_text(length)}; copy it again")
    if path.suffix == ".gguf" and start[:4] != b"GGUF":
        raise ModelError(f"{path} isn't a GGUF file, which starts with GGUF; copy it again")


def _open_gguf(path: Path) -> _Opened:
    """Map a GGUF file; shapes are torch's, or those given by `comfy.gguf.orig_shape.NAME`.

    Raises:
        ModelError: the package gguf isn't installed, or a tensor has an unknown type.
    """
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError:
        raise ModelError(f"{path} is a GGUF file; run pip install 'vidgen[gguf]' to read it"
                         ) from None
    from vidgen.ops.dequantize import GGUF_TYPES

    reader = GGUFReader(path, "c")
    tensors: dict[str, Tensor] = {}
    packings: dict[str, Packing] = {}
    for each in reader.tensors:
        name, kind, stored = each.name, each.tensor_type.name, torch.from_numpy(each.data)
        field = reader.get_field(f"comfy.gguf.orig_shape.{name}")
        sides = field.contents() if field else reversed(each.shape.tolist())
        shape = tuple(int(side) for side in sides)
        if kind in GGUF_TYPES:
            packings[name] = Packing(kind, shape)
        elif kind in _GGUF_FLOATS:
            stored = stored.view(_GGUF_FLOATS[kind]).reshape(shape)
        else:
            raise ModelError(f"{path}: {name} has the type {kind}; vidgen reads "
                             f"{', '.join((*_GGUF_FLOATS, *GGUF_TYPES))}")
        tensors[name] = stored
    return _Opened(tuple(tensors), tensors.__getitem__, packings=packings)
