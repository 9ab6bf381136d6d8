"""`vidgen eval SUITE`: a model makes clips of a list of prompts, which are then measured in time.

    RESULTS.clips/
        made/   a store of clips, addressed by all that shapes them
        named/  the same files, PROMPT-NUMBER.mp4 as VBench names them

`named` holds the clips of the last run alone.
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
from vidgen.pipeline.workers.scheduler import run_jobs, settle_threads
from vidgen.pipeline.workers.types import Job, Staff
from vidgen.weights.folder import DiffusersFolder, ModelFolder
from vidgen.weights.layouts import open_model

MAX_SEEDS = 1000


@dataclass(frozen=True)
class SuiteRun:
    """What to make and measure.

    Raises:
        InputError: a number out of its range.
    """

    suite: str  # file of the prompts
    model: str = "toybox"  # name, folder or hub id
    seeds: int = 1  # clips of each prompt, of consecutive seeds
    seed: int = 0
    # fields of `Request` that all clips share
    settings: dict[str, Any] = field(default_factory=dict)
    dtype: str | None = None  # of the computation; None: the device's best
    networks: Sequence[str] = ()  # as in `TemporalRun`
    images: str | None = None  # folder of first frames, named like their prompts
    staff: Staff = field(default_factory=Staff)

    def __post_init__(self) -> None:
        if not 1 <= self.seeds <= MAX_SEEDS:
            raise InputError(f"seeds is {self.seeds}; give a whole number from 1 to {MAX_SEEDS}")


def run_suite(run: SuiteRun, output: str | Path, on_event: OnEvent) -> dict[str, Any]:
    """Make a suite's clips, next to the results' file `output`, and measure them.

    Returns:
        The results of `run_temporal`, with `generation`: model, seeds, settings, threads. A clip
        that could not be made is among the folder's `failed`.

    Raises:
        InputError: no prompts, or a request that the model can't meet.
    """
    suite = PromptSuite.read(run.suite)
    folder = open_model(run.model)
    run = replace(run, dtype=run.dtype or best_dtype(choose_device()))
    place = Path(output).with_suffix(".clips")
    if place.exists() and not (place / "made").is_dir():
        raise InputError(f"{place} is there and holds no clips of an evaluation; move it away, or "
                         "give -o another name")
    pictures = _first_pictures(run.images, suite, on_event)
    requests = dict(_requests(run, suite, pictures))
    _check_settings(run, folder, pictures)
    store = Store(place / "made")
    store.folder.mkdir(parents=True, exist_ok=True)
    staff = settle_threads(store.folder, run.staff, on_event)
    paths = {name: store.path(identity(request, model=folder.content_hash, dtype=run.dtype))
             for name, request in requests.items()}
    failed = _make(run, folder, requests, paths, staff, on_event)
    there = {name: path for name, path in paths.items() if name not in failed}
    if not there:
        raise InputError(f"no clip could be made: {next(iter(failed.values()))}")
    _lay_out(place / "named", there)
    measuring = TemporalRun((str(place / "named"),), run.networks, run.images, run.suite,
                            staff.workers, staff.ray)
    result = run_temporal(measuring, output, on_event)
    (measured,) = result["folders"]
    measured["name"] = folder.name
    measured["failed"] |= {f"{name}.mp4": why for name, why in failed.items()}
    settings = {**run.settings, **run.settings.get("settings", {})}  # the model's own, too
    settings.pop("settings", None)
    result["generation"] = {
        "model": {"name": folder.name, "sha256": folder.content_hash},
        "seeds": list(range(run.seed, run.seed + run.seeds)), "dtype": run.dtype,
        "settings": {name: value if isinstance(value, int | float) else str(value)
                     for name, value in settings.items()},
        "threads": staff.threads, "clips": len(requests)}
    return result


def _check_settings(
    run: SuiteRun, folder: ModelFolder | DiffusersFolder, pictures: Mapping[str, Path]
) -> None:
    """Refuse settings that no clip of the model can have; prompts are checked one by one."""
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


def _first_pictures(images: str | None, suite: PromptSuite, tell: OnEvent) -> dict[str, Path]:
    if images is None:
        return {}
    there = pictures_in(images)
    found = {p: path for p in suite.prompts if (path := picture_of(p, there, suite)) is not None}
    if not found:
        raise InputError(f"no picture of {images} is named like a prompt of {suite.name}; name "
                         "them 'PROMPT.png'")
    if bare := len(suite.prompts) - len(found):
        tell({"event": "note", "text": f"{bare} of {len(suite.prompts)} prompts of {suite.name} "
              f"have no picture in {images}; their clips begin without one"})
    return found


def _stem(prompt: str, taken: dict[str, int]) -> str:
    text = file_stem(prompt)
    taken[text] = taken.get(text, 0) + 1
    return text if taken[text] == 1 else f"{text}~{taken[text]}"


def _make(
    run: SuiteRun, folder: ModelFolder | DiffusersFolder, requests: Mapping[str, Request],
    paths: Mapping[str, Path], staff: Staff, tell: OnEvent,
) -> dict[str, str]:
    """Make the clips that don't exist; return the reason of each that failed, by name."""
    missing = [name for name, path in paths.items() if not path.is_file()]
    total, failed = len(paths), dict[str, str]()
    done = total - len(missing)
    tell({"event": "progress", "stage": "clips", "done": done, "total": total})
    jobs = (Job(name, (requests[name], paths[name], {"name": name}), name=name)
            for name in missing)
    work = ClipWork(partial(load, run.model, dtype=run.dtype), folder.content_hash)
    try:
        for outcome in run_jobs(jobs, work, staff, tell):
            if outcome.error is not None:
                failed[outcome.job.key] = str(outcome.error)
                tell({"event": "note", "text": f"{outcome.job.name}: {outcome.error}"})
            done += 1
            tell({"event": "progress", "stage": "clips", "done": done, "total": total})
    finally:
        work.close()
    return failed


def _lay_out(place: Path, files: dict[str, Path]) -> None:
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
