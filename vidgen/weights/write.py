"""Write files of tensors with one tensor in memory at a time.

A safetensors file consists of the header's length (8 bytes, little-endian), the header as JSON
(dtype, shape and offsets of each tensor), and the data.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from vidgen.weights.tensors import Lazy

MAX_SHARD_BYTES = 5_000_000_000
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}
_CHUNK = 1 << 26


def write_safetensors(path: Path, tensors: Mapping[str, Lazy]) -> None:
    """Write a safetensors file and sync it to disk."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, lazy in tensors.items():
        like = lazy.likeness
        header[name] = {
            "dtype": _DTYPES[like.dtype], "shape": list(like.shape),
            "data_offsets": [end, end + like.nbytes],
        }
        end += like.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for lazy in tensors.values():
            if not lazy.likeness.nbytes:
                continue
            data = lazy.get().detach().contiguous().reshape(-1).view(torch.uint8)
            for start in range(0, len(data), _CHUNK):
                file.write(data[start : start + _CHUNK].numpy().data)
        file.flush()
        os.fsync(file.fileno())


def write_shards(
    folder: Path, stem: str, tensors: Mapping[str, Lazy], max_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write `STEM.safetensors`, or several shards with an index if it would exceed `max_bytes`.

    A shard exceeds `max_bytes` only if it consists of a single tensor.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Lazy]] = [{}]
    size = total = 0
    for name, lazy in tensors.items():
        num_bytes = lazy.likeness.nbytes
        if shards[-1] and size + num_bytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = lazy
        size, total = size + num_bytes, total + num_bytes
    if len(shards) == 1:
        write_safetensors(folder / f"{stem}.safetensors", shards[0])
        return
    weight_map: dict[str, str] = {}
    for index, shard in enumerate(shards, 1):
        name = f"{stem}-{index:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, shard)
        weight_map |= dict.fromkeys(shard, name)
    listing = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / f"{stem}.safetensors.index.json", listing)


def write_pth(path: Path, tensors: Mapping[str, Lazy]) -> None:
    """Write a plain state dict for `torch.load(weights_only=True)`, and sync it to disk.

    Mapped tensors stay mapped while they are written.
    """
    with path.open("wb") as file:
        torch.save({name: lazy.get().contiguous() for name, lazy in tensors.items()}, file)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, content: object) -> None:
    """Write an indented JSON file, and create its folder if necessary."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")
