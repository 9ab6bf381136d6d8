"""Results of a fine-tuning run: LoRA files or a model folder, model card, sheets of clips.

The pipeline of `vidgen generate` makes the sheets, during training and of the result.

Axes: C latent channels, F latent frames, h w latent rows and columns.
"""

from __future__ import annotations

import json
import logging
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from vidgen.core.config import dump
from vidgen.core.errors import InputError, ModelError, VidgenError
from vidgen.core.request import Request
from vidgen.core.runtime import atomic_path, atomic_write
from vidgen.media.grid import contact_sheet
from vidgen.media.types import Frames
from vidgen.models.dit import SpacetimeDiT
from vidgen.models.lora import Adapter
from vidgen.pipeline.codec import to_frames
from vidgen.pipeline.engine import Engine, load_own
from vidgen.pipeline.loader import DTYPES, EXPERTS
from vidgen.pipeline.model import log as engine_log
from vidgen.pipeline.plan import make_plan
from vidgen.training import checkpoint
from vidgen.training.config import FinetuneConfig, RunConfig
from vidgen.training.data.dataset import Dataset
from vidgen.training.finetune.model import (
    LearnedToken,
    adapter_of,
    delta_norm,
    target_paths,
    trained_roles,
)
from vidgen.weights.component import Component, ExpertRole
from vidgen.weights.convert import convert
from vidgen.weights.folder import ModelFolder
from vidgen.weights.keymap import Spelling
from vidgen.weights.layouts import open_model
from vidgen.weights.lora import Expert, write_lora

FOLDER = "output"
"""Name of the folder of results in the run's folder."""
SHOWN = 4
"""Frames of each clip on a sheet, evenly spread."""
_STATEMENTS = {
    "author": "Author", "license": "Licence", "data_license": "Licence of the clips",
    "consent": "Consent of people in the clips",
}
_SIDE: dict[ExpertRole, Expert] = {EXPERTS[0]: "high", EXPERTS[1]: "low"}


class NoEffect(VidgenError):
    """The result of a run changes nothing."""


@dataclass(frozen=True)
class Export:
    """Hold the files that a run exported, and the checkpoint they are from."""

    checkpoint: Path
    reason: str  # why this checkpoint, such as "latest"
    files: list[Path] = field(default_factory=list)
    use: list[str] = field(default_factory=list)  # values for `--lora`, or one for `--model`
    delta: dict[ExpertRole, float] = field(default_factory=dict)  # norm of the change by role

    @property
    def step(self) -> int:
        """Step of the checkpoint."""
        return int(checkpoint.read_meta(self.checkpoint)["step"])


def choose_checkpoint(run: RunConfig) -> Export:
    """Choose the checkpoint with the lowest `run.best`, or the latest one; ModelError for none."""
    folder = Path(run.folder)
    newest = checkpoint.latest_checkpoint(folder)
    if newest is None:
        raise ModelError(f"{folder} has no checkpoint; train there first")
    meta = checkpoint.read_meta(newest)
    step = meta["best_step"] if run.best and meta["best_of"] == run.best else -1
    if step < 0:  # none yet, or the run was resumed with another `best`
        why = f", as none was kept for its {run.best}" if run.best else ""
        return Export(newest, f"latest{why}")
    return Export(checkpoint.step_folder(folder, step), f"lowest {run.best}, {meta['best']:.4g}")


def export(config: FinetuneConfig, folder: ModelFolder) -> Export:
    """Write the averaged weights of the checkpoint that `choose_checkpoint` returns.

    Raises:
        NoEffect: the written weights of a transformer equal those of the base model.
        ModelError: the run has no checkpoint.
    """
    made = choose_checkpoint(config.run)
    target = Path(config.run.folder) / FOLDER
    target.mkdir(exist_ok=True)
    write = _export_lora if config.method == "lora" else _export_model
    write(config, folder, target, made)
    idle = [_SIDE[role] for role, change in made.delta.items() if not change]
    if len(idle) == len(made.delta):
        raise NoEffect(
            f"the run in {config.run.folder} has no effect: no exported weight differs from "
            "the base model's; raise run.optim.lr or run.steps, and check curve.jsonl")
    if idle:
        raise NoEffect(
            f"the {idle[0]}-noise expert learned nothing in {config.run.folder}: no exported "
            "weight differs from the base model's; raise run.optim.lr or run.steps, or train only "
            f"the other one with experts: {'low' if idle[0] == 'high' else 'high'}")
    return made


