"""`vidgen eval temporal`: how steady clips are in time, whoever made them.

Each clip's scores are a line of `<output>.jsonl`, addressed by the file's content and all else that
shaped them; a run that was killed finds them there and goes on. A clip is measured by itself, on
one thread, so the same files give the same numbers on any number of workers.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vidgen.core.errors import InputError
from vidgen.core.protocols import OnEvent
from vidgen.core.runtime import fingerprint, sha256_file
from vidgen.evaluation.metrics.clip import MEASURES_VERSION, measure_clip
from vidgen.evaluation.metrics.flow import opencv
from vidgen.evaluation.metrics.network_files import network_hash, parse_networks
from vidgen.evaluation.metrics.registry import PROXY
from vidgen.evaluation.metrics.vbench import RANGES
from vidgen.evaluation.score_log import ScoreLog
from vidgen.evaluation.suite import Item, PromptSuite, find_images, find_items
from vidgen.evaluation.temporal.comparison import compare
from vidgen.evaluation.temporal.notes import (
    note_few_segments,
    note_flat,
    note_left_alone,
    note_mixture,
    note_skipped,
    note_unmatched,
)
from vidgen.evaluation.temporal.summary import by_name, dimensions, figures
from vidgen.media.read import load_image
from vidgen.media.video_reader import TimedReader, VideoReader
from vidgen.pipeline.workers.scheduler import run_jobs
from vidgen.pipeline.workers.types import Job, Patience, Staff

if TYPE_CHECKING:
    from vidgen.evaluation.metrics.networks import Networks

WHOLE = 0.9
"""Share of the frames that a file says it has, below which it was cut off; rates may be rounded."""


@dataclass(frozen=True)
class TemporalRun:
    """What to measure.

    Args:
        videos: folders of clips; several are compared, the first with each other.
        networks: NAME=PATH of VBench's networks that are there; see `metrics.networks`.
        images: folder of the pictures with which the clips were to begin, or None.
        prompt_suite: file of the prompts, or None for whatever the folder holds.
        augmentation: how the prompts were reworded before generation; recorded, nothing more.
        workers: processes that measure beside each other; None: this one.
        ray: address of a Ray cluster that measures, as `Staff` takes it.

    Raises:
        InputError: no folder, one given twice, or no such number of workers.
    """

    videos: Sequence[str]
    networks: Sequence[str] = ()
    images: str | None = None
    prompt_suite: str | None = None
    augmentation: str = "none"
    workers: int | None = None
    ray: str | None = None

    def __post_init__(self) -> None:
        if not self.videos:
            raise InputError("no folder of clips; give --videos FOLDER")
        _ = self.staff
        names = [str(Path(folder).resolve()) for folder in self.videos]
        if len(set(names)) < len(names):
            raise InputError("a folder is given twice to --videos; name each once")

    @property
    def staff(self) -> Staff:
        """Who measures: each clip on one thread, so that all get the same numbers."""
        patience = Patience(stall=math.inf)  # of a clip's measures no progress is told
        return Staff(self.workers, self.ray, threads=1, patience=patience)


@dataclass
class Folder:
    """One folder on its way: its clips, those that failed, and their scores by name."""

    name: str
    path: str
    items: list[Item]
    missing_prompts: list[str] = field(default_factory=list)
    suite: PromptSuite | None = None
    images: dict[str, Path] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def names(self) -> set[str]:
        """Of its clips."""
        return {item.name for item in self.items}


@dataclass(frozen=True)
class _Job:
    path: str
    prompt: str
    image: str | None
    networks: tuple[tuple[str, str], ...]


def run_temporal(run: TemporalRun, output: str | Path, on_event: OnEvent) -> dict[str, Any]:
    """Measure folders of clips and compare them.

    Args:
        run: what to measure.
        output: results' file, beside which the scores of single clips go.
        on_event: told of progress, and in notes of what is left out.

    Returns:
        `folders`, each with `clips`, `failed`, `figures`, VBench's `dimensions` and what shaped
        them; `comparisons`; `settings`, `machine`.

    Raises:
        InputError: no clips, networks or pictures where they are said to be.
    """
    suite = None if run.prompt_suite is None else PromptSuite.read(run.prompt_suite)
    paths = parse_networks(list(run.networks))
    hashes = {name: network_hash(path) for name, path in paths.items()}
    versions = {"opencv": opencv().__version__, "numpy": np.__version__, **fingerprint()}
    folders = [_open(path, suite, run.images) for path in run.videos]
    _tell_names_apart(folders, has_extractor="i3d" in paths)
    note_skipped(paths, bool(run.images), len(folders) > 1, on_event)
    for folder in folders:
        note_unmatched(folder, bool(run.images), on_event)
        note_left_alone(folder, on_event)
    log = ScoreLog(Path(output).with_name(Path(output).name + ".jsonl"))
    identity = [MEASURES_VERSION, hashes, {k: versions[k] for k in ("opencv", "av", "numpy")}]
    if paths:
        identity.append(versions["torch"])
    given = tuple((name, str(path)) for name, path in paths.items())
    _measure(folders, given, identity, log, run.staff, on_event)
    for folder in folders:
        note_mixture(folder, on_event)
        note_flat(folder, on_event)
    results = [_result(folder) for folder in folders]
    comparisons = [
        compare(a["name"], by_name(a), b["name"], by_name(b)) for a, b in combinations(results, 2)
    ]
    for compared in comparisons:
        note_few_segments(compared, on_event)
    return {
        "suite": "temporal",
        "prompt_suite": None if suite is None else {"name": suite.name, "sha256": suite.sha256},
        "augmentation": run.augmentation,
        "measures_version": MEASURES_VERSION,
        "networks": hashes,
        "folders": results,
        "comparisons": comparisons,
        "machine": versions,
    }


def _open(path: str, suite: PromptSuite | None, images: str | None) -> Folder:
    folder = Folder(Path(path).resolve().name, path, find_items(path))
    if suite is not None:
        inside, outside, folder.missing_prompts = suite.split(folder.items)
        folder.items, folder.suite = inside, suite
        folder.failed = {i.path.name: f"its prompt isn't in {suite.name}" for i in outside}
    if images is not None:
        folder.images = find_images(images, folder.items, suite)
    return folder


def _tell_names_apart(folders: Sequence[Folder], *, has_extractor: bool) -> None:
    """Two folders of one name are told apart by their paths; two without a pair are refused.

    Distances of whole sets, by an extractor, need no pairs.
    """
    names = [folder.name for folder in folders]
    for folder in folders:
        if names.count(folder.name) > 1:
            folder.name = folder.path
    for one, other in combinations(folders, 2):
        if not has_extractor and not one.names & other.names:
            raise InputError(
                f"{one.name} and {other.name} have no clip of the same name in common, so they "
                "can't be compared clip by clip; name each pair of clips alike, or give an "
                "extractor of features, --network i3d=PATH, for the distance of the two sets"
            )


def _measure(
    folders: Sequence[Folder], networks: tuple[tuple[str, str], ...], identity: list[Any],
    log: ScoreLog, staff: Staff, tell: OnEvent,
) -> None:  # fmt: skip
    """Fill in the folders' scores; from the log what is there, the others by the workers."""
    wanted: dict[str, tuple[_Job, list[tuple[Folder, Item]]]] = {}
    for folder in folders:
        for item in folder.items:
            image = folder.images.get(item.name)
            job = _Job(str(item.path), item.prompt, None if image is None else str(image), networks)
            key = _key(job, identity)
            if key in log.scores:
                folder.scores[item.name] = log.scores[key]
            else:
                wanted.setdefault(key, (job, []))[1].append((folder, item))
    total = sum(len(folder.items) for folder in folders)
    done = total - sum(len(users) for _, users in wanted.values())
    tell({"event": "progress", "stage": "measure", "done": done, "total": total})
    jobs = (Job(key, job, name=job.path) for key, (job, _) in wanted.items())
    for outcome in run_jobs(jobs, measure, staff, tell):
        key, scores = outcome.job.key, str(outcome.error) if outcome.error else outcome.result
        for folder, item in wanted[key][1]:
            if isinstance(scores, str):
                folder.failed[item.path.name] = scores
            else:
                folder.scores[item.name] = scores
            done += 1
        if not isinstance(scores, str):
            log.add([(key, scores)])
        tell({"event": "progress", "stage": "measure", "done": done, "total": total})
    for folder in folders:  # in the order of names, whoever was ready first
        folder.scores = {item.name: _asked(folder.scores[item.name], item, folder.suite)
                         for item in folder.items if item.name in folder.scores}  # fmt: skip
        folder.failed = dict(sorted(folder.failed.items()))


