"""`vidgen eval temporal`: how steady clips are in time, whoever made them.

Each clip's scores are a line of `<output>.jsonl`, addressed by the file's content and all else that
shaped them; a run that was killed finds them there and goes on. A clip is measured by itself, on
one thread, so the same files give the same numbers on any number of workers.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vidgen.core.errors import InputError
from vidgen.core.protocols import OnEvent
from vidgen.core.runtime import fingerprint, sha256_file, write_error
from vidgen.core.store import address_of
from vidgen.evaluation.metrics.clip import MEASURES_VERSION, measure_clip
from vidgen.evaluation.metrics.flow import opencv
from vidgen.evaluation.metrics.network_files import NETWORKS, network_hash, parse_networks
from vidgen.evaluation.metrics.registry import PROXY
from vidgen.evaluation.metrics.vbench import RANGES
from vidgen.evaluation.suite import CLIP_SUFFIXES, Item, PromptSuite, find_images, find_items
from vidgen.evaluation.temporal.comparison import compare
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


class ScoreLog:
    """Scores by content address, one JSON line each, safe against being killed at any moment."""

    def __init__(self, path: Path) -> None:
        self.path, self.scores = path, dict[str, dict[str, Any]]()
        try:
            lines = path.read_bytes().splitlines() if path.exists() else []
        except OSError as error:
            raise InputError(f"{path}, where scores are kept, can't be read: {error.strerror}; "
                             "move it away, or name another output") from None
        for line in lines:
            try:
                entry = json.loads(line)
                key, scores = entry["key"], entry["scores"]
            except (ValueError, LookupError, TypeError, RecursionError):
                continue  # cut short by a kill, or no scores
            if isinstance(key, str) and isinstance(scores, dict):
                self.scores[key] = scores

    def add(self, entries: Iterable[tuple[str, dict[str, Any]]]) -> None:
        """Append scores and have them on disk.

        Raises:
            OutputError: no room, or not to be written.
        """
        try:
            with self.path.open("a+b") as file:
                if file.tell() and not self.path.read_bytes().endswith(b"\n"):
                    file.write(b"\n")
                for key, scores in entries:
                    self.scores[key] = scores
                    file.write(json.dumps({"key": key, "scores": scores}).encode() + b"\n")
        except OSError as error:
            raise write_error(self.path, error) from None


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
    _note_skipped(paths, bool(run.images), len(folders) > 1, on_event)
    for folder in folders:
        _note_unmatched(folder, bool(run.images), on_event)
        _note_left_alone(folder, on_event)
    log = ScoreLog(Path(output).with_name(Path(output).name + ".jsonl"))
    identity = [MEASURES_VERSION, hashes, {k: versions[k] for k in ("opencv", "av", "numpy")}]
    if paths:
        identity.append(versions["torch"])
    given = tuple((name, str(path)) for name, path in paths.items())
    _measure(folders, given, identity, log, run.staff, on_event)
    for folder in folders:
        _note_mixture(folder, on_event)
        _note_flat(folder, on_event)
    results = [_result(folder) for folder in folders]
    comparisons = [
        compare(a["name"], by_name(a), b["name"], by_name(b)) for a, b in combinations(results, 2)
    ]
    for compared in comparisons:
        _note_few_segments(compared, on_event)
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
    return address_of([identity, sha256_file(job.path), job.prompt, image])


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


def _note_skipped(
    paths: Mapping[str, Path], has_images: bool, compares: bool, tell: OnEvent
) -> None:
    """Say which of VBench's measures can't be taken, and what they need."""
    for name, network in NETWORKS.items():
        wanted = [kind for kind in network.measures if has_images or not kind.startswith("i2v")]
        if name not in paths and wanted and (compares or name != "i3d"):
            stand_in = "motion_distance" if name == "i3d" else "proxy_*"
            text = (f"without --network {name}=PATH, {network.given} (docs/temporal.md), there is "
                    f"no {' and no '.join(wanted)}; in their place: {stand_in}")
            tell({"event": "note", "text": text})


def _note_unmatched(folder: Folder, has_images: bool, tell: OnEvent) -> None:
    """Say which prompts have no clip, and how many clips no picture."""
    missing = folder.missing_prompts
    if missing:
        shown = ", ".join(map(repr, missing[:3])) + (" and others" if len(missing) > 3 else "")
        tell({"event": "note", "text": f"{folder.name} has no clip of {len(missing)} prompts: "
              f"{shown}; clips are named 'PROMPT-0.mp4'"})
    bare = len(folder.items) - len(folder.images)
    if has_images and bare:
        tell({"event": "note", "text": f"{bare} of {len(folder.items)} clips of {folder.name} have "
              "no picture named like them or their prompt; i2v measures leave them out"})


def _note_left_alone(folder: Folder, tell: OnEvent) -> None:
    """Say how many files of a folder are no clips that are measured."""
    kinds: Counter[str] = Counter()
    for path in Path(folder.path).rglob("*"):
        is_clip = path.suffix.lower() in CLIP_SUFFIXES
        if path.is_file() and not (is_clip and path.parent == Path(folder.path)):
            kinds["clips in subfolders" if is_clip else path.suffix or path.name] += 1
    if kinds:
        told = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(8))
        remedy = "; give --videos a subfolder to measure it" * ("clips in subfolders" in kinds)
        tell({"event": "note", "text": f"files of {folder.name} were left alone: {told}{remedy}"})


def _note_few_segments(compared: Mapping[str, Any], tell: OnEvent) -> None:
    """Say where FVD is of too few segments to be compared with what is published."""
    few, width = min(compared["fvd_segments"]), compared["fvd_width"]
    if compared["fvd"] is not None and few <= width:
        tell({"event": "note", "text": f"of {' and '.join(compared['folders'])} one has only {few} "
              f"segments of 16 frames, and a feature has {width} values; so few make FVD too low: "
              "compare it only with FVD of as many, or give more clips"})


def _note_flat(folder: Folder, tell: OnEvent) -> None:
    """Say how many clips show nothing that a subject could be told by."""
    flat = sum(row["flat"] for row in folder.scores.values())
    if flat:
        tell({"event": "note", "text": f"{flat} of {len(folder.scores)} clips of {folder.name} are "
              "of a single colour in each frame: without an edge proxy_subject_consistency isn't "
              "measurable, and leaves them out"})


def _note_mixture(folder: Folder, tell: OnEvent) -> None:
    """Say which rates or sizes a folder mixes, if it does."""
    for name, remedy in (("fps", "speeds and jerks"), ("size", "flows")):
        kinds = sorted({str(row[name]) for row in folder.scores.values()})
        if len(kinds) > 1:
            text = f"{folder.name} mixes {name} {', '.join(kinds)}; {remedy} are less comparable"
            tell({"event": "note", "text": text})
