"""Modules built on the meta device and given their tensors from files, and written back."""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vidgen.core.config import dump
from vidgen.core.errors import InputError, ModelError
from vidgen.core.runtime import atomic_path, atomic_write
from vidgen.ops.linear import pack, packs
from vidgen.weights.quantize import Quantization, linears, quantize_layer
from vidgen.weights.store import TensorStore, find_files, in_int8
from vidgen.weights.stream import assign, blocks_of, stream_blocks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Module = TypeVar("Module", bound=nn.Module)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, mapped.

    Raises:
        ModelError: missing, truncated or not safetensors.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise ModelError(
            f"{path} can't be read as safetensors ({error}); it may be truncated: copy it again"
        ) from error


class Weights:
    """A store's tensors as weights of a module: by its names, in the dtype they are used in.

    Args:
        store: where they lie.
        dtype: of floating-point weights.
        keep_fp32: parts of names of weights that are float32 whatever `dtype` is.
        names: stored name -> the module's; those not in it are the same.

    Raises:
        ModelError: unreadable files, or two tensors for one weight.
    """

    def __init__(
        self,
        store: TensorStore,
        dtype: torch.dtype,
        keep_fp32: tuple[str, ...] = (),
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
        """Shape of a weight."""
        return self.store.shape(self._stored[name])

    def dtype(self, name: str) -> torch.dtype:
        """Dtype a weight is used in."""
        stored = self.store.dtype(self._stored[name])
        if not stored.is_floating_point:
            return stored
        return torch.float32 if any(part in name for part in self._keep_fp32) else self._dtype

    def num_bytes(self, names: Iterable[str] | None = None) -> int:
        """Bytes of all weights, or of the named ones, in the dtype they are used in."""
        chosen = self.names if names is None else names
        return sum(self.dtype(name).itemsize * _numel(self.shape(name)) for name in chosen)

    def get(self, name: str) -> Tensor:
        """A tensor as stored, mapped."""
        return self.store.get(self._stored[name])

    @cached_property
    def stay_mapped(self) -> bool:
        """Whether nearly all tensors are stored as they are used, so that the file is the memory.

        Otherwise all are copied: one tensor that stays keeps its whole file's pages resident.
        """
        def changes(name: str, stored: str) -> bool:
            return (self.store.dtype(stored) != self.dtype(name)
                    or not self.store.is_mapped(stored))

        changed = sum(
            self.store.dtype(stored).itemsize * _numel(self.shape(name))
            for name, stored in self._stored.items() if changes(name, stored)
        )
        return changed <= 0.05 * self.store.num_bytes


class _Unfilled(TorchFunctionMode):
    """Leaves out `normal_`: on the meta device it does nothing, but imports 800 modules for it."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call a function of torch."""
        if getattr(func, "__name__", None) == "normal_":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def load_module(
    make: Callable[[], Module],
    source: Path | TensorStore,
    dtype: torch.dtype,
    device: torch.device | str,
    keep_fp32: tuple[str, ...] = (),
    names: Mapping[str, str] | None = None,
    quantize: Quantization | None = None,
    *,
    stream: bool = False,
    packed: bool = False,
    mesh: DeviceMesh | None = None,
    each: Callable[[nn.Parameter], None] | None = None,
) -> Module:
    """Build a module without memory, then give it the files' tensors, one at a time.

    Args:
        make: builds the module; called on the meta device.
        source: the component's folder of safetensors, or its tensors.
        dtype: of floating-point weights.
        device: where they end up.
        keep_fp32: parts of names of weights that stay float32.
        names: stored name -> the module's; those not in it are the same.
        quantize: what the linear layers of the blocks become.
        stream: leave the blocks' weights in the files; they come while they are used.
        packed: lay linear layers out for this CPU, where that pays; see `ops.linear`.
        mesh: devices over which the blocks' weights are spread, each reading its share.
        each: called with every parameter as soon as it is read, before the next one is.

    Raises:
        ModelError: missing or surplus keys, wrong shapes, unreadable file; names them.
        InputError: `quantize` that can't be had, or together with `stream`.
    """
    store = source if isinstance(source, TensorStore) else TensorStore(find_files(source))
    weights, device = Weights(store, dtype, keep_fp32, names), torch.device(device)
    try:
        with torch.device("meta"), _Unfilled():
            module = make()
    except (RuntimeError, TypeError, ValueError, ArithmeticError) as error:
        reason = str(error).splitlines()[0][:200]
        raise ModelError(
            f"the config.json of {weights.place} describes no network: {reason}; copy it again"
        ) from error
    _check(module, weights)
    if quantize and stream:
        raise InputError("int8 weights can't be streamed block by block; give one of the two")
    left = blocks_of(weights.names) if stream or mesh is not None else {}
    layers: dict[str, nn.Linear] = {}
    change: Callable[[nn.Linear], Any] = pack
    if quantize:
        layers, change = linears(module), partial(quantize_layer, kind=quantize)
    elif packed and device.type == "cpu" and packs(dtype):
        layers = {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear)}
    _fill(module, weights, set(chain.from_iterable(left.values())), device, layers, change, each)
    module.eval().requires_grad_(requires_grad=False)
    if left and mesh is not None:
        from vidgen.weights.shard import shard_blocks

        shard_blocks(module, weights, device, mesh)
    elif left:
        stream_blocks(module, weights, device)
    return module


