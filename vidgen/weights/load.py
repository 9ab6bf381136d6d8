"""Modules built on the meta device and given their tensors from files, and written back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from vidgen.core.config import dump
from vidgen.core.errors import ModelError
from vidgen.core.runtime import atomic_path, atomic_write

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


def load_module(
    make: Callable[[], Module],
    folder: Path,
    dtype: torch.dtype,
    device: torch.device | str,
    keep_fp32: tuple[str, ...] = (),
) -> Module:
    """Build a module without memory, then give it the file's tensors.

    Args:
        make: builds the module; called on the meta device.
        folder: of the component, with `model.safetensors`.
        dtype: of floating-point weights.
        device: where they end up.
        keep_fp32: parts of names of weights that stay float32.

    Raises:
        ModelError: missing or surplus keys, wrong shapes, unreadable file; names them.
    """
    path = folder / "model.safetensors"
    with torch.device("meta"):
        module = make()
    tensors = read_tensors(path)
    expected = {name: value.shape for name, value in module.state_dict().items()}
    missing = sorted(expected.keys() - tensors.keys())
    surplus = sorted(tensors.keys() - expected.keys())
    shapes = [
        f"{name}: {list(tensors[name].shape)} for {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    problems = [
        f"{len(found)} {what} ({', '.join(found[:5])}{', ...' if len(found) > 5 else ''})"
        for what, found in (("missing", missing), ("surplus", surplus), ("of wrong shape", shapes))
        if found
    ]
    if problems:
        raise ModelError(
            f"{path} doesn't fit its config.json: tensors {'; '.join(problems)}; "
            "the two files must come from the same model"
        )
    for name, value in tensors.items():
        kept = torch.float32 if any(part in name for part in keep_fp32) else dtype
        tensors[name] = value.to(device, kept if value.is_floating_point() else value.dtype)
    module.load_state_dict(tensors, assign=True)
    return module.eval().requires_grad_(requires_grad=False)


def save_module(
    state: dict[str, torch.Tensor], config: Any, folder: Path, dtype: torch.dtype
) -> None:
    """Write a component folder: `config.json` (dataclass or mapping) and `model.safetensors`."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = config if isinstance(config, dict) else dump(config)
    tensors = {
        name: value.detach().to("cpu", dtype if value.is_floating_point() else value.dtype)
        .contiguous()
        for name, value in state.items()
    }
    atomic_write(folder / "config.json", (json.dumps(settings, indent=1) + "\n").encode())
    with atomic_path(folder / "model.safetensors") as temporary:
        save_file(tensors, temporary)
        temporary.chmod(0o644)
