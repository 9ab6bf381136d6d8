"""What torch holds and multiplies at work, counted operation by operation."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)


class Live(TorchDispatchMode):
    """Counts the bytes of tensors that are alive, and the FLOPs of products."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = self.flops = 0
        self._seen = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in PRODUCTS:
            self.flops += 2 * out.numel() * args[-1].shape[-2]
        before = {id(a.untyped_storage()) for a in tree_leaves(args) if isinstance(a, torch.Tensor)}
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor) and id(value.untyped_storage()) not in before:
                self._add(value.untyped_storage())
        return out

    def _add(self, storage):
        if storage in self._seen:
            return
        self._seen[storage] = size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, size)

    def _drop(self, size):
        self.now -= size