def precheck(config: FinetuneConfig, folder: ModelFolder) -> None:
    """Check before training that the layers exist and that results and sheets can be made.

    Raises:
        InputError: the model lacks an expert or layers, the folder of results is a file, or a
            setting of `validation` is invalid.
        ModelError: the folder for a full model holds something else.
    """
    target = Path(config.run.folder) / FOLDER
    if target.exists() and not target.is_dir():
        raise InputError(f"{target}, the folder for the results, is a file; move it away")
    place = target / config.output.name
    if config.method == "full" and place.exists():
        open_model(str(place))  # only an older model is replaced
    for role in trained_roles(config, folder):
        if config.method == "lora":
            with torch.device("meta"):
                dit = SpacetimeDiT(folder.components[role].config)
            target_paths(dit, config.lora.targets)
    settings = config.validation
    options = {name: getattr(settings, name)
               for name in ("seed", "steps", "size", "frames", "guidance")}
    try:
        requests = [Request(prompt=each, **options) for each in settings.prompts or ("a clip",)]
        make_plan(requests[0], folder)
    except InputError as error:
        raise InputError(f"validation: {error}") from None


def _export_lora(config: FinetuneConfig, folder: ModelFolder, target: Path, made: Export) -> None:
    """Write a file for each trained transformer and dialect."""
    run, dtype = Path(config.run.folder), DTYPES[config.output.dtype]
    for role in trained_roles(config, folder):
        side = _SIDE[role] if EXPERTS[1] in folder.components else None
        name = f"{config.output.name}-{side}" if side else config.output.name
        tokens = {}
        if config.subject is not None:
            learned = checkpoint.load_averages(run, "token", made.checkpoint)
            tokens = {config.subject.token: learned["row"]}
        weights = checkpoint.load_averages(run, role, made.checkpoint)
        adapter = adapter_of(weights, config.lora, name, tokens)
        low_rank = {  # in the dtype of the file, where tiny factors are zero
            path: replace(part, down=part.down.to(dtype), up=part.up.to(dtype))
            for path, part in adapter.low_rank.items()
        }
        adapter = replace(adapter, low_rank=low_rank)
        made.delta[role] = delta_norm(adapter)
        dialects: list[Spelling] = ["vidgen", *config.output.dialects]
        for dialect in dialects:
            end = "" if dialect == "vidgen" else f"-{dialect}"
            path = target / f"{name}{end}.safetensors"
            write_lora(adapter, path, dialect, expert=side)
            made.files.append(path)
            if dialect == "vidgen":
                made.use.append(f"{path}@{side}" if side else str(path))


def _export_model(config: FinetuneConfig, folder: ModelFolder, target: Path, made: Export) -> None:
    """Write a complete model folder; untrained parts are those of the base model.

    An older one is replaced after the new one is complete.
    """
    run, place = Path(config.run.folder), target / config.output.name
    changed: dict[str, Mapping[str, Tensor]] = {}
    for role in trained_roles(config, folder):
        changed[role] = checkpoint.load_averages(run, role, made.checkpoint)
        made.delta[role] = _change(folder.components[role], changed[role])
    if place.exists():
        open_model(str(place))  # still a model
    checkpoint.drop_partial(target)
    with atomic_path(place) as fresh:
        convert(replace(folder, name=config.output.name), fresh, "vidgen", changed=changed)
    made.files.append(place)
    made.use.append(str(place))


