"""Checkpoints: everything a run needs to go on as if it had never stopped, written atomically.

A checkpoint is a folder `step-0001200/` of `state.safetensors` (weights, averages, optimiser
moments, RNG) and `state.json` (position, metrics). It is written under a
temporary name, synced and renamed; only then does the file `latest` point to it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vidgen.core.errors import ModelError
from vidgen.core.runtime import atomic_path, atomic_write
from vidgen.training.ema import EMA


def save_checkpoint(
    folder: Path,
    step: int,
    modules: Mapping[str, nn.Module],
    optimizers: list[torch.optim.Optimizer],
    ema: EMA,
    extra: dict[str, Any],
    keep: int,
) -> Path:
    """Write the state after `step` optimiser steps and drop all but the `keep` newest."""
    tensors = {f"ema/{name}": value for name, value in ema.shadow.items()}
    for key, module in modules.items():
        for name, value in module.state_dict().items():
            tensors[f"model/{key}.{name}"] = value
    for index, optimizer in enumerate(optimizers):
        for parameter, slots in optimizer.state_dict()["state"].items():
            for slot, value in slots.items():
                tensors[f"optim/{index}/{parameter}/{slot}"] = torch.as_tensor(value)
    tensors["rng/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    target = folder / f"step-{step:08d}"
    with atomic_path(target) as temporary:
        temporary.mkdir(parents=True)
        save_file(
            {name: t.detach().cpu().contiguous() for name, t in tensors.items()},
            temporary / "state.safetensors",
        )
        meta = {"step": step, **extra}
        (temporary / "state.json").write_text(json.dumps(meta))
    atomic_write(folder / "latest", target.name.encode())
    for old in sorted(folder.glob("step-*"))[:-keep]:
        if old != target:
            shutil.rmtree(old)
    return target


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run folder, or None."""
    pointer = folder / "latest"
    if not pointer.exists():
        return None
    target = folder / pointer.read_text().strip()
    if not (target / "state.json").exists():
        raise ModelError(
            f"{pointer} names {target.name}, which is missing or incomplete; "
            f"write the name of another step-* folder into it"
        )
    return target


def load_checkpoint(
    target: Path,
    modules: Mapping[str, nn.Module],
    optimizers: list[torch.optim.Optimizer],
    ema: EMA,
) -> dict[str, Any]:
    """Put a checkpoint's state back into live objects; returns its `state.json`.

    Raises:
        ModelError: the checkpoint is of other modules or shapes.
    """
    meta = json.loads((target / "state.json").read_text())
    tensors = load_file(target / "state.safetensors")
    for key, module in modules.items():
        prefix = f"model/{key}."
        own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        try:
            module.load_state_dict(own)
        except RuntimeError as error:
            raise ModelError(f"{target} holds another {key} than this config: {error}") from error
    for name, shadow in ema.shadow.items():
        shadow.copy_(tensors[f"ema/{name}"])
    for index, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, torch.Tensor]] = {}
        prefix = f"optim/{index}/"
        for name, value in tensors.items():
            if name.startswith(prefix):
                parameter, slot = name.removeprefix(prefix).split("/")
                state.setdefault(int(parameter), {})[slot] = value
        groups = optimizer.state_dict()["param_groups"]  # rates are the config's, not the past's
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    torch.set_rng_state(tensors["rng/cpu"])
    if "rng/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng/cuda"])
    return meta


def load_averages(folder: Path, key: str) -> dict[str, torch.Tensor]:
    """State dict of module `key` with averaged weights, from a run folder's newest checkpoint.

    Buffers and frozen parameters, which are not averaged, come from the live weights.
    """
    target = latest_checkpoint(folder)
    if target is None:
        raise ModelError(f"{folder} has no checkpoint; train there first")
    tensors = load_file(target / "state.safetensors")
    state = {}
    for prefix in (f"model/{key}.", f"ema/{key}."):
        state |= {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    return state


def write_pid(folder: Path) -> Path:
    """Record this process as the run's, so that `scripts/quiet` can pause it."""
    path = folder / "pid"
    atomic_write(path, str(os.getpid()).encode())
    return path