def _asked(row: dict[str, Any], item: Item, suite: PromptSuite | None) -> dict[str, Any]:
    """A clip's scores without those of VBench's dimensions that its prompt isn't for."""
    if suite is None:
        return row
    figures = {
        name: value if (kind := name.removeprefix(PROXY)) not in RANGES
        or suite.counts(item.prompt, kind) else None
        for name, value in row["figures"].items()
    }  # fmt: skip
    return {**row, "figures": figures}


def _key(job: _Job, identity: list[Any]) -> str:
    """SHA-256 of all that shapes a clip's scores."""
    image = None if job.image is None else sha256_file(job.image)
    address = json.dumps([identity, sha256_file(job.path), job.prompt, image], sort_keys=True)
    return hashlib.sha256(address.encode()).hexdigest()


_networks: dict[tuple[tuple[str, str], ...], Networks] = {}


def measure(job: _Job, _tell: OnEvent) -> dict[str, Any]:
    """The scores of one clip.

    Raises:
        InputError: it is damaged, cut off, or too short.
    """
    image = None if job.image is None else load_image(job.image)[0]
    with TimedReader(job.path) as video:
        damages = [frame.is_damaged for frame in video.timed()]
    if any(damages):
        raise InputError(f"{sum(damages)} of its {len(damages)} frames are damaged; save it again")
    with VideoReader(job.path) as video:
        if job.networks and job.networks not in _networks:
            from vidgen.evaluation.metrics.networks import Networks

            _networks[job.networks] = Networks({n: Path(p) for n, p in job.networks})
        found = measure_clip(
            video, video.fps, image=image, prompt=job.prompt, networks=_networks.get(job.networks),
        )  # fmt: skip
        if found.num_frames < 2:
            raise InputError("it has a single frame, and measures in time need two; give a longer "
                             "clip")
        if found.num_frames < WHOLE * (video.stated_frames or 0):
            raise InputError(f"it ends after {found.num_frames} of {video.stated_frames} frames; "
                             "save it again")
        return {**asdict(found), "fps": str(video.fps), "size": list(video.size)}


