"""The one training loop: steps, health, schedule, averages, exact resume, curves.

A task owns modules and says what a batch and its loss are; an engine computes on one rank or many.
Batches are pure functions of (step, micro), so the data position *is* the step, and a
resumed run sees what the straight run would have seen.
"""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from vidgen.core.errors import InputError
from vidgen.core.runtime import (
    atomic_write,
    best_dtype,
    choose_device,
    reuse_freed_memory,
    write_error,
)
from vidgen.training import checkpoint
from vidgen.training.config import RunConfig, refuse_changes
from vidgen.training.engines.distributed import Place, current_place
from vidgen.training.engines.engine import Engine
from vidgen.training.task import Batches, Task

OnRecord = Callable[[dict[str, Any]], None]
_CURVE = "curve.jsonl"
MAX_BAD = 10
"""Unusable steps in a row that are skipped before a run stops."""


@dataclass(frozen=True)
class TrainResult:
    """State of a run when the loop returns."""

    step: int  # that comes next
    finished: bool  # whether that was the last one
    metrics: dict[str, float]  # of the last validation
    interrupted: bool = False  # whether a signal ended it, and not its minutes


def train(
    task: Task, run: RunConfig, *, resume: bool = False, record: dict[str, Any] | None = None,
    accept_changes: bool = True, on_record: OnRecord | None = None,
) -> TrainResult:
    """Run `task` to the end of its steps, its minutes, or an interrupt.

    `record` is the whole resolved config, kept as `task.json`; a run that goes on has to have the
    one that it began with, unless changes are accepted. On the main rank `on_record` gets every
    line of `curve.jsonl` before it is written, and may add to it.

    Raises:
        InputError: the folder holds a run already and `resume` is not set; another process runs
            there; its config differs and changes aren't accepted; or the loss is not usable for too
            long.
    """
    folder, place = Path(run.folder), current_place()
    source = find_source(folder, resume=resume)
    if source is not None and record is not None and not accept_changes:
        refuse_changes(folder / "task.json", record)
    place.barrier()  # all have looked before anything is written
    reuse_freed_memory(1 << 30)  # each step makes and frees gradients as large as the weights
    with ExitStack() as stack:
        if place.main:
            stack.enter_context(checkpoint.alone_in(folder))
            _mend_curve(folder / _CURVE)
            if resume and source is None:
                print(f"{folder} has no checkpoint to go on from: the run begins", file=sys.stderr)
            if record is not None:
                atomic_write(folder / "task.json", json.dumps(record, indent=1).encode())
            checkpoint.drop_partial(folder)
            if run.dtype == "bf16" and best_dtype(choose_device(run.device)) == "fp32":
                print("warning: this processor has no bf16 of its own, so run.dtype bf16 takes many"
                      " times as long as fp32; stop with Ctrl-C and begin anew with --set "
                      "run.dtype=auto", file=sys.stderr)
        place.barrier()
        engine = stack.enter_context(closing(_open_engine(task, run, place, source)))
        loop = _Loop(task, run, place, engine, on_record)
        return loop.run_from(loop.restore(source))


def _open_engine(task: Task, run: RunConfig, place: Place, source: Path | None) -> Engine:
    if run.engine.deepspeed is None:
        return Engine(task, run, place, source)
    from vidgen.training.engines.deepspeed import open_deepspeed

    return open_deepspeed(task, run, place, source)


def find_source(folder: Path, *, resume: bool) -> Path | None:
    """Return the checkpoint that a run in a folder goes on from; None: it begins.

    Raises:
        InputError: there is a run already and `resume` is not set.
        ModelError: its checkpoints are damaged.
    """
    source = checkpoint.latest_checkpoint(folder)
    if source is not None and not resume:
        raise InputError(f"{folder} holds a run already; add --resume, or name another folder")
    return source


def _mend_curve(curve: Path) -> None:
    try:
        if curve.exists():
            os.truncate(curve, curve.read_bytes().rfind(b"\n") + 1)
    except OSError as error:
        raise write_error(curve, error) from None


