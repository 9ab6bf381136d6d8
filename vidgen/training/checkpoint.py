"""Checkpoints of a run, from which it resumes exactly, written atomically.

A checkpoint is a folder `step-00001200/` with `state.safetensors` (weights, averages, optimiser
moments), `rng-00000.safetensors` (random generators, one file per rank) and `state.json` (position,
metrics). DeepSpeed adds a folder `zero` and `manifest.json` with the hashes of its files. The
folder is written under a temporary name, synced and renamed, so every `step-*` folder is complete.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vidgen.core.errors import InputError, ModelError, OutputError
from vidgen.core.runtime import atomic_path, atomic_write, lock_file, sha256_file, write_error
from vidgen.training.engines.distributed import LostRankError, Place
from vidgen.training.task import Task
from vidgen.weights.load import read_tensors
from vidgen.weights.tensors import Lazy, held
from vidgen.weights.write import write_safetensors

STATE, META, _MANIFEST = "state.safetensors", "state.json", "manifest.json"
_PICKLES = "*.pt"
"""Pickles, which can run code when they are read; only those listed in the manifest are read."""


def live_weights(task: Task, *, frozen: bool) -> dict[str, Tensor]:
    """Return a task's weights, with or without frozen ones, and buffers, named as stored."""
    tensors = {}
    for key, module in task.modules.items():
        left = set() if frozen else {n for n, p in module.named_parameters() if not p.requires_grad}
        for name, value in module.state_dict().items():
            if name not in left:
                tensors[f"model/{key}.{name}"] = value
    return tensors


def write_tensors(path: Path, tensors: Mapping[str, Tensor | Lazy]) -> None:
    """Write tensors of a checkpoint, holding one in memory at a time."""
    write_safetensors(path, {name: held(value) if isinstance(value, Tensor) else value
                             for name, value in tensors.items()})


@contextmanager
def written_together(target: Path, place: Place) -> Iterator[Path]:
    """Yield a temporary folder for all ranks to write into, renamed to `target` at the end.

    Raises:
        OutputError: the folder can't be written or the disk is full; an old `target` stays.
        LostRankError: the main rank failed and removed the folder.
    """
    with ExitStack() as stack:
        name = ""
        if place.main:
            temporary = stack.enter_context(atomic_path(target))
            temporary.mkdir(parents=True)
            name = temporary.name
        temporary = target.with_name(place.from_main(name))
        try:
            yield temporary
        except (OSError, OutputError) as error:
            if not temporary.is_dir():
                raise LostRankError(f"{temporary} was removed: the main rank failed") from error
            if isinstance(error, OutputError):
                raise
            raise write_error(target, error) from error
        place.barrier()
        pickles = sorted(temporary.rglob(_PICKLES))[place.rank :: place.size]
        hashes = place.gather({str(p.relative_to(temporary)): sha256_file(p) for p in pickles})
        listing = {name: sha256 for part in hashes for name, sha256 in part.items()}
        if place.main and listing:
            (temporary / _MANIFEST).write_text(json.dumps(listing, indent=1))
    place.barrier()


def check_manifest(folder: Path) -> None:
    """Raise ModelError for a checkpoint whose pickles differ from those that the run wrote."""
    try:
        listing = json.loads((folder / _MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder} has no readable {_MANIFEST}, so its files can't be trusted; "
                         "resume from another step-* folder") from error
    found = {str(p.relative_to(folder)) for p in folder.rglob(_PICKLES)}
    for name in sorted(found | listing.keys()):
        if name not in found or sha256_file(folder / name) != listing.get(name):
            raise ModelError(f"{folder / name} was changed since the run wrote it (see "
                             f"{_MANIFEST}) and isn't read, as it could run code; resume from "
                             "another step-* folder")


def save_rng(folder: Path, place: Place) -> None:
    """Write the state of this rank's random generators."""
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    write_tensors(folder / f"rng-{place.rank:05d}.safetensors", tensors)


def load_rng(folder: Path, place: Place) -> bool:
    """Restore this rank's random generators; return False if the checkpoint lacks them."""
    path = folder / f"rng-{place.rank:05d}.safetensors"
    if not path.exists():
        return False
    tensors = read_tensors(path)
    torch.set_rng_state(tensors["cpu"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
    return True


def read_meta(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's position, metrics and sums; raise ModelError if they are damaged."""
    try:
        meta: dict[str, Any] = json.loads((folder / META).read_text())
        if not isinstance(meta["step"], int) or not isinstance(meta["metrics"], dict):
            raise TypeError("step is not a number, or metrics not an object")
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        others = [other.name for other in _complete(folder.parent) if other != folder]
        remedy = (f"remove {shlex.quote(str(folder))} to resume from {others[-1]}" if others else
                  "no other step-* folder is complete, so the run can't resume")
        raise ModelError(f"{folder / META} is damaged ({type(error).__name__}: {error}); "
                         f"{remedy}") from None
    return meta


def step_folder(folder: Path, step: int) -> Path:
    """Return the folder of the checkpoint taken before `step` (from 0)."""
    return folder / f"step-{step:08d}"


def drop_old(folder: Path, keep: int, best: int) -> None:
    """Remove all checkpoints but the `keep` newest and that of step `best` (-1: none)."""
    kept = {*_complete(folder)[-keep:], step_folder(folder, best)}
    for old in set(folder.glob("step-*")) - kept:
        shutil.rmtree(old)


def drop_partial(folder: Path) -> None:
    """Remove temporary files of a save that was killed."""
    for partial in folder.glob(".*.tmp"):
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint of a run folder, or None."""
    return next(reversed(_complete(folder)), None)


def _complete(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if (path / META).exists())


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with `prefix`, under their names without it."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def average_of(folder: Path, tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """Return the average of a parameter; raise ModelError if the checkpoint has none."""
    if f"ema/{name}" not in tensors:
        raise ModelError(f"{folder} has no average of {name}: it was made with another config")
    return tensors[f"ema/{name}"]


def load_averages(folder: Path, key: str, target: Path | None = None) -> dict[str, Tensor]:
    """Return the averaged weights of module `key` from a run's checkpoint `target` or its newest.

    Buffers and frozen parameters are the live ones; checkpoints of DeepSpeed and of tasks without
    `saves_frozen` have no frozen parameters. Raise ModelError if the run has no checkpoint.
    """
    target = target or latest_checkpoint(folder)
    if target is None:
        raise ModelError(f"{folder} has no checkpoint; train there first")
    tensors = read_tensors(target / STATE)
    return below(tensors, f"model/{key}.") | below(tensors, f"ema/{key}.")


@contextmanager
def lock_run(folder: Path) -> Iterator[None]:
    """Make a run's folder and lock it inside the block, if the file system has locks.

    The file `pid` is for `scripts/quiet`, which pauses the process.

    Raises:
        InputError: another run holds the lock, or the folder is a file.
        OutputError: the folder can't be written.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"run.folder {folder} is a file; choose another folder")
    path, pid = folder / "lock", str(os.getpid())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = lock_file(path)
    except BlockingIOError:
        raise InputError(f"a run (pid {path.read_text()[:20].strip() or 'unknown'}) is writing to "
                         f"{folder}; wait until it ends, or choose another folder") from None
    except OSError as error:
        raise write_error(folder, error) from None
    with held or nullcontext():
        path.write_text(pid)
        atomic_write(folder / "pid", pid.encode())
        try:
            yield
        finally:
            (folder / "pid").unlink(missing_ok=True)
