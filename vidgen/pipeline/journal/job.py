"""A job's folder: the state of a running generation, saved next to its output.

    OUT.vidgen-job/
        job.json             the recipe: model, plan, inputs, machine, threads, back ends
        state.safetensors    the sampler between two steps, or its finished latents
        windows/00000 ...    latents of the finished windows of a long clip
        tried.safetensors    the best candidate of a clip or window so far
        made.safetensors     a diffusers pipeline's frames and sound
        sound_latents.safetensors    the sound's latents of the finished windows
        sound.safetensors    the clip's sound, made by its own or a text-to-audio model
        segments/00000 ...   encoded segments of the picture, and the state of its checks
        lock                 held by the process that works on the clip

The files that exist are the job's progress; no separate counter could contradict them. Each file is
written atomically and carries a checksum.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from vidgen.core.errors import InputError
from vidgen.core.protocols import SamplerState
from vidgen.core.runtime import atomic_write, lock_file
from vidgen.media.types import Segment

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION = 4
SUFFIX = ".vidgen-job"
JOB, STATE, LOCK = "job.json", "state.safetensors", "lock"
MADE, SOUND, SOUND_LATENTS = "made.safetensors", "sound.safetensors", "sound_latents.safetensors"
TRIED = "tried.safetensors"
WINDOWS, SEGMENTS = "windows", "segments"


def job_folder(output: str | os.PathLike[str]) -> Path:
    """Return the path of an output's job, next to the output."""
    path = Path(output)
    return path.with_name(path.name + SUFFIX)


def lock_job(folder: Path) -> TextIO | None:
    """Lock a job; return None if the file system has no locks, raise BlockingIOError if taken."""
    return lock_file(folder / LOCK)


def sweep(folder: Path) -> None:
    """Remove the temporary files that a killed process left in a job and next to its output."""
    name = glob.escape(folder.name.removesuffix(SUFFIX))
    outside = folder.parent.glob(f".{name}.{'[0-9a-f]' * 8}.tmp")
    for left in (*outside, *folder.rglob("*.tmp")):
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def remove_job(folder: Path) -> None:
    """Remove a job and its output's temporary files.

    Raises:
        BlockingIOError: a process works on the job.
        OSError: a file can't be removed.
    """
    lock = lock_job(folder)
    try:
        sweep(folder)
        shutil.rmtree(folder)
    finally:
        if lock is not None:
            lock.close()


def job_facts(folder: Path) -> dict[str, Any]:
    """Return a job's output, bytes, age_s, running, stage, done, total, prompt and seed.

    A damaged job has a `problem` instead of the last five. In a clip of several windows, `window`
    is the number of the current window, from 1.
    """
    sizes = list(_stats(folder))
    facts: dict[str, Any] = {
        "output": str(folder).removesuffix(SUFFIX), "bytes": sum(s.st_size for s in sizes),
        "age_s": round(time.time() - max((s.st_mtime for s in sizes), default=time.time())),
        "running": _is_locked(folder),
    }
    try:
        plan = read_job(folder)["recipe"]["plan"]
        stage = _stage(folder, plan)
        request = {"prompt": plan["prompt"], "seed": plan["seed"]}
    except InputError as error:
        return facts | {"problem": str(error)}
    except (KeyError, TypeError) as error:
        return facts | {"problem": f"{folder} is damaged ({type(error).__name__}: {error})"}
    return facts | stage | request


def _stats(folder: Path) -> Iterator[os.stat_result]:
    """Yield the stat of each file that no running process removes meanwhile."""
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                yield Path(place, name).stat()


def progress_text(facts: Mapping[str, Any]) -> str:
    """Return a job's progress as text: "sample, step 3 of 25"."""
    if "problem" in facts:
        return "damaged"
    if facts["stage"] == "sample" and not facts["done"] and "window" not in facts:
        return "sample, from the start"
    unit = "step" if facts["stage"] == "sample" else "frame"
    window = f" window {facts['window']}," if "window" in facts else ""
    return f"{facts['stage']},{window} {unit} {facts['done']} of {facts['total']}"


def _is_locked(folder: Path) -> bool:
    with suppress(OSError), (folder / LOCK).open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _stage(folder: Path, plan: Mapping[str, Any]) -> dict[str, Any]:
    state = next((folder / name for name in (MADE, STATE) if (folder / name).is_file()), None)
    facts = {} if state is None else _read_facts(state)
    if not facts.get("finished"):
        windows = kept_paths(folder, WINDOWS)
        until = _read_facts(windows[-1])["until"] if windows else 0
        done = facts["step"] if facts.get("num_done") == until else 0  # an earlier window's
        stage = {"stage": "sample", "done": done,
                 "total": facts.get("num_steps", plan["num_steps"])}
        return stage | {"window": len(windows) + 1} if windows else stage
    total = plan["kept_frames"] or facts["num_frames"]  # None: a diffusers pipeline's own length
    written = sum(_read_facts(path)["num_frames"] for path in kept_paths(folder, SEGMENTS))
    return {"stage": "write", "done": written, "total": total - facts.get("num_shown", 0)}


def write_job(folder: Path, recipe: Mapping[str, Any], *, overwrite: bool) -> None:
    """Write `job.json`; `overwrite` permits the output to replace a file. Raise OutputError."""
    job = {"format_version": FORMAT_VERSION, "overwrite": overwrite, "recipe": recipe}
    text = json.dumps(job, allow_nan=False)
    digest = hashlib.sha256(text.encode()).hexdigest()
    atomic_write(folder / JOB, f'{{"sha256": "{digest}",\n"job": {text}}}'.encode())


