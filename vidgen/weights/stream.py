"""Stream the weights of blocks from files, one block ahead of use.

A forward pass runs its blocks one after another, so memory for two is enough: while one computes, a
thread reads the next from the mapped file and casts it. On a GPU, weights are copied from pinned
memory on a separate CUDA stream. Results equal those of a module in memory, bit for bit.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from vidgen.ops.linear import PackedLinear, packed_weight

if TYPE_CHECKING:
    from vidgen.weights.tensors import Weights

_BLOCK = re.compile(r"(\D+\.\d+)\..+")
_ALIGN = 256
"""Alignment of each weight, in bytes: CUDA's allocator's, and more than CPU vectors need."""


def block_of(name: str) -> str | None:
    """Return the path of a weight's block, or None: `blocks.3` for `blocks.3.ffn.up.weight`."""
    match = _BLOCK.fullmatch(name)
    return match[1] if match else None


def blocks_of(names: Iterable[str]) -> dict[str, list[str]]:
    """Group names of weights by their block's path, without weights outside of blocks."""
    blocks: dict[str, list[str]] = {}
    for name in names:
        block = block_of(name)
        if block is not None:
            blocks.setdefault(block, []).append(name)
    return blocks


def assign(module: nn.Module, name: str, value: Tensor) -> None:
    """Replace the module's parameter or buffer `name` by a tensor."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        assert leaf in owner._buffers, name
        owner._buffers[leaf] = value


class _Place(NamedTuple):
    """A weight's place in its block's memory; `offset` is in bytes."""

    name: str
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def view(self, memory: Tensor) -> Tensor:
        size = torch.Size(self.shape).numel() * self.dtype.itemsize
        return memory[self.offset : self.offset + size].view(self.dtype).view(self.shape)


class _Slot:
    """Memory for one block's weights, and on a GPU pinned memory to copy them from.

    `arrived` and `left` mark the end of the last copy into the memory and of its last use. Weights
    in oneDNN's layout have memory of their own, `packed`.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.device, self.on_gpu = device, device.type == "cuda"
        self.memory = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self.packed: dict[str, Tensor] = {}
        self.staging = self.memory
        if self.on_gpu:
            self.staging = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
            self.arrived, self.left = torch.cuda.Event(), torch.cuda.Event()
            self.leave()  # the allocator may have given memory that earlier work still uses

    def send(self, side: torch.cuda.Stream | None) -> None:
        """Copy the staged weights on the stream `side`, after the last use of the memory."""
        if side is not None:
            side.wait_event(self.left)
            with torch.cuda.stream(side):
                self.memory.copy_(self.staging, non_blocking=True)
            self.memory.record_stream(side)
            self.arrived.record(side)

    def wait_staging(self) -> None:
        if self.on_gpu:
            self.arrived.synchronize()

    def wait_arrival(self) -> None:
        if self.on_gpu:
            torch.cuda.current_stream(self.device).wait_event(self.arrived)

    def leave(self) -> None:
        if self.on_gpu:
            self.left.record(torch.cuda.current_stream(self.device))