def _result(folder: Folder) -> dict[str, Any]:
    items = {item.name: item for item in folder.items}
    rows = folder.scores
    clips = [
        {"name": name, "path": str(items[name].path), "prompt": items[name].prompt,
         "origin": items[name].origin, **row}
        for name, row in rows.items()
    ]  # fmt: skip
    return {
        "name": folder.name,
        "path": folder.path,
        "clips": clips,
        "failed": folder.failed,
        "missing_prompts": folder.missing_prompts,
        "fps": sorted({row["fps"] for row in rows.values()}),
        "sizes": sorted({tuple(row["size"]) for row in rows.values()}),
        "models": _distinct(items[name].origin for name in rows),
        "dynamic": sum(row["dynamic"] for row in rows.values()),
        **figures(clips),
        "dimensions": dimensions(clips),
    }


def _distinct(origins: Any) -> list[dict[str, Any]]:
    """Models of the clips that tell theirs, once each, with all their seeds."""
    found: dict[str, dict[str, Any]] = {}
    for origin in origins:
        if origin is not None:
            model = {k: v for k, v in origin.items() if k != "seed"}
            entry = found.setdefault(json.dumps(model, sort_keys=True), {**model, "seeds": []})
            entry["seeds"].append(origin["seed"])
    return list(found.values())
