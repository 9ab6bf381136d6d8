"""Stream the weights of blocks from files, one block ahead of use.

A forward pass runs its blocks one after another, so memory for two is enough: while one computes, a
thread reads the next from the mapped file and casts it. On a GPU the copy runs on a stream of its
own from pinned memory. The results are those of a module in memory, bit for bit.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from vidgen.weights.store import Weights

_BLOCK = re.compile(r"(\D+\.\d+)\..+")
_ALIGN = 256
"""Bytes; the alignment of CUDA's allocator, and more than that of any CPU's vectors."""


def block_of(name: str) -> str | None:
    """Return the path of a weight's block, `blocks.3` for `blocks.3.ffn.up.weight`."""
    match = _BLOCK.fullmatch(name)
    return match[1] if match else None


def blocks_of(names: Iterable[str]) -> dict[str, list[str]]:
    """Group names of weights by their block; others are left out."""
    blocks: dict[str, list[str]] = {}
    for name in names:
        block = block_of(name)
        if block is not None:
            blocks.setdefault(block, []).append(name)
    return blocks


def assign(module: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter or buffer by a tensor."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        assert leaf in owner._buffers, name
        owner._buffers[leaf] = value


class _Place(NamedTuple):
    name: str
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def view(self, memory: Tensor) -> Tensor:
        size = torch.Size(self.shape).numel() * self.dtype.itemsize
        return memory[self.offset : self.offset + size].view(self.dtype).view(self.shape)


class _Slot:
    """Memory for one block, and pinned memory for a GPU's copies."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.device, self.on_gpu = device, device.type == "cuda"
        self.memory = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self.staging = self.memory
        if self.on_gpu:
            self.staging = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
            self.arrived, self.left = torch.cuda.Event(), torch.cuda.Event()
            self.leave()  # after whatever used this memory before

    def send(self, side: torch.cuda.Stream | None) -> None:
        """Copy the staged weights, after the last computation with this memory."""
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
    """Assigns each block's weights before its forward pass and removes them after it.

    Args:
        module: with blocks on the meta device; it runs one at a time, in any order that repeats.
    """

    def __init__(self, module: nn.Module, weights: Weights, device: torch.device) -> None:
        self._module, self._weights = module, weights
        blocks = blocks_of(weights.tensors)
        self._places = [self._lay_out(names) for names in blocks.values()]
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
        """Assign a block's weights and fetch the next block's."""
        if self._inside is not None:  # Ctrl-C skips the hook that leaves a block
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
        """Read and cast a block's weights, in the thread."""
        slot.wait_staging()
        for place in self._places[index]:
            place.view(slot.staging).copy_(self._weights.tensors[place.name].get())
        self._weights.tensors.release()  # or the file's pages stay in memory
        slot.send(self._side)


def stream_blocks(module: nn.Module, weights: Weights, device: torch.device) -> BlockStream:
    """Stream a module's blocks, which are on the meta device; return the stream, to be closed.

    It is also the module's attribute `block_stream`. The forward pass raises ModelError if a file
    can't be read any more.
    """
    stream = BlockStream(module, weights, device)
    module.__dict__["block_stream"] = stream  # not a submodule
    return stream


def _end(places: list[_Place]) -> int:
    if not places:
        return 0
    last = places[-1]
    end = last.offset + torch.Size(last.shape).numel() * last.dtype.itemsize
    return -(-end // _ALIGN) * _ALIGN
