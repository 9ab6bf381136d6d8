"""The training loop: steps, skipped losses, validation, curve, checkpoints and exact resume.

A task defines modules, batches and their loss; an engine computes on one rank or many. Batches are
pure functions of (step, micro), so a resumed run needs only its step to draw the same batches as
an uninterrupted one.
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
    time_text,
    write_error,
)
from vidgen.training import checkpoint
from vidgen.training.config import RunConfig, refuse_changes
from vidgen.training.engines.distributed import Place, current_place
from vidgen.training.engines.engine import TrainingEngine
from vidgen.training.task import Batches, Task

OnRecord = Callable[[dict[str, Any]], None]
_CURVE = "curve.jsonl"
MAX_BAD = 10
"""Number of unusable steps in a row after which a run stops."""


@dataclass(frozen=True)
class TrainResult:
    """Hold the state of a run when the loop returns."""

    step: int  # the next one to take
    finished: bool  # whether all steps are taken
    metrics: dict[str, float]  # of the last validation
    interrupted: bool = False  # whether a signal ended the run, rather than its `minutes`


def train(
    task: Task, run: RunConfig, *, resume: bool = False, record: dict[str, Any] | None = None,
    accept_changes: bool = True, on_record: OnRecord | None = None,
) -> TrainResult:
    """Train until the steps or minutes of `run` are over, or a signal arrives.

    Args:
        record: resolved config for `task.json`, which must not change unless `accept_changes`.
        on_record: called on the main rank with, and may change, each new line of `curve.jsonl`.

    Raises:
        InputError: the folder holds a run already and `resume` is not set; another process runs
            there; the config differs; or the loss is unusable for too many steps.
    """
    folder, place = Path(run.folder), current_place()
    source = find_source(folder, resume=resume)
    if source is not None and record is not None and not accept_changes:
        refuse_changes(folder / "task.json", record)
    place.barrier()  # no rank writes before all ranks have looked
    reuse_freed_memory(1 << 30)  # each step makes and frees gradients as large as the weights
    with ExitStack() as stack:
        if place.main:
            stack.enter_context(checkpoint.lock_run(folder))
            _drop_torn_line(folder / _CURVE)
            if resume and source is None:
                print(f"{folder} has no checkpoint to resume; starting at step 0", file=sys.stderr)
            if record is not None:
                atomic_write(folder / "task.json", json.dumps(record, indent=1).encode())
            checkpoint.drop_partial(folder)
            if run.dtype == "bf16" and best_dtype(choose_device(run.device)) == "fp32":
                print("warning: this processor has no native bf16, so run.dtype bf16 takes many "
                      "times as long as fp32; stop with Ctrl-C and start again with --set "
                      "run.dtype=auto", file=sys.stderr)
        place.barrier()
        engine = stack.enter_context(closing(_open_engine(task, run, place, source)))
        loop = _Loop(task, run, place, engine, on_record)
        return loop.run_from(loop.restore(source))


def _open_engine(task: Task, run: RunConfig, place: Place, source: Path | None) -> TrainingEngine:
    if run.engine.deepspeed is None:
        return TrainingEngine(task, run, place, source)
    from vidgen.training.engines.deepspeed import open_deepspeed

    return open_deepspeed(task, run, place, source)


def find_source(folder: Path, *, resume: bool) -> Path | None:
    """Return the checkpoint to resume from, if any; InputError if one exists without `resume`."""
    source = checkpoint.latest_checkpoint(folder)
    if source is not None and not resume:
        raise InputError(f"{folder} holds a run already; add --resume, or choose another folder")
    return source


def _drop_torn_line(curve: Path) -> None:
    try:
        if curve.exists():
            os.truncate(curve, curve.read_bytes().rfind(b"\n") + 1)
    except OSError as error:
        raise write_error(curve, error) from None


@dataclass
class _State:
    """Hold the numbers that a checkpoint keeps in `state.json`."""

    metrics: dict[str, float] = field(default_factory=dict)  # of the last validation
    mean_loss: float = math.nan
    validated: int = -1  # step of the last validation
    best: float = math.inf  # lowest score named `best_of`, of step `best_step`
    best_of: str | None = None
    best_step: int = -1
    # sums of each number of the curve since its last line, over `count` steps
    sums: dict[str, float] = field(default_factory=dict)
    count: int = 0


class _Loop:
    def __init__(self, task: Task, run: RunConfig, place: Place, engine: TrainingEngine,
                 on_record: OnRecord | None) -> None:
        self.task, self.run, self.place, self.engine = task, run, place, engine
        self.folder, self.on_record = Path(run.folder), on_record
        self.device = choose_device(run.device)
        self.batches = Batches(task, run, place, ahead=self.device.type != "cpu")
        self.state = _State(best_of=run.best)
        self.bad_in_a_row, self.saved = 0, -1
        self._reset_speed()

    def _reset_speed(self) -> None:
        self.timed_steps, self.timed_samples, self.since = 0, 0, time.monotonic()

    def restore(self, source: Path | None) -> int:
        """Load a checkpoint, if any; return the next step."""
        if source is None:
            if self.place.data_size > 1:  # ranks that share a sample draw alike
                self._seed()
            return 0
        self.engine.load(source)
        known = checkpoint.load_rng(source, self.place)
        if not known:
            self._seed()
        if any(self.place.any(not known)):
            self._say(f"{source.name} lacks the random state of some of {self.place.size} ranks; "
                      "they start from the seed")
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
        """Take one optimiser step, or skip it if the loss or the gradients are unusable."""
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
            values = f"step {step}: loss {mean:.4g}"
            values += f", gradient norm {norm:.4g}" * has_gradients
            self._skip(step, mean, values, made)
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

    def _skip(self, step: int, loss: float, values: str, batches: list[Any]) -> None:
        """Report an unusable step; stop if the run asks for it or too many steps were unusable."""
        self.bad_in_a_row += 1
        own = [file for batch in batches for file in self.task.files(batch)]
        files = [file for part in self.place.gather(own) for file in part]
        if files:
            values += f", of {', '.join(files)}"
        if self.bad_in_a_row >= {"skip": MAX_BAD, "stop": 1}[self.run.on_bad]:
            count = f"{self.bad_in_a_row} steps" if self.bad_in_a_row > 1 else "a step"
            raise InputError(
                f"the loss was unusable for {count} up to step {step} ({values}); the last "
                "checkpoint is from before them; lower optim.lr or leave those files out, then "
                "--resume")
        self._say(f"{values}: skipped")
        self._record({"step": step, "event": self.run.on_bad, "loss": loss, "files": files})

    def _log(self, step: int) -> None:
        """Write the means since the last line to the curve, if a step was taken since."""
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
        left = time_text((self.run.steps - step) * record["seconds_per_step"])
        self._say(f"step {step}/{self.run.steps} loss {record['loss']:.4f} "
                  f"{record['samples_per_s']:.1f} samples/s, {left} left")

    def _validate(self, step: int) -> None:
        for module in self.task.modules.values():
            module.eval()
        with (self.engine.averaged(), torch.no_grad(), ExitStack() as stack):
            folder = self.folder if self.place.main else Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix="vidgen-")))
            metrics = self.task.validate(step, folder)
        self.state.metrics, self.state.validated = metrics, step
        self.saved = -1  # a checkpoint of this step lacks these scores
        self._record({"step": step, "validation": metrics})
        shown = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())
        self._say(f"step {step}: {shown}")
        name = self.run.best
        if name is None:
            return
        if name not in metrics:
            raise InputError(f"run.best is {name!r}, which is no score of validation; those are "
                             f"{', '.join(metrics)}")
        if any(self.place.any(self.place.main and metrics[name] < self.state.best)):
            self.state.best, self.state.best_step = metrics[name], step
            self._save(step)

    def _say(self, text: str) -> None:
        if self.place.main:
            print(text, file=sys.stderr)

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
    """Collect SIGINT and SIGTERM in a list inside the block, so that the current step can end."""
    received: list[int] = []
    previous = {s: signal.signal(s, lambda number, _frame: received.append(number))
                for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def memory_mb(device: torch.device) -> float:
    """Return the peak memory of this process so far in MB: GPU memory on CUDA, else RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
