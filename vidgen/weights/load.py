"""Build modules on the meta device, and load their weights from files one at a time."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.overrides import TorchFunctionMode

from vidgen.core.errors import ModelError
from vidgen.ops.linear import pack, packs
from vidgen.ops.quantized import Quantization, check_quantization, hold_quantized
from vidgen.weights.packed import Packed, quantized
from vidgen.weights.store import find_files, open_tensors
from vidgen.weights.stream import assign, block_of, blocks_of, stream_blocks
from vidgen.weights.tensors import Tensors, Weights

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Module = TypeVar("Module", bound=nn.Module)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a safetensors file, by name; raise ModelError if it can't be read."""
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise ModelError(
            f"{path} can't be read as safetensors ({error}); it may be truncated: copy it again"
        ) from error


class _Unfilled(TorchFunctionMode):
    """Skip `normal_`, which does nothing on the meta device but imports 800 modules."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__name__", None) == "normal_":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def load_module(
    make: Callable[[], Module], source: Path | Tensors, dtype: torch.dtype,
    device: torch.device | str, keep_fp32: tuple[str, ...] = (),
    quantize: Quantization | None = None, *,
    stream: bool = False, packed: bool = False, mesh: DeviceMesh | None = None,
    each: Callable[[nn.Parameter], None] | None = None,
) -> Module:
    """Build a module on the meta device, then load its weights from files, one tensor at a time.

    Args:
        make: builds the module; called on the meta device.
        source: a folder with safetensors files, or tensors by the module's names.
        dtype: dtype of floating-point weights.
        keep_fp32: name parts of the weights that stay float32.
        stream: leave the blocks' weights in the files until they are used.
        packed: pack linear layers for this CPU if possible; see `ops.linear`.
        mesh: devices over which the blocks' weights are sharded.
        each: called with every parameter as soon as it is loaded.

    Returns:
        The module in evaluation mode; no parameter requires gradients.

    Raises:
        ModelError: missing or unexpected tensors, wrong shapes (the message names them), or an
            unreadable file.
        InputError: an unknown `quantize`.
    """
    check_quantization(quantize)
    tensors = open_tensors(find_files(source)) if isinstance(source, Path) else source
    weights, device = Weights(tensors, dtype, keep_fp32), torch.device(device)
    try:
        with torch.device("meta"), _Unfilled():
            module = make()
    except (RuntimeError, TypeError, ValueError, ArithmeticError) as error:
        reason = str(error).splitlines()[0][:200]
        raise ModelError(
            f"the config.json of {weights.place} is not a valid config: {reason}; copy it again"
        ) from error
    check_fit(module, weights)
    if mesh is not None and any(isinstance(lazy, Packed) for lazy in tensors.values()):
        raise ModelError(f"{weights.place} has quantised weights, which can't be spread over "
                         "devices; leave --shard out")
    tensors = _hold_quantized(module, weights, quantize, keep=stream)
    weights = Weights(tensors, dtype, keep_fp32)
    left = blocks_of(tensors) if stream or mesh is not None else {}
    packs_here = packed and device.type == "cpu" and packs(dtype)
    layers = {name: layer for name, layer in module.named_modules()
              if packs_here and type(layer) is nn.Linear}
    _fill(module, weights, set(chain.from_iterable(left.values())), device, layers, each)
    module.eval().requires_grad_(requires_grad=False)
    if left and mesh is not None:
        _shard_blocks(module, weights, device, mesh)
    elif left:
        stream_blocks(module, weights, device, layers)
    return module


def _hold_quantized(
    module: nn.Module, weights: Weights, quantize: Quantization | None, *, keep: bool,
) -> Tensors:
    """Make the layers of quantised weights hold them as stored, and return the module's tensors.

    With `quantize`, the weights of linear layers in blocks are quantised when they are read, or at
    once if the module will `keep` reading them.
    """
    tensors = Tensors()
    for name, lazy in weights.tensors.items():
        path, _, last = name.rpartition(".")
        tensors[name] = lazy
        if last != "weight" or not (quantize or isinstance(lazy, Packed)):
            continue
        layer, packed = module.get_submodule(path), lazy
        if quantize and not isinstance(packed, Packed) and block_of(name) and (
                type(layer) is nn.Linear):
            packed = quantized(lazy, quantize, at_once=keep)
            weights.tensors.release()
        if not isinstance(packed, Packed) or (
                not hold_quantized(layer, packed.packing, weights.dtype(name))):
            continue
        for part, stored in packed.parts.items():
            like = stored.likeness
            if part == "weight":
                layer.weight = nn.Parameter(like, requires_grad=False)
            else:
                layer.register_buffer(part, like)
            tensors[f"{path}.{part}"] = replace(stored, keeps_dtype=True)
    return tensors


def _shard_blocks(
    module: nn.Module, weights: Weights, device: torch.device, mesh: DeviceMesh
) -> None:
    """Shard a module's blocks over devices by FSDP2 (Zhao et al. 2023), for inference.

    Each device reads and holds its share of every block, and receives the other shares while the
    block runs. The module must run on all devices at the same time.
    """
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    resident = {p for p in module.parameters() if not p.is_meta}
    for path, names in blocks_of(weights.tensors).items():
        for name in names:
            assign(module, name, torch.empty(
                weights.shape(name), dtype=weights.dtype(name), device="meta"
            ))
        block = module.get_submodule(path)
        fully_shard(block, mesh=mesh)
        block.to_empty(device=device)
        shares = dict(block.named_parameters(prefix=path))
        for name in names:
            share = shares[name]
            assert isinstance(share, DTensor)
            own = share.to_local()
            mapped = weights.tensors[name].get()  # mapped, so only this device's share is read
            parts = mapped.chunk(mesh.size())
            if own.numel():
                own.copy_(parts[mesh.get_local_rank()])
        weights.tensors.release()
    fully_shard(module, mesh=mesh, ignored_params=resident)


def _fill(
    module: nn.Module, weights: Weights, left: set[str], device: torch.device,
    layers: Mapping[str, nn.Linear], each: Callable[[nn.Parameter], None] | None = None,
) -> None:
    """Load a module's weights except those `left` in the files, and pack its `layers`.

    Each layer is packed as soon as it is loaded, so that at most one is in memory in both forms.
    """
    mapped = weights.stay_mapped and device.type == "cpu" and not layers
    parameters = {name for name, _ in module.named_parameters()}
    read, often = 0, max(weights.tensors.num_bytes // 100, 1 << 20)
    for name, lazy in weights.tensors.items():
        if name in left:
            continue
        value = lazy.get()
        read += value.nbytes
        copy = lazy.is_mapped and not mapped
        assign(module, name, value.to(device, weights.dtype(name), copy=copy))
        del value
        layer = layers.get(name.removesuffix(".weight"))
        if layer is not None:
            pack(layer)
        if each is not None and name in parameters:
            each(module.get_parameter(name))
        if read > often and not mapped:  # free the mapped pages of weights that were copied
            weights.tensors.release()
            trim_memory()
            read = 0
    weights.tensors.release()
    trim_memory()
    empty = [
        name for name, value in chain(module.named_parameters(), module.named_buffers())
        if value.is_meta and name not in left
    ]
    assert not empty, f"on the meta device, but not in any file: {empty}"


def check_fit(module: nn.Module, weights: Weights) -> None:
    """Raise ModelError if names, shapes or dtypes of weights differ from a module's.

    The weights themselves are not read.
    """
    state = module.state_dict()
    expected = {name: tuple(value.shape) for name, value in state.items()}
    given = {name: weights.shape(name) for name in weights.tensors}
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
            f"{weights.place} doesn't match its config.json: tensors {'; '.join(problems)}; "
            "the two must come from the same model"
        )


def trim_memory() -> None:
    """Return freed memory to the system (glibc only).

    Before glibc 2.38 aligned allocations rarely fit into freed gaps, so that loading and quantising
    layers of a few megabytes could leave several times the weights' size in unused gaps.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)