def _fill(
    module: nn.Module, weights: Weights, left: set[str], device: torch.device,
    layers: Mapping[str, nn.Linear], change: Callable[[nn.Linear], Any],
    each: Callable[[nn.Parameter], None] | None = None,
) -> None:
    """Give a module its weights but those that are left in the files; `change` its `layers`.

    Each is changed as soon as it is read, so that no layer but one is in memory in both forms.
    `each` gets every parameter then.
    """
    mapped = weights.stay_mapped and device.type == "cpu" and not layers
    parameters = {name for name, _ in module.named_parameters()}
    read, often = 0, max(weights.store.num_bytes // 100, 1 << 20)
    for name in weights.names:
        if name in left:
            continue
        value = weights.get(name)
        read += value.nbytes
        assign(module, name, value.to(device, weights.dtype(name), copy=not mapped))
        del value
        layer = layers.get(name.removesuffix(".weight"))
        if layer is not None:
            change(layer)
        if each is not None and name in parameters:
            each(module.get_parameter(name))
        if read > often and not mapped:  # what was copied need not stay in memory twice
            weights.store.release()
            trim_memory()
            read = 0
    weights.store.release()
    trim_memory()
    empty = [
        name for name, value in chain(module.named_parameters(), module.named_buffers())
        if value.is_meta and name not in left
    ]
    assert not empty, f"not in any file, and made without memory: {empty}"


def _check(module: nn.Module, weights: Weights) -> None:
    """Refuse weights that are not those of the module."""
    state = module.state_dict()
    expected = {name: tuple(value.shape) for name, value in state.items()}
    given = {name: weights.shape(name) for name in weights.names}
    shapes = [
        f"{name}: {list(given[name])} for {list(shape)}"
        for name, shape in expected.items() if given.get(name, shape) != shape
    ]
    whole = [
        name for name, value in state.items()
        if value.is_floating_point() and name in given
        and not weights.dtype(name).is_floating_point
    ]
    problems = [
        f"{len(found)} {what} ({', '.join(found[:5])}{', ...' if len(found) > 5 else ''})"
        for what, found in (
            ("missing", sorted(expected.keys() - given.keys())),
            ("surplus", sorted(given.keys() - expected.keys())), ("of wrong shape", shapes),
            ("of whole numbers without a scale for each row", whole),
        ) if found
    ]
    if problems:
        raise ModelError(
            f"{weights.place} doesn't fit its config.json: tensors {'; '.join(problems)}; "
            "the two must come from the same model"
        )


def trim_memory() -> None:
    """Give freed memory back to the system.

    Before glibc 2.38 aligned allocations rarely fit in the holes that others left, so loading and
    quantising layers of a few megabytes could leave several times the weights in holes.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def save_module(
    state: dict[str, torch.Tensor], config: Any, folder: Path, dtype: torch.dtype,
    int8_from: int | None = None,
) -> None:
    """Write a component folder: `config.json` (dataclass or mapping) and `model.safetensors`.

    Matrices and kernels of `int8_from` numbers or more lie there in int8, half as large.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = config if isinstance(config, dict) else dump(config)
    tensors = {
        name: value.detach().to("cpu", dtype if value.is_floating_point() else value.dtype)
        .contiguous()
        for name, value in state.items()
    }
    if int8_from is not None:
        tensors = in_int8(tensors, int8_from)
    atomic_write(folder / "config.json", (json.dumps(settings, indent=1) + "\n").encode())
    with atomic_path(folder / "model.safetensors") as temporary:
        save_file(tensors, temporary)
        temporary.chmod(0o644)
