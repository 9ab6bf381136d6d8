"""`vidgen eval SUITE`: generation of clips for a list of prompts, and their temporal measures.

Folders next to the results:

    RESULTS.clips/
        made/   a store of clips, addressed by request, model and dtype
        named/  links to the last run's clips, as PROMPT-NUMBER.mp4 like VBench's

Clips of earlier runs stay in `made`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from vidgen.core.errors import InputError
from vidgen.core.protocols import OnEvent
from vidgen.core.request import Request
from vidgen.core.runtime import atomic_path, best_dtype, choose_device, link
from vidgen.core.store import Store
from vidgen.evaluation.suite import PromptSuite, file_stem, picture_of, pictures_in
from vidgen.evaluation.temporal.run import TemporalRun, run_temporal
from vidgen.pipeline.engine import load
from vidgen.pipeline.plan import make_plan
from vidgen.pipeline.recipe import identity
from vidgen.pipeline.workers.clip_work import ClipWork
from vidgen.pipeline.workers.scheduler import run_jobs
from vidgen.pipeline.workers.types import Job, WorkerOptions
from vidgen.weights.folder import DiffusersFolder, ModelFolder
from vidgen.weights.layouts import open_model

MAX_SEEDS = 1000


@dataclass(frozen=True)
class SuiteRun:
    """Settings of an evaluation of a prompt suite.

    Raises:
        InputError: `seeds` is out of range.
    """

    suite: str  # file of the prompts
    model: str = "toybox"  # name, folder or hub id
    seeds: int = 1  # clips of each prompt, of consecutive seeds
    seed: int = 0
    # fields of `Request`, the same for all clips
    settings: dict[str, Any] = field(default_factory=dict)
    dtype: str | None = None  # of the computation; None: the device's best
    networks: Sequence[str] = ()  # as in `TemporalRun`
    images: str | None = None  # folder of first frames, named like their prompts
    workers: WorkerOptions = field(default_factory=WorkerOptions)

    def __post_init__(self) -> None:
        if not 1 <= self.seeds <= MAX_SEEDS:
            raise InputError(f"seeds is {self.seeds}; give a whole number from 1 to {MAX_SEEDS}")


def run_suite(run: SuiteRun, output: str | Path, on_event: OnEvent) -> dict[str, Any]:
    """Generate the clips of a suite, next to the results' file `output`, and measure them.

    Returns:
        Results of `run_temporal`, with `generation`: model, seeds, dtype, settings, threads and
        number of clips. The folder's `failed` also names clips that couldn't be generated.

    Raises:
        InputError: no prompts, or a request that the model doesn't support.
    """
    suite = PromptSuite.read(run.suite)
    folder = open_model(run.model)
    run = replace(run, dtype=run.dtype or best_dtype(choose_device()))
    place = Path(output).with_suffix(".clips")
    if place.exists() and not (place / "made").is_dir():
        raise InputError(f"{place} exists and holds no clips of an evaluation; move it away, or "
                         "give -o another name")
    pictures = _first_pictures(run.images, suite, on_event)
    requests = dict(_requests(run, suite, pictures))
    _check_settings(run, folder, pictures)
    store = Store(place / "made")
    store.folder.mkdir(parents=True, exist_ok=True)
    paths = {name: store.path(identity(request, model=folder.content_hash, dtype=run.dtype))
             for name, request in requests.items()}
    failed = _make(run, folder, requests, paths, on_event)
    clips = {name: path for name, path in paths.items() if name not in failed}
    if not clips:
        raise InputError(f"no clip could be generated: {next(iter(failed.values()))}")
    _link_clips(place / "named", clips)
    measuring = TemporalRun((str(place / "named"),), run.networks, run.images, run.suite,
                            run.workers.count, run.workers.ray)
    result = run_temporal(measuring, output, on_event)
    (measured,) = result["folders"]
    measured["name"] = folder.name
    measured["failed"] |= {f"{name}.mp4": why for name, why in failed.items()}
    settings = {**run.settings, **run.settings.get("settings", {})}  # with the model's own
    settings.pop("settings", None)
    result["generation"] = {
        "model": {"name": folder.name, "sha256": folder.content_hash},
        "seeds": list(range(run.seed, run.seed + run.seeds)), "dtype": run.dtype,
        "settings": {name: value if isinstance(value, int | float) else str(value)
                     for name, value in settings.items()},
        "threads": run.workers.num_threads, "clips": len(requests)}
    return result


def _check_settings(
    run: SuiteRun, folder: ModelFolder | DiffusersFolder, pictures: Mapping[str, Path]
) -> None:
    """Raise InputError for settings that the model doesn't support, whatever the prompt."""
    if isinstance(folder, ModelFolder):
        image = next(iter(pictures.values()), None)
        given = {} if image is None else {"image": str(image)}
        make_plan(Request.of("a clip", {"audio": "none", **run.settings, **given}), folder)


