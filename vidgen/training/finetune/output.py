"""What comes out of a fine-tuning run: LoRA files or a model folder, and proof of its effect."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from vidgen.core.errors import InputError, ModelError, VidgenError
from vidgen.core.runtime import atomic_path
from vidgen.models.dit import SpacetimeDiT
from vidgen.models.lora import Adapter
from vidgen.pipeline.loader import DTYPES, EXPERTS
from vidgen.training.checkpoint import (
    best_checkpoint,
    drop_partial,
    latest_checkpoint,
    load_averages,
    read_meta,
)
from vidgen.training.config import RunConfig
from vidgen.training.finetune.config import FinetuneConfig
from vidgen.training.finetune.lora import adapter_of, delta_norm, target_paths
from vidgen.training.finetune.model import trained_roles
from vidgen.weights.component import ExpertRole
from vidgen.weights.convert import convert
from vidgen.weights.folder import ModelFolder
from vidgen.weights.layouts import open_model
from vidgen.weights.lora import Expert, write_lora

FOLDER = "output"
"""Where in the run's folder it lies."""
_SIDE: dict[ExpertRole, Expert] = {EXPERTS[0]: "high", EXPERTS[1]: "low"}


class NoEffect(VidgenError):
    """What was learned changes nothing."""


@dataclass(frozen=True)
class Made:
    """What was written.

    Attributes:
        files: all of it, for people to load.
        use: what follows `--lora` or `--model` on the command line.
        delta: norm of what changed, by transformer.
        relative: the same over the norm of the weights changed.
        chosen: which checkpoint it is of.
    """

    files: list[Path]
    use: list[str]
    delta: dict[ExpertRole, float]
    relative: dict[ExpertRole, float]
    chosen: Chosen


@dataclass(frozen=True)
class Chosen:
    """The checkpoint that is exported.

    Attributes:
        path: its folder.
        step: its step.
        reason: why this one, for people.
    """

    path: Path
    step: int
    reason: str


def choose_checkpoint(run: RunConfig) -> Chosen:
    """The checkpoint where `run.best` was lowest, or the newest where the run names no score.

    Raises:
        ModelError: there is none.
    """
    folder = Path(run.folder)
    newest = latest_checkpoint(folder)
    best = best_checkpoint(folder) if run.best else None
    if newest is None:
        raise ModelError(f"{folder} has no checkpoint; train there first")
    meta = read_meta(best) if best else {}
    if best is None or meta["best_of"] != run.best:  # of another score before the run went on
        why = f", as none was kept for its {run.best}" if run.best else ""
        return Chosen(newest, read_meta(newest)["step"], f"the newest one{why}")
    return Chosen(best, meta["step"], f"where {run.best} was lowest, {meta['best']:.4g}")


def export(config: FinetuneConfig, folder: ModelFolder) -> Made:
    """Write what a checkpoint of a run has learned, averaged; see `choose_checkpoint`.

    Raises:
        NoEffect: the weights of an expert, as written, differ in nothing from the base model's.
        ModelError: there is no checkpoint.
    """
    chosen = choose_checkpoint(config.run)
    target = Path(config.run.folder) / FOLDER
    target.mkdir(exist_ok=True)
    made = _export_lora if config.method == "lora" else _export_model
    result = made(config, folder, target, chosen)
    idle = [_SIDE[role] for role, change in result.delta.items() if not change]
    if len(idle) == len(result.delta):
        raise NoEffect(
            f"the run in {config.run.folder} has no effect: what it learned changes no weight; "
            "raise run.optim.lr or run.steps, and look at curve.jsonl"
        )
    if idle:
        raise NoEffect(
            f"the {idle[0]}-noise expert learned nothing in {config.run.folder}: none of its "
            "weights changes; raise run.optim.lr or run.steps, or train the other one alone by "
            f"experts: {'low' if idle[0] == 'high' else 'high'}"
        )
    return result


