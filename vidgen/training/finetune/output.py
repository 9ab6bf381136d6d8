"""What comes out of a fine-tuning run: LoRA files or a model folder, and the model card."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from vidgen.core.config import dump
from vidgen.core.errors import InputError, ModelError, VidgenError
from vidgen.core.pages import Chart, page
from vidgen.core.runtime import atomic_path, atomic_write
from vidgen.models.dit import SpacetimeDiT
from vidgen.models.lora import Adapter
from vidgen.pipeline.loader import DTYPES, EXPERTS
from vidgen.training import checkpoint
from vidgen.training.config import RunConfig
from vidgen.training.finetune.config import FinetuneConfig
from vidgen.training.finetune.model import adapter_of, delta_norm, target_paths, trained_roles
from vidgen.weights.component import ExpertRole
from vidgen.weights.convert import convert
from vidgen.weights.folder import ModelFolder
from vidgen.weights.layouts import open_model
from vidgen.weights.lora import Expert, write_lora

FOLDER = "output"
"""Where in the run's folder it lies."""
_STATEMENTS = {
    "author": "Author", "license": "Licence", "data_license": "Licence of the clips",
    "consent": "Consent of people in the clips",
}
_SIDE: dict[ExpertRole, Expert] = {EXPERTS[0]: "high", EXPERTS[1]: "low"}


class NoEffect(VidgenError):
    """What was learned changes nothing."""


@dataclass(frozen=True)
class Made:
    """What was written."""

    files: list[Path]  # all of it, for people to load
    use: list[str]  # what follows `--lora` or `--model` on the command line
    delta: dict[ExpertRole, float]  # norm of what changed, by transformer
    relative: dict[ExpertRole, float]  # the same over the norm of the weights changed
    chosen: Chosen  # which checkpoint it is of


@dataclass(frozen=True)
class Chosen:
    """The checkpoint that is exported."""

    path: Path  # its folder
    step: int  # its step
    reason: str  # why this one, for people


def choose_checkpoint(run: RunConfig) -> Chosen:
    """The checkpoint where `run.best` was lowest, or the newest where the run names no score.

    Raises:
        ModelError: there is none.
    """
    folder = Path(run.folder)
    newest = checkpoint.latest_checkpoint(folder)
    if newest is None:
        raise ModelError(f"{folder} has no checkpoint; train there first")
    meta = checkpoint.read_meta(newest)
    step = meta["best_step"] if run.best and meta["best_of"] == run.best else -1
    if step < 0:  # or the best is of another score before the run went on
        why = f", as none was kept for its {run.best}" if run.best else ""
        return Chosen(newest, meta["step"], f"the newest one{why}")
    return Chosen(checkpoint.step_folder(folder, step), step,
                  f"where {run.best} was lowest, {meta['best']:.4g}")


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
            "raise run.optim.lr or run.steps, and look at curve.jsonl")
    if idle:
        raise NoEffect(
            f"the {idle[0]}-noise expert learned nothing in {config.run.folder}: none of its "
            "weights changes; raise run.optim.lr or run.steps, or train the other one alone by "
            f"experts: {'low' if idle[0] == 'high' else 'high'}")
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


def _export_lora(config: FinetuneConfig, folder: ModelFolder, target: Path, chosen: Chosen) -> Made:
    """One file, or one for each of two experts, in our dialect and all that are asked for."""
    run, roles = Path(config.run.folder), trained_roles(config, folder)
    dtype = DTYPES[config.output.dtype]
    result = Made([], [], {}, {}, chosen)
    for role in roles:
        side = _SIDE[role] if EXPERTS[1] in folder.components else None
        name = f"{config.output.name}-{side}" if side else config.output.name
        tokens = {}
        if config.subject is not None:
            learned = checkpoint.load_averages(run, "token", chosen.path)
            tokens = {config.subject.token: learned["row"]}
        weights = checkpoint.load_averages(run, role, chosen.path)
        adapter = adapter_of(weights, config.lora, name, tokens)
        low_rank = {  # as it is written: a factor too small for the dtype is zero there
            path: replace(part, down=part.down.to(dtype), up=part.up.to(dtype))
            for path, part in adapter.low_rank.items()
        }
        adapter = replace(adapter, low_rank=low_rank)
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
        changed[role] = checkpoint.load_averages(run, role, chosen.path)
        result.delta[role], whole = _change(folder, role, changed[role])
        result.relative[role] = result.delta[role] / whole
    if place.exists():
        open_model(str(place))  # that it still is one
    checkpoint.drop_partial(target)
    with atomic_path(place) as fresh:
        convert(replace(folder, name=config.output.name), fresh, "vidgen", changed=changed)
    return result