@dataclass
class _State:
    """Figures that a checkpoint's `state.json` holds."""

    metrics: dict[str, float] = field(default_factory=dict)  # of the last validation
    mean_loss: float = math.nan
    validated: int = -1  # step of the last validation
    best: float = math.inf  # lowest score of the name `best_of`, and its step
    best_of: str | None = None
    best_step: int = -1
    # sums of each number of the curve since its last line, over `count` steps
    sums: dict[str, float] = field(default_factory=dict)
    count: int = 0


class _Loop:
    def __init__(self, task: Task, run: RunConfig, place: Place, engine: Engine,
                 on_record: OnRecord | None) -> None:
        self.task, self.run, self.place, self.engine = task, run, place, engine
        self.folder, self.on_record = Path(run.folder), on_record
        self.device = choose_device(run.device)
        self.batches = Batches(task, run, place, ahead=self.device.type != "cpu")
        self.state = _State(best_of=run.best)
        self.bad_in_a_row, self.saved = 0, -1
        self._reset_speed()

    def _reset_speed(self) -> None:
        """Begin to measure the speed of this process, which no checkpoint keeps."""
        self.timed_steps, self.timed_samples, self.since = 0, 0, time.monotonic()

    def restore(self, source: Path | None) -> int:
        """Take a checkpoint's state, or begin; return the step to go on from."""
        if source is None:
            if self.place.data_size > 1:  # ranks that share a sample draw alike
                self._seed()
            return 0
        self.engine.load(source)
        known = checkpoint.load_rng(source, self.place)
        if not known:
            self._seed()
        if any(self.place.any(not known)):
            self._say(f"{source.name} has no random state for all {self.place.size} ranks; theirs "
                      "begins anew")
        meta = checkpoint.read_meta(source)
        self.state = _State(**{f.name: meta[f.name] for f in fields(_State) if f.name in meta})
        if self.state.best_of != self.run.best:
            self.state = replace(self.state, best=math.inf, best_of=self.run.best, best_step=-1)
        self._reset_speed()
        return int(meta["step"])

    def _seed(self) -> None:
        torch.manual_seed(self.run.seed * 1_000_003 + self.place.data_rank)

    def run_from(self, step: int) -> TrainResult:
        run, start = self.run, time.monotonic()
        last_save = start
        limit = math.inf if run.minutes is None else run.minutes * 60
        interrupted = False
        with _stop_signals() as stopped:
            while step < run.steps:
                if self.task.begin_step(step):
                    self.engine.ema.restart()
                self._step(step)
                step += 1
                if step % run.log_every == 0:
                    self._log(step)
                if step % run.validate_every == 0:
                    self._validate(step)
                now = time.monotonic()
                interrupted, late, due = self.place.any(
                    bool(stopped), now - start > limit,
                    now - last_save > run.checkpoint_minutes * 60 and not self.bad_in_a_row)
                if interrupted or late:
                    break
                if due:
                    self._save(step)
                    last_save = now
        finished = step >= run.steps
        if finished:
            self._log(step)
            if self.state.validated != step:
                self._validate(step)
        self._save(step)
        return TrainResult(step, finished, self.state.metrics, interrupted and not finished)

    def _step(self, step: int) -> None:
        """Take one optimiser step, unless it isn't usable."""
        for module in self.task.modules.values():
            module.train()
        scale, (accumulate, samples) = self.run.lr_scale(step), self.run.micro_batches(step)
        sums: dict[str, torch.Tensor] = {}
        made = []
        for micro in range(accumulate):
            batch = self.batches.get(step, micro)
            made.append(batch)
            last = micro + 1 == accumulate
            loss, named = self.engine.loss(batch, step, last=last)
            for name, value in {"loss": loss.detach(), **named}.items():
                sums[name] = sums[name] + value if name in sums else value
            if not last:
                self.engine.backward(loss / accumulate)
        means = self.place.mean({name: each / accumulate for name, each in sums.items()})
        mean, norm, most = means["loss"], math.nan, self.run.spike_factor * self.state.mean_loss
        has_gradients = math.isfinite(mean) and not mean > most
        if has_gradients:
            self.engine.backward(loss / accumulate)
            norm = self.engine.update(scale)
        else:
            self.engine.discard(loss)
        if not math.isfinite(norm):
            what = f"step {step}: loss {mean:.4g}"
            self._complain(step, mean, what + f", gradient norm {norm:.4g}" * has_gradients, made)
            return
        state = self.state
        known = math.isfinite(state.mean_loss)
        state.mean_loss = 0.99 * state.mean_loss + 0.01 * mean if known else mean
        self.bad_in_a_row = 0
        self.engine.ema.update(step)
        for name, number in {**means, "grad_norm": norm, "lr_scale": scale}.items():
            state.sums[name] = state.sums.get(name, 0.0) + number
        state.count += 1
        self.timed_steps += 1
        self.timed_samples += accumulate * samples * self.place.data_size

    def _complain(self, step: int, loss: float, what: str, made: list[Any]) -> None:
        """Report an unusable step, and stop where that is asked for or goes on too long."""
        self.bad_in_a_row += 1
        own = [file for batch in made for file in self.task.files(batch)]
        files = [file for part in self.place.told(own) for file in part]
        if files:
            what += f", of {', '.join(files)}"
        if self.bad_in_a_row >= {"skip": MAX_BAD, "stop": 1}[self.run.on_bad]:
            often = f"{self.bad_in_a_row} steps" if self.bad_in_a_row > 1 else "a step"
            raise InputError(
                f"the loss was not usable for {often} up to step {step} ({what}); nothing was "
                "saved since the last good checkpoint; lower optim.lr, or leave those files out, "
                "and --resume")
        self._say(f"{what}: skipped")
        self._record({"step": step, "event": self.run.on_bad, "loss": loss, "files": files})

    def _log(self, step: int) -> None:
        """Write a line of the curve: means since the last one, if steps were taken since."""
        state, elapsed = self.state, time.monotonic() - self.since
        if not state.count:
            return
        record = {
            "step": step, **{name: value / state.count for name, value in state.sums.items()},
            "samples_per_s": self.timed_samples / elapsed,
            "seconds_per_step": elapsed / max(self.timed_steps, 1),
            "memory_mb": memory_mb(self.device),
        }
        state.sums, state.count = {}, 0
        self._reset_speed()
        self._record(record)
        left = (self.run.steps - step) * record["seconds_per_step"] / 60
        self._say(f"step {step}/{self.run.steps} loss {record['loss']:.4f} "
                  f"{record['samples_per_s']:.1f} samples/s, {left:.0f} min left")

    def _validate(self, step: int) -> None:
        for module in self.task.modules.values():
            module.eval()
        with (self.engine.averaged(), torch.no_grad(), ExitStack() as stack):
            folder = self.folder if self.place.main else Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix="vidgen-")))
            metrics = self.task.validate(step, folder)
        self.state.metrics, self.state.validated = metrics, step
        self._record({"step": step, "validation": metrics})
        shown = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())
        self._say(f"step {step}: {shown}")
        name = self.run.best
        if name is None:
            return
        if name not in metrics:
            raise InputError(f"best is {name!r}, which validation doesn't score; it has "
                             f"{', '.join(metrics)}")
        if any(self.place.any(self.place.main and metrics[name] < self.state.best)):
            self.state.best, self.state.best_step = metrics[name], step
            self._save(step)

    def _say(self, what: str) -> None:
        if self.place.main:
            print(what, file=sys.stderr)

    def _record(self, record: dict[str, Any]) -> None:
        if not self.place.main:
            return
        if self.on_record is not None:
            self.on_record(record)
        try:
            with (self.folder / _CURVE).open("a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise write_error(self.folder / _CURVE, error) from error

    def _save(self, step: int) -> None:
        if step == self.saved:
            return
        target, state = checkpoint.step_folder(self.folder, step), self.state
        with checkpoint.written_together(target, self.place) as temporary:
            self.engine.save(temporary)
            checkpoint.save_rng(temporary, self.place)
            if self.place.main:
                (temporary / checkpoint.META).write_text(json.dumps({
                    "step": step, "ranks": self.place.size, **asdict(state)}))
        if self.place.main:
            checkpoint.drop_old(self.folder, self.run.keep, state.best_step)
        self.saved = step


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Have SIGINT and SIGTERM only fill the list inside the block: the step ends, then the run."""
    received: list[int] = []
    previous = {s: signal.signal(s, lambda number, _frame: received.append(number))
                for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def memory_mb(device: torch.device) -> float:
    """Return the most memory that this process has taken so far, on its device, in MB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