def begin_job(folder: Path, recipe: Mapping[str, Any], *, overwrite: bool) -> None:
    """Start a fresh job in a folder, emptied except for the lock; raise OSError or OutputError."""
    for entry in folder.iterdir():
        if entry.name != LOCK:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    for name in (SEGMENTS, WINDOWS):
        (folder / name).mkdir()
    write_job(folder, recipe, overwrite=overwrite)


def read_job(folder: Path) -> dict[str, Any]:
    """Read `job.json`; raise InputError if it is damaged or of another format version."""
    path = folder / JOB
    try:
        content = json.loads(path.read_text("utf-8"))
        job: dict[str, Any] = content["job"]
        if hashlib.sha256(json.dumps(job).encode()).hexdigest() != content["sha256"]:
            raise ValueError("its content doesn't match its checksum")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({error}); start again with --overwrite") from None
    if job["format_version"] != FORMAT_VERSION:
        raise InputError(f"{path} has format {job['format_version']} of another version of vidgen, "
                         f"this one reads {FORMAT_VERSION}; start again with --overwrite")
    return job


def part_name(kind: str, index: int) -> str:
    """Return the path inside a job of file `index` of a kind, `SEGMENTS` or `WINDOWS`."""
    return f"{kind}/{index:05d}.safetensors"


def kept_paths(folder: Path, kind: str) -> list[Path]:
    """Return the paths of a job's segments or windows up to the first missing one."""
    paths: list[Path] = []
    while (path := folder / part_name(kind, len(paths))).is_file():
        paths.append(path)
    return paths


_SEEN = "seen."


def segment_arrays(segment: Segment) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a segment as arrays, and its number of frames as JSON data.

    `content` holds the packets' bytes, `packets` a row for each: size, pts, dts, is it a keyframe.
    """
    rows = [[len(data), pts, dts, key] for data, pts, dts, key in segment.packets]
    content = np.frombuffer(b"".join(data for data, *_ in segment.packets), np.uint8)
    arrays = {"content": content, "packets": np.array(rows, np.int64)}
    arrays |= {f"{_SEEN}{name}": each for name, each in (segment.seen or {}).items()}
    return arrays, {"num_frames": segment.num_frames}


def read_segment(path: Path) -> Segment:
    """Read a segment's file; raise InputError if it is damaged."""
    arrays, facts = read_arrays(path, "content", "packets")
    content, packets, start = arrays["content"].tobytes(), [], 0
    for size, pts, dts, key in arrays["packets"].tolist():
        packets.append((content[start : start + size], pts, dts, bool(key)))
        start += size
    return Segment(facts["num_frames"], tuple(packets), _group(arrays, _SEEN) or None)


def _group(arrays: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return the arrays whose names begin with a prefix, by the rest of their names."""
    return {name.removeprefix(prefix): each for name, each in arrays.items()
            if name.startswith(prefix)}


def write_arrays(path: Path, arrays: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Write arrays or tensors of any shapes, and JSON data `facts`; raise OutputError."""
    text = json.dumps(facts)
    whole = {name: np.ascontiguousarray(_as_array(each)) for name, each in arrays.items()}
    facts_of = {"facts": text, "sha256": _digest(whole, text), "name": path.name}
    atomic_write(path, save(whole, facts_of))


_UNREADABLE = (
    OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError,
    AttributeError, BufferError,  # dtypes that numpy lacks, or gives no buffer of
)


def read_arrays(path: Path, *names: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arrays and JSON data of a file of `write_arrays`, which must hold `names`.

    A damaged file raises InputError.
    """
    with _opened(path) as (file, metadata, facts):
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if _digest(arrays, metadata["facts"]) != metadata["sha256"]:
            raise ValueError("its content doesn't match its checksum")
        if metadata["name"] != path.name:
            raise ValueError(f"it is a copy of {metadata['name']}")
        if not set(names) <= arrays.keys():
            raise ValueError(f"it holds {', '.join(arrays)}, not {', '.join(names)}")
    return arrays, facts


def _read_facts(path: Path) -> dict[str, Any]:
    with _opened(path) as (*_, facts):
        return facts


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, dict[str, str], dict[str, Any]]]:
    """Yield an open file, its metadata and facts; what can't be read is an InputError."""
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata()
            facts = json.loads(metadata["facts"])
            if not isinstance(facts, dict):
                raise ValueError(f"its facts are a {type(facts).__name__}")
            yield file, metadata, facts
    except _UNREADABLE as error:
        raise InputError(f"{path} is damaged ({error}); remove it to make its content again, or "
                         "start again with --overwrite") from None


def _digest(arrays: Mapping[str, Any], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.data)
    return digest.hexdigest()


_HISTORY, _CACHE = "history.", "cache."


def _as_array(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value
    tensor = value.detach().cpu()  # numpy has no bfloat16, which float32 holds exactly
    return (tensor.float() if tensor.itemsize < 4 else tensor).numpy()


def state_tensors(state: SamplerState) -> dict[str, Tensor]:
    """Return a sampler's state as tensors by name."""
    tensors = {f"{_HISTORY}{index}": each for index, each in enumerate(state.history)}
    tensors |= {f"{_CACHE}{name}": each for name, each in state.cache.items()}
    return tensors | {"latents": state.latents}


def state_of(step: int, tensors: Mapping[str, Tensor]) -> SamplerState:
    """Return the sampler's state at a step from the tensors of `state_tensors`."""
    history = _group(tensors, _HISTORY)
    ordered = tuple(history[str(index)] for index in range(len(history)))
    return SamplerState(step, tensors["latents"], ordered, _group(tensors, _CACHE))
