"""LoRA adapters, attached to a module temporarily without changing its weights (Hu et al. 2021).

W + scale * up @ down is never computed: a layer adds `scale * up(down(x))` to its output, and
reading a parameter with a full delta returns their sum. While adapters are attached, layers are
instances of subclasses that do this; parameters keep their tensors and names, so that streamed,
quantised and compiled weights keep working.

Axes: r rank, L tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol, cast

from torch import Tensor, nn
from torch.nn import functional as F

from vidgen.core.errors import ModelError
from vidgen.models.dit_blocks import PatchEmbedding
from vidgen.ops.linear import plain
from vidgen.ops.quantized import Quantized


@dataclass(frozen=True, eq=False)
class LowRank:
    """Low-rank delta of a layer, scale * up @ down (Hu et al. 2021, eq. 3; scale is alpha / r).

    `up` is [out, r] and `down` [r, in]; a patch embedding's `down` may have the shape of its
    convolution, [r, C, 1, p, p].
    """

    down: Tensor
    up: Tensor
    scale: float = 1.0


@dataclass(frozen=True, eq=False)
class Adapter:
    """The changes that one LoRA makes to a module.

    Args:
        low_rank: low-rank deltas, by the layer's path.
        deltas: full deltas, by the parameter's name.
        tokens: learned embeddings [D] of tokens, by the token as written in prompts; they are for
            the text encoder, and `attached` ignores them.
    """

    name: str
    low_rank: Mapping[str, LowRank]
    deltas: Mapping[str, Tensor] = field(default_factory=dict)
    tokens: Mapping[str, Tensor] = field(default_factory=dict)


def find_misfits(adapter: Adapter, module: nn.Module) -> list[str]:
    """List the parts of an adapter that match no layer or parameter of a module, or its shape."""
    layers, parameters = dict(module.named_modules()), dict(module.named_parameters())
    found = []
    for path, part in adapter.low_rank.items():
        layer = layers.get(path)
        if layer is None or not _is_linear(layer):
            found.append(f"{path}: no linear layer")
            continue
        out, *rest = _shape(layer)
        width, down, up = math.prod(rest), part.down, part.up
        if down.ndim < 2 or up.ndim != 2 or not down.shape[0] == up.shape[1] > 0:
            found.append(f"{path}: ranks of {list(down.shape)} and {list(up.shape)} differ")
        elif down[0].numel() != width or up.shape[0] != out:
            given = f"{up.shape[0]}x{down[0].numel()}"
            found.append(f"{path}: {given} for {out}x{width}")
    for name, delta in adapter.deltas.items():
        path, _, last = name.rpartition(".")
        if name not in parameters:
            found.append(f"{name}: no such parameter")
        elif delta.shape != (shape := _shape(layers[path], last)):
            found.append(f"{name}: {list(delta.shape)} for {list(shape)}")
    return found


@contextmanager
def attached(module: nn.Module, adapters: Sequence[tuple[Adapter, float]]) -> Iterator[None]:
    """Attach adapters, each with its weight, to a module within a `with` block.

    `with` blocks may be nested: inner adapters add to the outer ones. Weights may be negative; an
    adapter of weight 0 changes nothing. Low-rank parts that require gradients get them. Compiled
    blocks are compiled again for their first adapters, and reuse that for later ones with deltas of
    the same parameters. No other thread may run the module at the same time.

    Raises:
        ModelError: an adapter doesn't fit the module.
    """
    active = [(adapter, weight) for adapter, weight in adapters if weight]
    for adapter, _ in active:
        misfits = find_misfits(adapter, module)
        if misfits:
            raise ModelError(
                f"LoRA {adapter.name!r} doesn't fit these weights: {name_some(misfits)}; "
                "use one that was trained for this model"
            )
    parts = _gather(module, active)
    before = [(layer, type(layer), layer.__dict__.get("_parts")) for layer in parts]
    try:
        for layer, own in parts.items():
            layer.__dict__["_parts"] = own
            base, deltas = getattr(layer, "adapted_base", type(layer)), frozenset(own.deltas)
            layer.__class__ = _adapted(base, deltas, low_rank=_is_linear(layer))  # type: ignore[arg-type]
        yield
    finally:
        for layer, earlier, outer in before:
            layer.__class__ = earlier
            if outer is None:
                layer.__dict__.pop("_parts", None)
            else:
                layer.__dict__["_parts"] = outer


def name_some(items: Sequence[str]) -> str:
    """Join the first five of several names, followed by the number of the others."""
    more = f", and {len(items) - 5} more" if len(items) > 5 else ""
    return ", ".join(items[:5]) + more


@dataclass(eq=False)
class _Parts:
    """A layer's low-rank parts (down [r, in], up [out, r], scale) and summed deltas."""

    low_rank: list[tuple[Tensor, Tensor, float]]
    deltas: dict[str, Tensor]