def rehearse(config: FinetuneConfig, folder: ModelFolder) -> None:
    """Find out before anything is loaded whether what is to be learned and its place are there.

    Raises:
        InputError: an expert or layers that the model doesn't have, or a file in the way.
        ModelError: a whole model is to be written where something else lies.
    """
    target = Path(config.run.folder) / FOLDER
    if target.exists() and not target.is_dir():
        raise InputError(f"{target}, where the results are to lie, is a file; move it away")
    place = target / config.output.name
    if config.method == "full" and place.exists():
        open_model(str(place))  # one that isn't a model is not ours to replace
    for role in trained_roles(config, folder):
        if config.method == "lora":
            with torch.device("meta"):
                dit = SpacetimeDiT(folder.components[role].config)
            target_paths(dit, config.lora.targets)


def _export_lora(
    config: FinetuneConfig, folder: ModelFolder, target: Path, chosen: Chosen
) -> Made:
    """One file, or one for each of two experts, in our dialect and all that are asked for."""
    run, roles = Path(config.run.folder), trained_roles(config, folder)
    dtype = DTYPES[config.output.dtype]
    result = Made([], [], {}, {}, chosen)
    for role in roles:
        side = _SIDE[role] if EXPERTS[1] in folder.components else None
        name = f"{config.output.name}-{side}" if side else config.output.name
        tokens = {}
        if config.subject is not None:
            tokens = {config.subject.token: load_averages(run, "token", chosen.path)["row"]}
        adapter = _rounded(
            adapter_of(load_averages(run, role, chosen.path), config.lora, name, tokens), dtype
        )
        result.delta[role] = delta_norm(adapter)
        result.relative[role] = result.delta[role] / _norm(folder, role, adapter)
        main = target / f"{name}.safetensors"
        write_lora(adapter, main, "vidgen", expert=side)
        result.use.append(f"{main}@{side}" if side else str(main))
        result.files.append(main)
        for dialect in config.output.dialects:
            suffix = "" if dialect == "peft" else ".safetensors"
            path = target / f"{name}-{dialect}{suffix}"
            write_lora(adapter, path, dialect, expert=side)
            result.files.append(path)
    return result


def _export_model(
    config: FinetuneConfig, folder: ModelFolder, target: Path, chosen: Chosen
) -> Made:
    """A whole model folder of our layout; what wasn't trained is as the base model has it.

    One that lies there from before stays until the new one is whole.
    """
    run, place = Path(config.run.folder), target / config.output.name
    result = Made([place], [str(place)], {}, {}, chosen)
    changed: dict[str, Mapping[str, Tensor]] = {}
    for role in trained_roles(config, folder):
        changed[role] = load_averages(run, role, chosen.path)
        result.delta[role], whole = _change(folder, role, changed[role])
        result.relative[role] = result.delta[role] / whole
    if place.exists():
        open_model(str(place))  # that it still is one
    drop_partial(target)
    with atomic_path(place) as fresh:
        convert(replace(folder, name=config.output.name), fresh, "vidgen", changed=changed)
    return result


def _rounded(adapter: Adapter, dtype: torch.dtype) -> Adapter:
    """The adapter as it is written; a factor too small for the dtype is zero there."""
    low_rank = {
        path: replace(part, down=part.down.to(dtype), up=part.up.to(dtype))
        for path, part in adapter.low_rank.items()
    }
    return replace(adapter, low_rank=low_rank)


def _norm(folder: ModelFolder, role: ExpertRole, adapter: Adapter) -> float:
    """Norm of the base weights that an adapter's low-rank parts change."""
    component = folder.components[role]
    squares = [
        float(component.store.get(stored).double().square().sum())
        for stored, ours in component.names.items()
        if ours.removesuffix(".weight") in adapter.low_rank and ours.endswith(".weight")
    ]
    return math.sqrt(sum(squares))


def _change(
    folder: ModelFolder, role: ExpertRole, tensors: Mapping[str, Tensor]
) -> tuple[float, float]:
    """Norm of what changes of the files' weights once written in their dtype, and their norm."""
    component, changed, whole = folder.components[role], 0.0, 0.0
    for stored, ours in component.names.items():
        if ours in tensors:
            before = component.store.get(stored)
            after = tensors[ours].to("cpu", before.dtype)
            changed += float((after.double() - before.double()).square().sum())
            whole += float(before.double().square().sum())
    return math.sqrt(changed), math.sqrt(whole)
