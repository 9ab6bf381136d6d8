"""Find quantised weights in files, as ComfyUI, Kijai, musubi-tuner and LightX2V write them.

Such a weight is several tensors: its numbers, their scales, and a description.

| writer | names next to `X.weight` |
|---|---|
| older ComfyUI, Kijai, musubi | `X.scale_weight`, perhaps `X.scale_input`; marker `scaled_fp8` |
| newer ComfyUI | `X.weight_scale`, `X.weight_scale_2`; `X.comfy_quant` or the header |
| LightX2V | `X.weight_scale`, one number for each row |

float8 without scales is ordinary floating point.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vidgen.core.errors import ModelError, nearest
from vidgen.ops.quantized import QUANTIZED, SCALE, WHOLE, Packing, Quantization, quantize
from vidgen.weights.tensors import Lazy, Tensors, joined_files

_WEIGHT = ".weight"
_HEADER = "_quantization_metadata"
"""Key of a safetensors header with the format of each layer."""
_MARKER = "scaled_fp8"
"""Name of a tensor whose dtype repeats that of the weights."""
_FACTS = ".comfy_quant"
_OLD_SCALE, _NEW_SCALE, _WHOLE = ".scale_weight", ".weight_scale", ".weight_scale_2"
_OF_INPUTS = (".scale_input", ".input_scale")
"""Scales of a product's other factor, which stays in floating point here."""
_PLAIN = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2,
          "int8_tensorwise": torch.int8}
_BLOCKS = {"mxfp8": 32, "nvfp4": 16}
"""Consecutive numbers of a row with a common scale."""
_FORMATS = (*_PLAIN, *_BLOCKS)
_KNOWN_FACTS = {"format", "full_precision_matrix_mult", "convrot", "convrot_groupsize"}
_NARROW = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)


@dataclass(frozen=True, eq=False)
class Packed(Lazy):
    """A quantised weight; `get` returns it in float32.

    Attributes:
        packing: its form.
        parts: stored tensors, by the names of a layer's parameter and buffers.
    """

    packing: Packing = field(kw_only=True)
    parts: Mapping[str, Lazy] = field(kw_only=True)

    @property
    def num_bytes(self) -> int:
        """Size as stored, in bytes."""
        return sum(part.num_bytes for part in self.parts.values())

    def bytes_as(self, dtype: torch.dtype) -> int:  # noqa: ARG002
        """Return the size in a module, which holds the parts as stored."""
        return self.num_bytes


def packed(packing: Packing, parts: Mapping[str, Lazy]) -> Packed:
    """Return a quantised weight from its stored parts."""

    def get() -> Tensor:
        return packing.widen({name: part.get() for name, part in parts.items()}, torch.float32)

    like = torch.empty(packing.shape, dtype=torch.float32, device="meta")
    return Packed(like, get, joined_files(parts.values()), packing=packing, parts=parts)


def quantized(lazy: Lazy, kind: Quantization, *, at_once: bool) -> Packed:
    """Return a plain matrix in quantised form, computed when it is read or `at_once`."""

    def parts() -> tuple[Tensor, Tensor]:
        if not made:
            made.extend(quantize(lazy.get(), kind))
        return made[0], made[1]

    def scale() -> Tensor:  # read after the numbers, so both are no longer needed
        value = parts()[1]
        if not at_once:
            made.clear()
        return value

    made: list[Tensor] = []
    if at_once:
        parts()
    shape, files = tuple(lazy.likeness.shape), () if at_once else lazy.files
    numbers = torch.empty(shape, dtype=QUANTIZED[kind][0], device="meta")
    rows = torch.empty(shape[0], 1, device="meta")
    return packed(Packing("scaled", shape), {
        "weight": Lazy(numbers, lambda: parts()[0], files), SCALE: Lazy(rows, scale, files)})


def find_packed(
    path: Path, stored: Mapping[str, Lazy], headers: Mapping[str, str],
) -> Tensors:
    """Replace the stored parts of quantised weights by the weights.

    Args:
        path: the file, for messages.
        stored: tensors by the names in the file.
        headers: metadata of the file.

    Raises:
        ModelError: an unknown format or property of one, or missing scales.
    """
    layers = _described(path, headers)
    made, used = Tensors(), {name for name in stored if name.split(".")[-1] == _MARKER}
    for name, lazy in stored.items():
        layer = name.removesuffix(_WEIGHT)
        found = _find(path, name, lazy, stored, layers)
        if found is not None:
            made[name] = packed(*found)
            used |= {layer + end for end in (
                _FACTS, _OLD_SCALE, _NEW_SCALE, _WHOLE, *_OF_INPUTS)}
    for name, lazy in stored.items():
        if name not in made and name not in used:
            made[name] = lazy
    return made


