"""The one training loop: phases, autocast, EMA, schedule, exact resume, curves.

A task owns modules and says what a batch and its loss are. Batches are pure functions of
(phase, step), so the data position *is* the step, and a resumed run sees what the straight
run would have seen.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from vidgen.core.errors import InputError
from vidgen.core.runtime import atomic_write, choose_device
from vidgen.training.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    write_pid,
)
from vidgen.training.config import Phase, RunConfig
from vidgen.training.ema import EMA, named_parameters
from vidgen.training.optim import lr_scale, set_lr


class Task(Protocol):
    """What is trained. Modules are on the run's device when the loop begins."""

    modules: dict[str, nn.Module]

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Optimisers over the modules' parameters, each group with its `peak_lr`."""

    def start_phase(self, index: int, phase: Phase) -> bool:
        """Called before a phase's first step, once; True if it changed weights by hand."""

    def batch(self, phase: Phase, step: int, micro: int) -> Any:
        """The batch of a step: a pure function of its arguments and the run's seed."""

    def loss(self, batch: Any, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Scalar loss and named scalars for the curve."""

    def validate(self, step: int, folder: Path) -> dict[str, float]:
        """Scores of the averaged weights on held-out data; may write sheets to `folder`."""


@dataclass(frozen=True)
class TrainResult:
    """Where a run stands when the loop returns."""

    step: int
    finished: bool
    metrics: dict[str, float]


def train(
    task: Task, run: RunConfig, *, resume: bool = False, record: dict[str, Any] | None = None
) -> TrainResult:
    """Run `task` to the end of its phases, its minutes, or an interrupt.

    Args:
        task: what is trained.
        run: how long, how often, where.
        resume: go on from the folder's newest checkpoint.
        record: the whole resolved config, kept as `task.json` once the run may begin.

    Raises:
        InputError: the folder holds a run already and `resume` is not set, or the loss is not
            finite for ten steps in a row.
    """
    folder = Path(run.folder)
    folder.mkdir(parents=True, exist_ok=True)
    source = latest_checkpoint(folder)
    if source is not None and not resume:
        raise InputError(f"{folder} holds a run already; add --resume, or name another folder")
    if source is None and run.branch_from:
        source = latest_checkpoint(Path(run.branch_from))
        if source is None:
            raise InputError(f"branch_from {run.branch_from} holds no checkpoint")
    if record is not None:
        atomic_write(folder / "task.json", json.dumps(record, indent=1).encode())
    ema = EMA(task.modules, run.ema_decay)
    optimizers = task.optimizers()
    step, metrics = 0, {}
    if source is not None:
        meta = load_checkpoint(source, task.modules, optimizers, ema)
        step, metrics = meta["step"], meta["metrics"]
    for partial in folder.glob(".*.tmp"):  # what a kill left of a save
        shutil.rmtree(partial, ignore_errors=True)
    pid = write_pid(folder)
    try:
        return _Loop(task, run, folder, ema, optimizers, metrics).run_from(step)
    finally:
        pid.unlink(missing_ok=True)


class _Loop:
    def __init__(self, task: Task, run: RunConfig, folder: Path, ema: EMA,
                 optimizers: list[torch.optim.Optimizer], metrics: dict[str, float]) -> None:
        self.task, self.run, self.folder, self.ema = task, run, folder, ema
        self.optimizers, self.metrics = optimizers, metrics
        self.device = choose_device(run.device)
        self.parameters = list(named_parameters(task.modules).values())
        self.mean_loss = float(metrics.get("loss_mean", math.nan))
        self.skipped = 0
        self.batches = _Batches(task, run, ahead=self.device.type != "cpu")
        self.saved = -1

    def run_from(self, step: int) -> TrainResult:
        run, start = self.run, time.monotonic()
        last_save, window, phase_index = start, _Window(), None
        limit = math.inf if run.minutes is None else run.minutes * 60
        with _stop_signals() as stopped:
            while step < run.num_steps:
                index, phase = run.phase_at(step)
                if index != phase_index:
                    entered = step == sum(p.steps for p in run.phases[:index])
                    if entered and self.task.start_phase(index, phase):
                        self.ema.restart()
                    phase_index = index
                window.add(self._step(phase, step), phase.batch_size * phase.accumulate)
                step += 1
                now = time.monotonic()
                if step % run.log_every == 0:
                    self._log(step, index, window)
                if step % run.validate_every == 0:
                    self._validate(step)
                if stopped or now - start > limit:
                    break
                if now - last_save > run.checkpoint_minutes * 60 and not self.skipped:
                    self._save(step)
                    last_save = now
        finished = step >= run.num_steps
        if finished:
            self._validate(step)
        self._save(step)
        return TrainResult(step, finished, self.metrics)

    def _step(self, phase: Phase, step: int) -> dict[str, float]:
        for module in self.task.modules.values():
            module.train()
        scale = lr_scale(self.run.optim, step) * self.run.phase_rate(step)
        set_lr(self.optimizers, scale)
        values: dict[str, torch.Tensor] = {}
        for micro in range(phase.accumulate):
            batch = self.batches.get(phase, step, micro)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.run.dtype == "bf16"):
                loss, named = self.task.loss(batch, step)
            (loss / phase.accumulate).backward()
            values = {"loss": loss.detach(), **named}
        norm = nn.utils.clip_grad_norm_(self.parameters, self.run.optim.grad_clip or math.inf)
        numbers = {name: float(value) for name, value in values.items()}
        numbers["grad_norm"] = float(norm)
        if self._healthy(numbers["loss"], numbers["grad_norm"], step):
            for optimizer in self.optimizers:
                optimizer.step()
            self.ema.update(step)
        for parameter in self.parameters:
            parameter.grad = None
        numbers["lr_scale"] = scale
        return numbers

    def _healthy(self, loss: float, norm: float, step: int) -> bool:
        finite = math.isfinite(loss) and math.isfinite(norm)
        spike = finite and loss > self.run.spike_factor * self.mean_loss
        if finite and not spike:
            known = math.isfinite(self.mean_loss)
            self.mean_loss = 0.99 * self.mean_loss + 0.01 * loss if known else loss
            self.skipped = 0
            return True
        self.skipped += 1
        print(f"step {step}: loss {loss:.4g}, gradient norm {norm:.4g}: skipped", file=sys.stderr)
        if self.skipped >= 10:
            raise InputError(
                f"the loss was not usable for 10 steps up to step {step} (last {loss:.4g}); "
                "nothing was saved since the last good checkpoint; lower optim.lr and --resume"
            )
        return False

    def _log(self, step: int, phase: int, window: _Window) -> None:
        record = {"step": step, "phase": phase, **window.means()}
        self._record(record)
        left = (self.run.num_steps - step) * record["seconds_per_step"] / 60
        print(f"step {step}/{self.run.num_steps} loss {record['loss']:.4f} "
              f"{record['samples_per_s']:.1f} samples/s, {left:.0f} min left", file=sys.stderr)

    def _validate(self, step: int) -> None:
        for module in self.task.modules.values():
            module.eval()
        with self.ema.swapped(), torch.no_grad():
            self.metrics = self.task.validate(step, self.folder)
        self._record({"step": step, "validation": self.metrics})
        shown = ", ".join(f"{name} {value:.3f}" for name, value in self.metrics.items())
        print(f"step {step}: {shown}", file=sys.stderr)

    def _record(self, record: dict[str, Any]) -> None:
        with (self.folder / "curve.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")

    def _save(self, step: int) -> None:
        if step == self.saved:
            return
        metrics = {**self.metrics, "loss_mean": self.mean_loss}
        save_checkpoint(self.folder, step, self.task.modules, self.optimizers, self.ema,
                        {"metrics": metrics}, self.run.keep)
        self.saved = step


class _Batches:
    """Batches in order; if `ahead`, the next one is made in a thread beside the step.

    That is for GPUs: on a CPU making and computing would compete for the same cores.
    """

    def __init__(self, task: Task, run: RunConfig, *, ahead: bool) -> None:
        self.task, self.run = task, run
        self.pool = ThreadPoolExecutor(1, "vidgen-batches") if ahead else None
        self.coming: dict[tuple[int, int], Future[Any]] = {}

    def get(self, phase: Phase, step: int, micro: int) -> Any:
        if self.pool is None:
            return self.task.batch(phase, step, micro)
        future = self.coming.pop((step, micro), None)
        future = future or self.pool.submit(self.task.batch, phase, step, micro)
        batch = future.result()
        step, micro = (step, micro + 1) if micro + 1 < phase.accumulate else (step + 1, 0)
        if step < self.run.num_steps:
            phase = self.run.phase_at(step)[1]
            self.coming[step, micro] = self.pool.submit(self.task.batch, phase, step, micro)
        return batch


class _Window:
    """Means between two log lines."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.sums: dict[str, float] = {}
        self.count, self.samples, self.since = 0, 0, time.monotonic()

    def add(self, values: dict[str, float], samples: int) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.count += 1
        self.samples += samples

    def means(self) -> dict[str, float]:
        elapsed = time.monotonic() - self.since
        result = {name: value / self.count for name, value in self.sums.items()}
        result["samples_per_s"] = self.samples / elapsed
        result["seconds_per_step"] = elapsed / self.count
        self.clear()
        return result


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Within the block SIGINT and SIGTERM only fill the list: the step ends, then the run."""
    received: list[int] = []
    previous = {s: signal.signal(s, lambda number, _frame: received.append(number))
                for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
