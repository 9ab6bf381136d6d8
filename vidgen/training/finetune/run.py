"""Fine-tuning from a config to files that `vidgen generate` loads.

`vidgen train`, `torchrun train/finetune.py` and `deepspeed train/finetune.py` call `finetune`.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from vidgen.core.config import build, dump
from vidgen.core.config_file import apply_overrides, load_yaml
from vidgen.core.errors import InputError
from vidgen.core.protocols import OnEvent
from vidgen.core.runtime import atomic_write, choose_device, fingerprint
from vidgen.training.config import FinetuneConfig
from vidgen.training.data.dataset import Dataset, open_dataset
from vidgen.training.data.survey import open_trainable
from vidgen.training.engines.distributed import Place, join_ranks
from vidgen.training.finetune.output import (
    FOLDER,
    NoEffect,
    Sheets,
    export,
    precheck,
    unstated,
    write_card,
)
from vidgen.training.finetune.task import FinetuneTask, settle_conditions
from vidgen.training.loop import TrainResult, find_source, train
from vidgen.training.optim import named_parameters
from vidgen.weights.folder import ModelFolder


def read_config(path: str, overrides: Sequence[str] = ()) -> FinetuneConfig:
    """Read a run's YAML file strictly, with overrides of the form `a.b=c`."""
    return build(FinetuneConfig, apply_overrides(load_yaml(path), overrides), path)


def finetune(
    config: FinetuneConfig, *, resume: bool = False, accept_changes: bool = False,
    on_event: OnEvent = lambda _event: None,
) -> dict[str, Any] | None:
    """Train a model, export the result, check that it has an effect, and write the model card.

    Args:
        resume: continue from the newest checkpoint of the run's folder.
        accept_changes: resume although config, model or data changed.
        on_event: called on the main rank with events: progress, validation, note, written.

    Returns:
        The summary in `output/summary.json`, or None on all ranks but the main one. If the run was
        stopped before its last step, "finished" is False and nothing is exported.

    Raises:
        InputError: invalid settings or data; the message has the remedy.
        NoEffect: the result changes nothing.
    """
    with ExitStack() as held:
        with join_ranks(config.run) as place:
            folder = open_trainable(config.model)
            settle_conditions(config.conditions, folder)  # refused before the clips are read
            precheck(config, folder)
            find_source(Path(config.run.folder), resume=resume)
            on_event = on_event if place.main else lambda _event: None
            dataset = held.enter_context(closing(_open_data(config, folder, place, on_event)))
            task = FinetuneTask(config, folder, dataset, Sheets(config, dataset))
            record = dump(config) | {
                "model_hash": folder.content_hash, "data_fingerprint": dataset.fingerprint}
            monitor = _Monitor(config, place, on_event)
            result = train(task, config.run, resume=resume, record=record,
                           accept_changes=accept_changes, on_record=monitor)
            facts = _facts(task, place, result)
        if not place.main:
            return None
        summary: dict[str, Any] = {
            "folder": config.run.folder, "step": result.step, "finished": result.finished,
            "interrupted": result.interrupted, "validation": result.metrics,
        }
        if not result.finished:
            text = f"stopped at step {result.step}; continue with --resume"
            on_event({"event": "note", "text": text})
            return summary
        del task
        gc.collect()  # free the trained modules before loading those of the sheet
        return _finish(config, folder, dataset, summary, facts, on_event)


def _open_data(
    config: FinetuneConfig, folder: ModelFolder, place: Place, on_event: OnEvent
) -> Dataset:
    dataset = open_dataset(config.data, folder, batch_size=config.run.batch_size,
                           accumulate=config.run.accumulate, with_context=config.subject is None,
                           device=choose_device(config.run.device), on_event=on_event)
    notes = [*dataset.notes, *dataset.ends(place.data_size)]
    if dataset.held_out is None:
        share = config.data.held_out
        why = (f"data.held_out {share:g} holds out none of so few clips" if share
               else "no clips are held out")
        notes.append(f"{why}: validation uses clips of the training data; set data.held_out "
                     f"{'to a larger share ' * bool(share)}or data.validation")
    missing = unstated(config)
    if missing:
        notes.append("the model card says 'not stated' for "
                     + ", ".join(f"output.{name}" for name in missing))
    for note in notes:
        on_event({"event": "note", "text": note})
    return dataset


