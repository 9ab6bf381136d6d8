"""Views of stores: chosen tensors, some of them parts of larger ones.

Wan's published CLIP fuses its projections and has a text tower, too; a view splits it into the
tensors of transformers' vision tower, and they are fused again when written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import itemgetter

import torch
from torch import Tensor

from vidgen.weights.store import TensorStore
from vidgen.weights.write import Lazy

Change = Callable[[Tensor], Tensor]
_FUSED = ".attn.to_qkv."
_SPLIT = (".attn.to_q.", ".attn.to_k.", ".attn.to_v.")
_CLASS, _POSITIONS = "visual.cls_embedding", "visual.pos_embedding"


@dataclass(frozen=True)
class Source:
    """A tensor of a store, or a part of it."""

    store: TensorStore
    name: str
    part: Change | None = None

    @property
    def likeness(self) -> Tensor:
        """An empty tensor of its shape and dtype on the meta device."""
        shape, dtype = self.store.shape(self.name), self.store.dtype(self.name)
        whole = torch.empty(shape, dtype=dtype, device="meta")
        return whole if self.part is None else self.part(whole)

    def get(self) -> Tensor:
        """Return the tensor, mapped."""
        value = self.store.get(self.name)
        return value if self.part is None else self.part(value)


@dataclass(frozen=True)
class Joined:
    """A tensor made of several, or a reshaped one."""

    parts: tuple[Lazy, ...]
    make: Callable[..., Tensor]

    @property
    def likeness(self) -> Tensor:
        """An empty tensor of its shape and dtype on the meta device."""
        return self.make(*(part.likeness for part in self.parts))

    def get(self) -> Tensor:
        """Return the tensor."""
        return self.make(*(part.get() for part in self.parts))


class View(TensorStore):
    """Chosen tensors of one or more stores under other names."""

    def __init__(self, sources: Mapping[str, Source]) -> None:
        stores = list({id(s.store): s.store for s in sources.values()}.values())
        super().__init__(list(dict.fromkeys(path for store in stores for path in store.files)))
        self._sources, self._stores = dict(sources), stores
        self._likenesses: dict[str, Tensor] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """All names, in the order given."""
        return tuple(self._sources)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        return tuple(self._likeness(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        """Return the stored dtype of a tensor without reading it."""
        return self._likeness(name).dtype

    def is_mapped(self, name: str) -> bool:
        """Return whether `get` returns a tensor in the mapped file."""
        source = self._sources[name]
        return source.store.is_mapped(source.name)

    @property
    def num_bytes(self) -> int:
        """Bytes of all chosen tensors as stored."""
        return sum(self._likeness(name).nbytes for name in self._sources)

    def get(self, name: str) -> Tensor:
        """Return a tensor on the CPU."""
        return self._sources[name].get()

    def release(self) -> None:
        """Close the files; `get` reopens them."""
        for store in self._stores:
            store.release()

    def source(self, name: str) -> Source:
        """Return the source of a tensor."""
        return self._sources[name]

    def _likeness(self, name: str) -> Tensor:
        if name not in self._likenesses:
            self._likenesses[name] = self._sources[name].likeness
        return self._likenesses[name]


def split_clip(store: TensorStore) -> TensorStore:
    """Split the fused projections of Wan's CLIP, and reshape its embeddings as in transformers.

    Any other store is returned as it is.
    """
    if _CLASS not in store.names:
        return store
    sources = {}
    for name in store.names:
        if _FUSED in name:
            for index, part in enumerate(_SPLIT):
                sources[name.replace(_FUSED, part)] = Source(store, name, _third(index))
        elif name in (_CLASS, _POSITIONS):
            sources[name] = Source(store, name, torch.flatten if name == _CLASS else itemgetter(0))
        else:
            sources[name] = Source(store, name)
    return View(sources)


def fuse_clip(tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """Undo `split_clip`."""
    made: dict[str, Lazy] = {}
    for name, source in tensors.items():
        if name == _CLASS:
            made[name] = Joined((source,), lambda value: value[None, None])
        elif name == _POSITIONS:
            made[name] = Joined((source,), lambda value: value[None])
        elif _SPLIT[0] in name:
            parts = tuple(tensors[name.replace(_SPLIT[0], part)] for part in _SPLIT)
            made[name.replace(_SPLIT[0], _FUSED)] = Joined(parts, lambda *qkv: torch.cat(qkv))
        elif not any(part in name for part in _SPLIT):
            made[name] = source
    return made


def _third(index: int) -> Change:
    return lambda tensor: tensor.chunk(3)[index]