def _change(component: Component[Any], tensors: Mapping[str, Tensor]) -> float:
    """Return the norm of the change of weights in the dtype of the base model's files."""
    changed = 0.0
    for name, lazy in component.tensors.items():
        if name in tensors:
            before = lazy.get()
            after = tensors[name].to("cpu", before.dtype)
            changed += float((after.double() - before.double()).square().sum())
    return math.sqrt(changed)


def unstated(config: FinetuneConfig) -> list[str]:
    """Return the empty fields of `output` that the model card should state."""
    return [name for name in _STATEMENTS if not getattr(config.output, name).strip()]


def read_curve(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's curve by step; of repeated steps, the last lines."""
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    latest = {(line["step"], "validation" in line, "event" in line): line for line in lines}
    return sorted(latest.values(), key=lambda line: line["step"])


def write_card(
    config: FinetuneConfig, base: ModelFolder, facts: Mapping[str, Any], made: Export, folder: Path
) -> None:
    """Write the model card `README.md`, in the hub's format, into a folder.

    `facts` has the tables `data` and `training`, and `effect`, the mean difference of A/B clips.
    """
    output, kind = config.output, "LoRA" if config.method == "lora" else "fine-tuned model"
    stated = {title: getattr(output, name).strip() or "not stated"
              for name, title in _STATEMENTS.items()}
    model, prompts = base.given or base.name, list[str]()
    header: dict[str, Any] = {
        "base_model": model, "license": output.license or "other",
        "pipeline_tag": "text-to-video", "tags": ["vidgen", "video", config.method],
    }
    if config.subject is not None:
        header["instance_prompt"] = config.subject.token
        prompts = [f"Write `{config.subject.token}` in a prompt for the subject."]
    use = "".join(f" --lora {Path(path).name}" for path in made.use)
    if config.method == "full":
        use, model = "", Path(made.use[0]).name
    curve = read_curve(Path(config.run.folder) / "curve.jsonl")
    scores = [line["validation"] for line in curve if "validation" in line]
    table = ["| validation | first | last |", "|---|---|---|"] + [
        f"| {name} | {scores[0].get(name, float('nan')):.4f} | {value:.4f} |"
        for name, value in scores[-1].items()] if scores else []
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {output.name}",
        f"A {kind} of {base.name}. {output.description}".strip(), *prompts,
        f'```bash\nvidgen generate "..." --model {model}{use}\n```',
        "## Licences and consent",
        _list(stated | {"Licence of the base model": base.license}),
        "## Data", _list(facts["data"]),
        "## Training",
        _list(facts["training"] | {"weights of step": f"{made.step} ({made.reason})"}),
        "\n".join(table),
        "With and without it, same seeds: [ab.png](ab.png)." * (facts["effect"] is not None),
        "## Config", f"```yaml\n{yaml.safe_dump(dump(config), sort_keys=False)}```",
    ]  # fmt: skip
    card = "\n\n".join(part for part in parts if part) + "\n"
    atomic_write(folder / "README.md", card.encode())


def _list(facts: Mapping[str, Any]) -> str:
    return "\n".join(f"* {name}: {value}" for name, value in facts.items())