def _find(
    path: Path, name: str, lazy: Lazy, stored: Mapping[str, Lazy],
    layers: Mapping[str, Mapping[str, Any]],
) -> tuple[Packing, dict[str, Lazy]] | None:
    """Return the form and parts of a weight; None if it isn't quantised."""
    from vidgen.ops.dequantize import fits

    layer, like = name.removesuffix(_WEIGHT), lazy.likeness
    if layer != name:
        facts = layers.get(layer)
        if layer + _FACTS in stored:
            facts = _parsed(path, layer, bytes(stored[layer + _FACTS].get().tolist()))
        if facts is not None:
            return _from_facts(path, layer, lazy, facts, stored)
    for end in (_OLD_SCALE, _NEW_SCALE):
        scale = stored.get(layer + end)
        if (scale is not None and like.dtype in _NARROW and like.ndim > 1
                and fits(like.shape, scale.likeness.shape)):
            return Packing("scaled", tuple(like.shape)), {"weight": lazy, SCALE: scale}
    return None


def _from_facts(
    path: Path, layer: str, lazy: Lazy, facts: Mapping[str, Any], stored: Mapping[str, Lazy],
) -> tuple[Packing, dict[str, Lazy]]:
    """Return the form and parts of a layer that the file describes."""
    from vidgen.ops.dequantize import check_blocks, fits

    kind, unknown = str(facts.get("format")), sorted(facts.keys() - _KNOWN_FACTS)
    if kind not in _FORMATS:
        raise ModelError(f"{path}: the weights of {layer} have the format {kind!r}; "
                         f"{nearest(kind, _FORMATS)}")
    if unknown:
        raise ModelError(f"{path}: {layer} has {kind} weights with the property "
                         f"{' and '.join(unknown)}, which this version can't apply; use a file "
                         "without it, or a newer vidgen")
    try:
        group = int(facts.get("convrot_groupsize", 256)) if facts.get("convrot") else 0
    except (TypeError, ValueError):
        raise ModelError(f"{path}: {layer} has convrot_groupsize "
                         f"{str(facts['convrot_groupsize'])[:40]!r}; copy the file again"
                         ) from None
    if group and kind != "int8_tensorwise":
        raise ModelError(f"{path}: {layer} has rotated {kind} weights; vidgen reads rotated "
                         "weights in the format int8_tensorwise only")
    needed = {SCALE: layer + _NEW_SCALE}
    if kind == "nvfp4":
        needed[WHOLE] = layer + _WHOLE
    missing = [name for name in needed.values() if name not in stored]
    if missing:
        raise ModelError(f"{path}: {layer} has {kind} weights, but {' and '.join(missing)} is "
                         "missing; copy the file again")
    like = lazy.likeness
    expected = _PLAIN.get(kind, torch.uint8 if kind == "nvfp4" else torch.float8_e4m3fn)
    if like.dtype != expected:
        raise ModelError(f"{path}: the file describes {layer} as {kind}, but its weights are "
                         f"{str(like.dtype).removeprefix('torch.')}; copy the file again")
    rows, *columns = like.shape
    shape = (rows, 2 * columns[0]) if kind == "nvfp4" else (rows, *columns)
    packing = Packing("scaled" if kind in _PLAIN else kind, shape, group)
    scales = stored[needed[SCALE]].likeness.shape
    try:
        if kind in _BLOCKS:
            check_blocks(scales, rows, shape[1] // _BLOCKS[kind])
        elif not fits(like.shape, scales):
            raise ValueError(f"a scale of shape {list(scales)} for {list(shape)} numbers")
    except ValueError as error:
        raise ModelError(f"{path}: {layer} has {kind} weights with {error}; copy the file again"
                         ) from None
    return packing, {"weight": lazy, **{key: stored[name] for key, name in needed.items()}}


def _described(path: Path, headers: Mapping[str, str]) -> dict[str, Mapping[str, Any]]:
    """Return the header's description of each layer, by its name."""
    if _HEADER not in headers:
        return {}
    layers = _parsed(path, _HEADER, headers[_HEADER].encode()).get("layers", {})
    if not isinstance(layers, dict) or not all(isinstance(v, dict) for v in layers.values()):
        raise ModelError(f"{path}: {_HEADER} has no layers; copy the file again")
    return layers


def _parsed(path: Path, where: str, text: bytes) -> dict[str, Any]:
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        raise ModelError(f"{path}: {where} isn't JSON ({str(error)[:100]}); copy the file again"
                         ) from error