class _Adapted(Protocol):
    adapted_base: type[nn.Module]
    _parts: _Parts
    _parameters: Mapping[str, Tensor]


def _is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, (nn.Linear, PatchEmbedding))


def _stored(layer: nn.Module, name: str) -> Tensor:
    """Return a layer's parameter as stored; the attribute would add attached deltas."""
    return dict(layer.named_parameters(recurse=False))[name]


def _shape(layer: nn.Module, name: str = "weight") -> tuple[int, ...]:
    """Return the shape of a parameter, for a quantised one that of its matrix."""
    if name == "weight" and isinstance(layer, Quantized):
        return layer.packing.shape
    return tuple(_stored(layer, name).shape)


def _gather(
    module: nn.Module, adapters: Sequence[tuple[Adapter, float]]
) -> dict[nn.Module, _Parts]:
    """Collect the parts of each layer, earlier ones included, in its dtype and on its device."""
    found: dict[nn.Module, _Parts] = {}
    resident = next((p.device for p in module.parameters() if not p.is_meta), None)

    def parts_of(layer: nn.Module) -> _Parts:
        if layer not in found:
            old = layer.__dict__.get("_parts") or _Parts([], {})
            found[layer] = _Parts([*old.low_rank], {**old.deltas})
        return found[layer]

    def placed(tensor: Tensor, layer: nn.Module, name: str = "weight") -> Tensor:
        if tensor.requires_grad:  # a copy would keep its graph from one step to the next
            return tensor
        like = _stored(layer, name)
        dtype = layer.dtype if isinstance(layer, Quantized) else like.dtype
        streamed = like.is_meta  # streamed weights are loaded later, to the others' device
        return tensor.to(resident if streamed else like.device, dtype)

    for adapter, weight in adapters:
        for path, part in adapter.low_rank.items():
            layer = module.get_submodule(path)
            down, up = placed(part.down.flatten(1), layer), placed(part.up, layer)
            parts_of(layer).low_rank.append((down, up, weight * part.scale))
        for name, delta in adapter.deltas.items():
            path, _, last = name.rpartition(".")
            layer = module.get_submodule(path)
            change, deltas = placed(weight * delta.float(), layer, last), parts_of(layer).deltas
            deltas[last] = deltas[last] + change if last in deltas else change
    return found


@lru_cache(maxsize=64)
def _adapted(base: type[nn.Module], deltas: frozenset[str], *, low_rank: bool) -> type[nn.Module]:
    """Return a subclass that adds deltas to some parameters and low-rank products to the output.

    Equal layers share the class, so that torch.compile compiles them once.
    """
    body: dict[str, Any] = {name: _summed(name) for name in deltas}
    body["adapted_base"] = base
    if low_rank:
        body["forward"] = _forward
    return type(base.__name__, (base,), body)


def _summed(name: str) -> property:
    def read(layer: _Adapted) -> Tensor:
        weight = plain(cast("nn.Module", layer), name)
        return weight + layer._parts.deltas[name].to(weight)

    return property(read)


def _forward(layer: _Adapted, x: Tensor) -> Tensor:
    """Map x [..., L, in] to [..., L, out], and add each adapter's product."""
    out: Tensor = layer.adapted_base.forward(layer, x)
    for down, up, scale in layer._parts.low_rank:
        hidden = F.linear(x.to(out.dtype), down.to(out)) * scale
        out.view(-1, out.shape[-1]).addmm_(hidden.view(-1, hidden.shape[-1]), up.to(out).t())
    return out