def _requests(
    run: SuiteRun, suite: PromptSuite, pictures: Mapping[str, Path]
) -> Iterator[tuple[str, Request]]:
    """Yield the name and request of each clip."""
    stems = dict[str, int]()
    for prompt in suite.prompts:
        stem = _stem(prompt, stems)
        image = {"image": str(pictures[prompt])} if prompt in pictures else {}
        for number in range(run.seeds):
            options = {"audio": "none", "seed": run.seed + number, **run.settings, **image}
            yield f"{stem}-{number}", Request.of(prompt, options)


def _first_pictures(images: str | None, suite: PromptSuite, on_event: OnEvent) -> dict[str, Path]:
    if images is None:
        return {}
    pictures = pictures_in(images)
    found = {prompt: path for prompt in suite.prompts
             if (path := picture_of(prompt, pictures, suite)) is not None}
    if not found:
        raise InputError(f"no picture of {images} is named like a prompt of {suite.name}; name "
                         "them 'PROMPT.png'")
    if bare := len(suite.prompts) - len(found):
        text = (f"{bare} of {len(suite.prompts)} prompts of {suite.name} have no picture in "
                f"{images}; their clips start without one")
        on_event({"event": "note", "text": text})
    return found


def _stem(prompt: str, taken: dict[str, int]) -> str:
    text = file_stem(prompt)
    taken[text] = taken.get(text, 0) + 1
    return text if taken[text] == 1 else f"{text}~{taken[text]}"


def _make(
    run: SuiteRun, folder: ModelFolder | DiffusersFolder, requests: Mapping[str, Request],
    paths: Mapping[str, Path], on_event: OnEvent,
) -> dict[str, str]:
    """Generate the missing clips; return {name: error} of those that failed."""
    missing = [name for name, path in paths.items() if not path.is_file()]
    total, failed = len(paths), dict[str, str]()
    done = total - len(missing)
    on_event({"event": "progress", "stage": "clips", "done": done, "total": total})
    jobs = (Job(name, (requests[name], paths[name], {"name": name}), name=name)
            for name in missing)
    work = ClipWork(partial(load, run.model, dtype=run.dtype), folder.content_hash)
    try:
        for outcome in run_jobs(jobs, work, run.workers, on_event):
            if outcome.error is not None:
                failed[outcome.job.key] = str(outcome.error)
                on_event({"event": "note", "text": f"{outcome.job.name}: {outcome.error}"})
            done += 1
            on_event({"event": "progress", "stage": "clips", "done": done, "total": total})
    finally:
        work.close()
    return failed


def _link_clips(place: Path, files: dict[str, Path]) -> None:
    place.mkdir(exist_ok=True)
    for path in place.glob("*.mp4"):
        if path.stem not in files:
            path.unlink()
    for name, file in files.items():
        path = place / f"{name}.mp4"
        if path.exists() and path.samefile(file):
            continue
        with atomic_path(path) as temporary:
            link(file, temporary)