def _norm(folder: ModelFolder, role: ExpertRole, adapter: Adapter) -> float:
    """Norm of the base weights that an adapter's low-rank parts change."""
    component = folder.components[role]
    squares = [float(component.store.get(stored).double().square().sum())
               for stored, ours in component.names.items()
               if ours.removesuffix(".weight") in adapter.low_rank and ours.endswith(".weight")]
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


def unstated(config: FinetuneConfig) -> list[str]:
    """Keys of `output` that a card should state and the run leaves out."""
    return [name for name in _STATEMENTS if not getattr(config.output, name).strip()]


def write_card(
    config: FinetuneConfig, base: ModelFolder, facts: Mapping[str, Any], made: Made, folder: Path
) -> Path:
    """Write `README.md`, as the hub shows it, and `curves.html` beside it.

    `facts` are of the data and the run, with the `effect` on the A/B sheet, if there is one.
    """
    curve = read_curve(Path(config.run.folder) / "curve.jsonl")
    loss = [(line["step"], line["loss"]) for line in curve if "seconds_per_step" in line]
    scores = [(line["step"], line["validation"]["velocity_mean"])
              for line in curve if "validation" in line]
    charts = [Chart(f"{name} by step", [(name, points)], 640, 240)
              for name, points in (("loss", loss), ("validation", scores))]
    curves = page("charts", title=config.output.name, intro="", sections=[("", charts)])
    atomic_write(folder / "curves.html", curves.encode())
    path = folder / "README.md"
    atomic_write(path, _card(config, base, facts, made, curve).encode())
    return path


def read_curve(path: Path) -> list[dict[str, Any]]:
    """Lines of a run's curve; what a resumed run did again counts as it was done last."""
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    latest = {(line["step"], "validation" in line, "event" in line): line for line in lines}
    return sorted(latest.values(), key=lambda line: line["step"])


def _card(
    config: FinetuneConfig, base: ModelFolder, facts: Mapping[str, Any], made: Made,
    curve: Sequence[Mapping[str, Any]],
) -> str:
    output, kind = config.output, "LoRA" if config.method == "lora" else "fine-tuned model"
    stated = {title: getattr(output, name).strip() or "not stated"
              for name, title in _STATEMENTS.items()}
    header: dict[str, Any] = {
        "base_model": base.given or base.name, "license": output.license or "other",
        "pipeline_tag": "text-to-video", "tags": ["vidgen", "video", config.method],
    }
    if config.subject is not None:
        header["instance_prompt"] = config.subject.token
    use = "".join(f" --lora {Path(path).name}" for path in made.use)
    model, told = base.given or base.name, []
    if config.method == "full":
        use, model = "", Path(made.use[0]).name
    if config.subject is not None:
        told = [f"Prompts have `{config.subject.token}` where the subject is to be."]
    scores = [line["validation"] for line in curve if "validation" in line]
    table = ["| validation | first | last |", "|---|---|---|"] + [
        f"| {name} | {scores[0].get(name, float('nan')):.4f} | {value:.4f} |"
        for name, value in scores[-1].items()] if scores else []
    changes = ", ".join(f"{role} {share:.3%}" for role, share in made.relative.items())
    sheet = " With and without it, same seeds: [ab.png](ab.png)."
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {output.name}",
        f"A {kind} of {base.name}. {output.description}".strip(), *told,
        f'```bash\nvidgen generate "..." --model {model}{use}\n```',
        "## What it may be used for",
        _list(stated | {"Licence of the base model": base.license}),
        "## Data", _list(facts["data"]),
        "## Training",
        _list(facts["training"] | {"weights of step": f"{made.chosen.step}, {made.chosen.reason}"}),
        "\n".join(table),
        f"What it changes, as a share of the weights that it changes: {changes}.",
        "Curves: [curves.html](curves.html)." + sheet * (facts.get("effect") is not None),
        "## Config", f"```yaml\n{yaml.safe_dump(dump(config), sort_keys=False)}```",
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def _list(facts: Mapping[str, Any]) -> str:
    return "\n".join(f"* {name}: {value}" for name, value in facts.items())
