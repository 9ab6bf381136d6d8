"""Write parts of a model's folder: a network with its config, a few-step student, file hashes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vidgen.core.config import dump
from vidgen.core.runtime import atomic_path, atomic_write
from vidgen.models.lora import Adapter
from vidgen.weights.component import ExpertRole
from vidgen.weights.configs import read_json
from vidgen.weights.folder import FEW_STEP, FEW_STEP_WEIGHTS, FewStepConfig, write_info
from vidgen.weights.lora import spelled
from vidgen.weights.store import SCALE

INT8_FROM = 1 << 10
"""Numbers from which a student's factor is stored in int8; smaller ones save nothing."""


def save_module(
    state: dict[str, Tensor], config: Any, folder: Path, dtype: torch.dtype,
    int8_from: int | None = None,
) -> None:
    """Write a component folder: `config.json` (dataclass or mapping) and `model.safetensors`.

    Matrices and kernels of `int8_from` numbers or more are stored in int8, half as large.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = config if isinstance(config, dict) else dump(config)
    tensors = {
        name: value.detach().to("cpu", dtype if value.is_floating_point() else value.dtype)
        .contiguous()
        for name, value in state.items()
    }
    _write_tensors(tensors, folder / "model.safetensors", int8_from)
    atomic_write(folder / "config.json", (json.dumps(settings, indent=1) + "\n").encode())


def write_few_step(
    adapter: Adapter, config: FewStepConfig, model: Path, part: ExpertRole = "transformer"
) -> None:
    """Write a delta, in int8, and its config into a model's folder, but not `model.json`.

    Raises:
        OutputError: it can't be written.
    """
    folder = model / FEW_STEP
    folder.mkdir(parents=True, exist_ok=True)
    tensors = spelled(adapter, "vidgen")
    _write_tensors(tensors, folder / FEW_STEP_WEIGHTS[part], INT8_FROM, {"format": "pt"})
    atomic_write(folder / "config.json", (json.dumps(asdict(config), indent=1) + "\n").encode())


def record_files(path: Path, names: Iterable[str]) -> None:
    """Record the hashes of these files in `path`'s `model.json`, after they were written.

    Those of the others stay, so that damage to one of them still shows.

    Raises:
        ModelError: there is no `model.json`, or it can't be read.
    """
    write_info(path, read_json(path / "model.json"), names)


def in_int8(tensors: Mapping[str, Tensor], least: int) -> dict[str, Tensor]:
    """Return tensors with matrices and kernels of `least` numbers or more in int8, with scales.

    Each row is a scale times -127..127, the best of some scales.
    """
    made = {}
    for name, value in tensors.items():
        if value.ndim > 1 and value.numel() >= least:
            rows, made[name + SCALE] = _rows_in_int8(value.flatten(1).float())
            made[name] = rows.view(value.shape)
        else:
            made[name] = value
    return made


def _rows_in_int8(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 [n, m] and scales [n, 1] of a matrix."""
    largest = matrix.abs().amax(1, keepdim=True).clamp(min=1e-12)
    tried = []
    for share in torch.linspace(0.7, 1.0, 13):
        scales = (share * largest / 127).bfloat16()
        rows = (matrix / scales).round().clamp(-127, 127)
        tried.append(((rows * scales - matrix).square().sum(1), rows, scales))
    errors, rows, scales = (torch.stack(each) for each in zip(*tried, strict=True))
    best = errors.argmin(0)[None, :, None]
    return (rows.take_along_dim(best, 0)[0].to(torch.int8), scales.take_along_dim(best, 0)[0])


def _write_tensors(
    tensors: Mapping[str, Tensor], path: Path, int8_from: int | None,
    header: dict[str, str] | None = None,
) -> None:
    stored = dict(tensors) if int8_from is None else in_int8(tensors, int8_from)
    with atomic_path(path) as temporary:
        save_file(stored, temporary, metadata=header)
        temporary.chmod(0o644)