def _facts(task: FinetuneTask, place: Place, result: TrainResult) -> dict[str, Any]:
    config, dataset = task.config, task.dataset
    parameters = named_parameters(task.modules).values()
    trainable = sum(getattr(p, "ds_numel", p.numel()) for p in parameters)  # ZeRO-3's are empty
    seconds = sum(b.num_frames * n for b, n in dataset.buckets.items()) / float(dataset.fps)
    captioned = sum(bool(item.captions) for item in dataset.items)
    held_out = len(dataset.held_out.items) if dataset.held_out else 0
    run, machine = config.run, fingerprint()
    per_step = run.batch_size * run.accumulate * place.data_size
    return {
        "data": {
            "clips": f"{len(dataset.items)} ({seconds:.1f} s at {float(dataset.fps):g} fps), "
                     f"{held_out} more held out",
            "captioned": f"{captioned} of {len(dataset.items)}",
            "sizes": ", ".join(f"{b.label}: {count}" for b, count in dataset.buckets.items()),
            "fingerprint": dataset.fingerprint,
        },
        "training": {
            "method": config.method, "weights trained": f"{trainable:,}",
            "steps": f"{result.step} of {per_step} samples, "
                     f"{result.step * per_step / max(len(dataset.items), 1):.1f} epochs",
            "ranks": place.size, "dtype": run.dtype, "machine": machine["gpu"] or machine["cpu"],
            "versions": f"vidgen {machine['vidgen']}, torch {machine['torch']}",
        },
    }  # fmt: skip


def _finish(
    config: FinetuneConfig, folder: ModelFolder, dataset: Dataset, summary: dict[str, Any],
    facts: dict[str, Any], on_event: OnEvent,
) -> dict[str, Any]:
    made = export(config, folder)
    text = f"exported weights of step {made.step} ({made.reason})"
    on_event({"event": "note", "text": text})
    target = Path(config.run.folder) / FOLDER
    effect = None
    if config.output.ab_clips:
        effect = Sheets(config, dataset).compare(made.use, target / "ab.png")
        if effect == 0:
            raise NoEffect(
                f"{made.use[0]} has no effect: clips of the same seeds are identical with and "
                "without it; raise run.optim.lr or run.steps, or, if one expert of two was "
                "trained, set validation.steps so that they reach it")
    write_card(config, folder, facts | {"effect": effect}, made, target)
    summary |= {
        "files": [str(path) for path in made.files], "use": made.use, "delta_norm": made.delta,
        "ab_difference": effect, "exported_step": made.step,
    }
    atomic_write(target / "summary.json", (json.dumps(summary, indent=1) + "\n").encode())
    for path in (*made.files, target / "README.md"):
        on_event({"event": "written", "path": str(path)})
    return summary


class _Monitor:
    """A function for lines of the run's curve: adds tokens per second, reports events."""

    def __init__(self, config: FinetuneConfig, place: Place, on_event: OnEvent) -> None:
        self._run, self._place, self._on_event = config.run, place, on_event
        self._board: Any = None
        if config.tensorboard and place.main:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise InputError(
                    "tensorboard: true needs the package tensorboard; install it: pip install "
                    "'vidgen[train]', or leave it out: curve.jsonl has the same figures") from None
            self._board = SummaryWriter(str(Path(config.run.folder) / "tensorboard"))

    def __call__(self, record: dict[str, Any]) -> None:
        run, step = self._run, record["step"]
        if "seconds_per_step" in record:  # `tokens` is a mean per micro-batch
            tokens = record.pop("tokens") * run.accumulate * self._place.data_size
            record["tokens_per_s"] = tokens / record["seconds_per_step"]
            left = (run.steps - step) * record["seconds_per_step"]
            self._on_event({"event": "progress", "stage": "train", "done": step, "total": run.steps,
                        "eta_s": left, **{k: v for k, v in record.items() if k != "step"}})
        elif "validation" in record:
            self._on_event({"event": "validation", **record})
        else:
            files = ", ".join(record.get("files", ())) or "unknown files"
            self._on_event({**record, "event": "note", "text": f"step {step}: loss "
                        f"{record['loss']:.4g} of {files}: {record['event']}"})
        if self._board is not None:
            kind = "validation" if "validation" in record else "train"
            for name, value in record.get("validation", record).items():
                if isinstance(value, int | float) and name != "step":
                    self._board.add_scalar(f"{kind}/{name}", value, step)
            self._board.flush()