class Sheets:
    """Sheets of clips, always of the same prompts and seeds.

    Prompts, if the run sets none, and first frames, if needed, are those of held-out clips.
    """

    def __init__(self, config: FinetuneConfig, dataset: Dataset) -> None:
        self.config, self._dataset = config, dataset
        self._shown = set[str]()

    def _is_new(self, record: logging.LogRecord) -> bool:
        """Let each message through once, as all sheets have the same prompts."""
        is_new = record.getMessage() not in self._shown
        self._shown.add(record.getMessage())
        return is_new

    def __call__(self, step: int, folder: Path, modules: Mapping[str, nn.Module]) -> None:
        """Write `sheet-STEP.png`, generated with `modules`."""
        engine = self._engine
        for role in engine.folder.components:
            if role in modules:
                engine.loader.lend(role, modules[role])
        with tempfile.TemporaryDirectory(prefix="vidgen-") as scratch:
            token = modules.get("token")
            loras: list[str] = []
            if isinstance(token, LearnedToken):
                path = Path(scratch) / "token.safetensors"
                write_lora(Adapter("token", {}, tokens={token.token: token.row}), path, "vidgen")
                loras = [str(path)]
            rows = [(prompt, self._generate(engine, i, loras))
                    for i, (prompt, _) in enumerate(self._examples)]
        engine.loader.close()
        _write(folder / f"sheet-{step:08d}.png", rows)

    def compare(self, use: Sequence[str], path: Path) -> float:
        """Write a sheet of clips without and with the result, of the same seeds.

        Return the mean absolute difference of their frames, from 0 to 255. `use` has values of
        `--lora`, or one model folder.
        """
        count = min(self.config.output.ab_clips, len(self._examples))
        without = [self._generate(self._engine, i, ()) for i in range(count)]
        self._engine.loader.close()
        is_lora = self.config.method == "lora"
        engine = self._engine if is_lora else self._open(use[0])
        with_it = [self._generate(engine, i, use if is_lora else ()) for i in range(count)]
        engine.loader.close()
        pairs = list(zip(without, with_it, strict=True))
        _write(path, [(f"{kind}: {prompt}", clip)
                      for (prompt, _), pair in zip(self._examples, pairs, strict=False)
                      for kind, clip in zip(("without", "with"), pair, strict=True)])
        return float(np.mean([np.abs(a.astype(np.int16) - b).mean() for a, b in pairs]))

    @cached_property
    def _engine(self) -> Engine:
        return self._open(self.config.model)

    def _open(self, model: str) -> Engine:
        run = self.config.run
        return load_own(model, "only the embedded model and the Wan family can be fine-tuned",
                        device=run.device, dtype=run.dtype, offload="stage")

    @cached_property
    def _examples(self) -> list[tuple[str, torch.Tensor | None]]:
        """Prompts, each with latents [1, C, F, h, w] if the model needs first or last frames."""
        source = self._dataset.held_out or self._dataset
        prompts, count = self.config.validation.prompts, self.config.output.ab_clips
        needs_pictures = "text" not in self._engine.folder.tasks
        indices = range(min(len(source.items), len(prompts) or max(count, 1)))
        batches = [source.item_batch([index]) for index in indices] if (
            needs_pictures or not prompts) else []
        latents = [batch["latents"] if needs_pictures else None for batch in batches]
        if not prompts:
            prompts = tuple(batch["captions"][0] or "a clip" for batch in batches)
        return [(prompt, latents[i % len(latents)] if latents else None)
                for i, prompt in enumerate(prompts)]

    def _generate(self, engine: Engine, index: int, loras: Sequence[str]) -> Frames:
        settings, (prompt, latents) = self.config.validation, self._examples[index]
        largest = max(self._dataset.buckets, key=lambda b: (b.num_frames, b.width * b.height))
        options: dict[str, Any] = {
            "seed": settings.seed + index, "steps": settings.steps, "guidance": settings.guidance,
            "size": settings.size or (largest.width, largest.height),
            "frames": settings.frames or largest.num_frames, "fps": self._dataset.fps,
            "lora": list(loras), "audio": "none", "word_normalisation": "none",
        }
        if latents is not None:
            frames = torch.cat(list(engine.decode_video(latents)), dim=2)[0]
            options["image"] = to_frames(frames[:, :1])[0].numpy()
            if engine.dit_config.image_positions is not None:  # it learned both positions
                options["last_image"] = to_frames(frames[:, -1:])[0].numpy()
        engine_log.addFilter(self._is_new)
        try:
            clip = engine.generate(prompt, **options)
        finally:
            engine_log.removeFilter(self._is_new)
        assert not isinstance(clip, list)
        return clip.frames


def _write(path: Path, rows: Sequence[tuple[str, Frames]]) -> None:
    frames, texts = [], []
    for label, clip in rows:
        picks = np.linspace(0, len(clip) - 1, SHOWN).round().astype(int)
        frames += [clip[pick] for pick in picks]
        texts += [label, *[""] * (SHOWN - 1)]
    contact_sheet(frames, path, columns=SHOWN, labels=texts)
