"""LoRA files written in any dialect."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vidgen.core.errors import InputError, ModelError, nearest
from vidgen.core.runtime import atomic_path, atomic_write, write_error
from vidgen.models.lora import Adapter, name_some
from vidgen.weights.keymap import DIT_KEYS, rename
from vidgen.weights.lora import EXPERT_HEADER, Expert
from vidgen.weights.lora_dialects import DIALECTS, TOKEN, Dialect, flat
from vidgen.weights.store import in_int8


def write_lora(
    adapter: Adapter, path: str | Path, dialect: str, int8_from: int | None = None,
    expert: Expert | None = None,
) -> None:  # fmt: skip
    """Write an adapter as a safetensors file, or as PEFT's folder.

    Where a dialect has no alpha, scales go into the second factor, as float32 where its own dtype
    can't hold the product.

    Args:
        adapter: its tensors keep their dtype.
        path: replaced if it exists.
        dialect: one of `DIALECTS`.
        int8_from: numbers of a matrix that lies there in int8, as only we read it; None: none do.
        expert: which of two experts it was learned for, as the file is to say; None: nothing.

    Raises:
        InputError: unknown dialect.
        ModelError: what the dialect has no name for: number and first names.
        OutputError: it can't be written.
    """
    if dialect not in DIALECTS:
        raise InputError(f"unknown LoRA dialect {dialect!r}; {nearest(dialect, DIALECTS)}")
    tensors = _spell(adapter, DIALECTS[dialect], dialect)
    if int8_from is not None:
        tensors = in_int8(tensors, int8_from)
    target = Path(path)
    header = {"format": "pt"} | ({} if expert is None else {EXPERT_HEADER: expert})
    if dialect != "peft":
        with atomic_path(target) as temporary:
            save_file(tensors, temporary, metadata=header)
        return
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(target, error) from error
    with atomic_path(target / "adapter_model.safetensors") as temporary:
        save_file(tensors, temporary, metadata=header)
    config = _peft_config(tensors, DIALECTS[dialect].prefix)
    atomic_write(target / "adapter_config.json", (json.dumps(config, indent=1) + "\n").encode())


def _spell(adapter: Adapter, dialect: Dialect, title: str) -> dict[str, Tensor]:
    """Tensors under a dialect's names; embeddings of tokens have ours in all of them."""
    tensors = {f"{TOKEN}{token}": row.detach().cpu() for token, row in adapter.tokens.items()}
    unnamed: list[str] = []

    def put(path: str, what: str, tensor: Tensor) -> None:
        spelled: str | None = path
        if dialect.spelling != "vidgen":
            spelled = rename(path, DIT_KEYS, "vidgen", dialect.spelling)
        if spelled is None:
            unnamed.append(path)
        else:
            layer = flat(spelled) if dialect.flat else spelled
            tensors[f"{dialect.prefix}{layer}.{what}"] = tensor.detach().cpu().contiguous()

    left = dict(adapter.deltas)
    needs_bias = not dialect.diffs and any(f"{p}.bias" in left for p in adapter.low_rank)
    for path, part in adapter.low_rank.items():
        down, up = part.down, part.up if dialect.alpha else _scaled(part.up, part.scale)
        put(path, f"{dialect.sides[0]}.weight", down)
        put(path, f"{dialect.sides[1]}.weight", up.reshape(*up.shape, *(1,) * (down.ndim - 2)))
        if dialect.alpha:
            put(path, "alpha", torch.tensor(part.scale * down.shape[0]))
        if needs_bias:  # PEFT has them for all layers or for none
            bias = left.pop(f"{path}.bias", up.new_zeros(up.shape[0]))
            put(path, f"{dialect.sides[1]}.bias", bias)
    for name, delta in left.items():
        path, _, last = name.rpartition(".")
        if not dialect.diffs:
            unnamed.append(name)
        elif last in ("weight", "bias"):
            put(path, "diff" if last == "weight" else "diff_b", delta)
        else:
            put(name, "diff", delta)
    if unnamed:
        raise ModelError(
            f"the dialect {title!r} has no names for {len(unnamed)} parts of LoRA "
            f"{adapter.name!r} ({name_some(unnamed)}); write it as 'vidgen'"
        )
    return tensors


def _scaled(up: Tensor, scale: float) -> Tensor:
    exact = up.double() * scale
    kept = exact.to(up.dtype)
    return kept if torch.equal(kept.double(), exact) else exact.float()


def _peft_config(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    """`adapter_config.json` of layers whose alpha is their rank.

    Patterns are expressions that a path may end with, so those of a whole path begin with "^":
    `proj_out` is `vace_blocks.0.proj_out`, too.
    """
    ranks = {
        name.removeprefix(prefix).removesuffix(".lora_A.weight"): tensor.shape[0]
        for name, tensor in tensors.items()
        if name.endswith(".lora_A.weight")
    }
    first = next(iter(ranks.values()), 1)
    others = {f"^{layer}": rank for layer, rank in ranks.items() if rank != first}
    return {
        "peft_type": "LORA", "r": first, "lora_alpha": first, "rank_pattern": others,
        "alpha_pattern": others, "target_modules": sorted(ranks), "bias": "none",
        "lora_bias": any(name.endswith(".lora_B.bias") for name in tensors),
        "inference_mode": True, "base_model_name_or_path": None, "task_type": None,
    }