class BlockStream:
    """Assign each block's weights before its forward pass, and remove them after it.

    Args:
        module: its blocks are on the meta device. They run one at a time; the next block is
            fetched ahead if their order is that of the previous pass.
        packed: linear layers whose weights are packed, by path; see `ops.linear`.
    """

    def __init__(
        self, module: nn.Module, weights: Weights, device: torch.device,
        packed: Mapping[str, nn.Linear] = {},
    ) -> None:
        self._module, self._weights = module, weights
        blocks = blocks_of(weights.tensors)
        matrices = {f"{path}.weight" for path in packed}
        self._packed = [[name for name in names if name in matrices] for names in blocks.values()]
        self._places = [self._lay_out([name for name in names if name not in matrices])
                        for names in blocks.values()]
        for name in chain.from_iterable(self._packed):
            packed[name.removesuffix(".weight")].__class__ = PackedLinear
        meta = module.state_dict(keep_vars=True)
        self._meta = [{name: meta[name] for name in names} for names in blocks.values()]
        self._after = [(i + 1) % len(blocks) for i in range(len(blocks))]
        size = max(_end(places) for places in self._places)
        self._used, self._next = _Slot(size, device), _Slot(size, device)
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="block-stream")
        self._ahead: tuple[int, Future[None]] | None = None
        self._last: int | None = None
        self._inside: int | None = None
        self._hooks: list[Any] = []
        for i, path in enumerate(blocks):
            self._hook(module.get_submodule(path), i)

    def close(self) -> None:
        """Stop the thread and free the memory; the module can't run any more."""
        self._thread.shutdown(cancel_futures=True)
        for hook in self._hooks:
            hook.remove()
        self._ahead = None
        del self._used, self._next

    def _lay_out(self, names: list[str]) -> list[_Place]:
        places: list[_Place] = []
        for name in names:
            shape, dtype = self._weights.shape(name), self._weights.dtype(name)
            places.append(_Place(name, _end(places), shape, dtype))
        return places

    def _hook(self, block: nn.Module, index: int) -> None:
        self._hooks += [
            block.register_forward_pre_hook(lambda *_: self._enter(index), prepend=True),
            block.register_forward_hook(lambda *_: self._leave(index), always_call=True),
        ]

    def _enter(self, index: int) -> None:
        """Assign a block's weights and start to fetch the next block's."""
        if self._inside is not None:  # KeyboardInterrupt skips the hook after a block
            self._leave(self._inside)
        if self._ahead is None or self._ahead[0] != index:
            if self._ahead is not None:
                wait([self._ahead[1]])
            self._ahead = self._fetch(index)
        (_, fetched), self._ahead = self._ahead, None
        fetched.result()
        self._used, self._next = self._next, self._used
        self._used.wait_arrival()
        self._inside = index
        for place in self._places[index]:
            assign(self._module, place.name, place.view(self._used.memory))
        for name, value in self._used.packed.items():
            assign(self._module, name, value)
        if self._last is not None:
            self._after[self._last] = index
        self._last = index
        self._ahead = self._fetch(self._after[index])

    def _leave(self, index: int) -> None:
        for name, value in self._meta[index].items():
            assign(self._module, name, value)
        self._used.leave()
        self._inside = None

    def _fetch(self, index: int) -> tuple[int, Future[None]]:
        return index, self._thread.submit(self._load, index, self._next)

    def _load(self, index: int, slot: _Slot) -> None:
        """Read and cast a block's weights; runs in the thread."""
        slot.wait_staging()
        for place in self._places[index]:
            place.view(slot.staging).copy_(self._weights.tensors[place.name].get())
        slot.packed = {}  # frees the earlier block's
        for name in self._packed[index]:
            value = self._weights.tensors[name].get().to(self._weights.dtype(name))
            slot.packed[name] = packed_weight(value)
        self._weights.tensors.release()  # otherwise the file's pages stay in memory
        slot.send(self._side)


def stream_blocks(
    module: nn.Module, weights: Weights, device: torch.device,
    packed: Mapping[str, nn.Linear] = {},
) -> BlockStream:
    """Stream the weights of a module's blocks, which are on the meta device.

    The caller closes the stream, which is also the module's attribute `block_stream`. A forward
    pass raises ModelError if a file can no longer be read.
    """
    stream = BlockStream(module, weights, device, packed)
    module.__dict__["block_stream"] = stream  # not registered as a submodule
    return stream


def _end(places: list[_Place]) -> int:
    """Return the aligned end, in bytes, of the last place."""
    if not places:
        return 0
    last = places[-1]
    end = last.offset + torch.Size(last.shape).numel() * last.dtype.itemsize
    return -(-end // _ALIGN) * _ALIGN
