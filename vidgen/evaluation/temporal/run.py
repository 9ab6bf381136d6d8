"""`vidgen eval temporal`: temporal measures of clips, and comparisons of folders.

Each clip's scores are a line of `<output>.jsonl`, addressed by the file's content and the
conditions of the measurement, so an interrupted run resumes there. A clip is measured alone, on one
thread, so the same files give the same numbers on any number of workers.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vidgen.core.errors import InputError, nearest
from vidgen.core.protocols import OnEvent
from vidgen.core.runtime import fingerprint, sha256_file
from vidgen.core.store import ScoreLog, address_of
from vidgen.evaluation.metrics.clip import MEASURES_VERSION, measure_clip
from vidgen.evaluation.metrics.flow import opencv
from vidgen.evaluation.metrics.vbench import MEASURES, PROXY
from vidgen.evaluation.suite import (
    CLIP_SUFFIXES,
    EvaluatedClip,
    PromptSuite,
    find_images,
    find_items,
)
from vidgen.evaluation.temporal.comparison import by_name, compare, figures
from vidgen.media.read import load_image
from vidgen.media.video_reader import VideoReader
from vidgen.pipeline.workers.scheduler import run_jobs
from vidgen.pipeline.workers.types import Job, Patience, WorkerOptions

if TYPE_CHECKING:
    from vidgen.evaluation.metrics.networks import Networks

WHOLE = 0.9
"""Least share of the frames that a file states, below which it is cut off."""
SCRIPT_SUFFIXES = (".pt", ".pth", ".jit", ".ts", ".torchscript")


class Network(NamedTuple):
    """Measures that use a network, and the description of its files."""

    measures: tuple[str, ...]
    given: str = "a TorchScript file"


# the folders are those of transformers; `metrics.networks` describes the files
NETWORKS: dict[str, Network] = {
    "dino": Network(("subject_consistency", "i2v_subject"), "the folder of facebook/dino-vitb16"),
    "clip": Network(("background_consistency",), "the folder of openai/clip-vit-base-patch32"),
    "dreamsim": Network(("i2v_background",)),
    "raft": Network(("temporal_flickering", "dynamic_degree")),
    "amt": Network(("motion_smoothness",)),
    "i3d": Network(("fvd", "kvd")),
}
FOLDERS = ("dino", "clip")


@dataclass(frozen=True)
class TemporalRun:
    """Settings of a measurement of folders.

    Raises:
        InputError: no folder, a repeated folder, or a number of workers out of range.
    """

    videos: Sequence[str]  # folders of clips; each two are compared
    networks: Sequence[str] = ()  # NAME=PATH of VBench's networks; see `metrics.networks`
    images: str | None = None  # folder of the clips' first pictures
    # file of the prompts; None: the prompts of the clips found
    prompt_suite: str | None = None
    workers: int | None = None  # processes that measure in parallel; None: this one
    ray: str | None = None  # address of a Ray cluster that measures, as in `WorkerOptions`

    def __post_init__(self) -> None:
        if not self.videos:
            raise InputError("no folder of clips; give --videos FOLDER")
        _ = self.worker_options
        names = [str(Path(folder).resolve()) for folder in self.videos]
        if len(set(names)) < len(names):
            raise InputError("a folder is given twice to --videos; name each once")

    @property
    def worker_options(self) -> WorkerOptions:
        """Workers of one thread each, so that their number doesn't change results."""
        patience = Patience(stall=math.inf)  # measures report no progress
        return WorkerOptions(self.workers, self.ray, threads=1, patience=patience)


@dataclass
class Folder:
    """State of a folder during measurement: its clips, failures, and scores by name."""

    name: str
    path: str
    items: list[EvaluatedClip]
    missing_prompts: list[str] = field(default_factory=list)
    suite: PromptSuite | None = None
    images: dict[str, Path] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Measuring:
    path: str
    image: str | None
    networks: tuple[tuple[str, str], ...]


def run_temporal(run: TemporalRun, output: str | Path, on_event: OnEvent) -> dict[str, Any]:
    """Measure folders of clips and compare them; keep single clips' scores next to `output`.

    Returns:
        `folders`, each with `clips`, `failed`, `figures` and what shaped them; `comparisons`;
        `machine`.

    Raises:
        InputError: clips, networks or pictures are missing.
    """
    def note(texts: Iterable[str]) -> None:
        for text in texts:
            on_event({"event": "note", "text": text})

    suite = None if run.prompt_suite is None else PromptSuite.read(run.prompt_suite)
    paths = parse_networks(list(run.networks))
    hashes = {name: network_hash(path) for name, path in paths.items()}
    versions = {"opencv": opencv().__version__, "numpy": np.__version__, **fingerprint()}
    folders = [_open(path, suite, run.images) for path in run.videos]
    _disambiguate(folders, has_extractor="i3d" in paths)
    note(_skipped(paths, bool(run.images), len(folders) > 1))
    for folder in folders:
        note(_left_out(folder, bool(run.images)))
    log = ScoreLog(Path(output).with_name(Path(output).name + ".jsonl"))
    identity = [MEASURES_VERSION, hashes, {k: versions[k] for k in ("opencv", "av", "numpy")}]
    if paths:
        identity.append(versions["torch"])
    given = tuple((name, str(path)) for name, path in paths.items())
    _measure(folders, given, identity, log, run.worker_options, on_event)
    for folder in folders:
        note(_doubts(folder))
    results = [_result(folder) for folder in folders]
    comparisons = [
        compare(a["name"], by_name(a), b["name"], by_name(b)) for a, b in combinations(results, 2)]
    for compared in comparisons:
        note(_few_segments(compared))
    return {
        "suite": "temporal",
        "prompt_suite": None if suite is None else {"name": suite.name, "sha256": suite.sha256},
        "measures_version": MEASURES_VERSION, "networks": hashes, "folders": results,
        "comparisons": comparisons, "machine": versions,
    }


def parse_networks(given: list[str]) -> dict[str, Path]:
    """Return {name: path} of texts NAME=PATH; a folder may stand for the TorchScript in it.

    Raises:
        InputError: the network is unknown or given twice, or its files are missing.
    """
    found = {}
    for text in given:
        name, mark, place = text.partition("=")
        path = Path(place)
        if not mark or name not in NETWORKS:
            raise InputError(f"network {text!r} isn't NAME=PATH; {nearest(name, NETWORKS)}")
        if name in found:
            raise InputError(f"network {name} is given twice; give one path")
        if name in FOLDERS and not (path / "config.json").is_file():
            raise InputError(
                f"{name} must be a folder of transformers; {path}/config.json is missing")
        found[name] = path if name in FOLDERS else _script(name, path)
    return found


def _script(name: str, path: Path) -> Path:
    if path.is_file():
        return path
    scripts = sorted(p for p in path.glob("*") if p.suffix in SCRIPT_SUFFIXES and p.is_file())
    if len(scripts) != 1:
        raise InputError(
            f"{name} must be a TorchScript file, or a folder that holds one; {path} "
            + (f"holds {len(scripts)}: name one" if scripts else "is none and holds none"))
    return scripts[0]


def network_hash(path: Path) -> str:
    """Return the SHA-256 of a file, or of all files of a folder with their names."""
    if path.is_file():
        return sha256_file(path)
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(f"{file.relative_to(path)}\0{sha256_file(file)}\n".encode())
    return digest.hexdigest()


def _open(path: str, suite: PromptSuite | None, images: str | None) -> Folder:
    folder = Folder(Path(path).resolve().name, path, find_items(path))
    if suite is not None:
        inside, outside, folder.missing_prompts = suite.split(folder.items)
        folder.items, folder.suite = inside, suite
        folder.failed = {i.path.name: f"its prompt isn't in {suite.name}" for i in outside}
    if images is not None:
        folder.images = find_images(images, folder.items, suite)
    return folder


def _disambiguate(folders: Sequence[Folder], *, has_extractor: bool) -> None:
    """Name folders of equal names by their paths; refuse two without a pair of clips.

    With an extractor of features the sets have a distance without pairs.
    """
    names = [folder.name for folder in folders]
    for folder in folders:
        if names.count(folder.name) > 1:
            folder.name = folder.path
    for one, other in combinations(folders, 2):
        clips, others = ({item.name for item in folder.items} for folder in (one, other))
        if not has_extractor and clips.isdisjoint(others):
            raise InputError(
                f"{one.name} and {other.name} have no clip of the same name in common, so they "
                "can't be compared clip by clip; name each pair of clips alike, or give an "
                "extractor of features, --network i3d=PATH, for the distance of the two sets")


def _measure(
    folders: Sequence[Folder], networks: tuple[tuple[str, str], ...], identity: list[Any],
    log: ScoreLog, workers: WorkerOptions, on_event: OnEvent,
) -> None:  # fmt: skip
    wanted: dict[str, tuple[_Measuring, list[tuple[Folder, EvaluatedClip]]]] = {}
    for folder in folders:
        for item in folder.items:
            image = folder.images.get(item.name)
            job = _Measuring(str(item.path), None if image is None else str(image), networks)
            hashes = [None if file is None else sha256_file(file) for file in (job.path, job.image)]
            key = address_of([identity, *hashes])
            if key in log.scores:
                folder.scores[item.name] = log.scores[key]
            else:
                wanted.setdefault(key, (job, []))[1].append((folder, item))
    total = sum(len(folder.items) for folder in folders)
    done = total - sum(len(users) for _, users in wanted.values())
    on_event({"event": "progress", "stage": "measure", "done": done, "total": total})
    jobs = (Job(key, job, name=job.path) for key, (job, _) in wanted.items())
    for outcome in run_jobs(jobs, measure, workers, on_event):
        key, scores = outcome.job.key, str(outcome.error) if outcome.error else outcome.result
        for folder, item in wanted[key][1]:
            if isinstance(scores, str):
                folder.failed[item.path.name] = scores
            else:
                folder.scores[item.name] = scores
            done += 1
        if not isinstance(scores, str):
            log.add([(key, scores)])
        on_event({"event": "progress", "stage": "measure", "done": done, "total": total})


_networks: dict[tuple[tuple[str, str], ...], Networks] = {}


def measure(job: _Measuring, _on_event: OnEvent) -> dict[str, Any]:
    """Return the scores of one clip.

    Raises:
        InputError: the clip is damaged, cut off, or too short.
    """
    image = None if job.image is None else load_image(job.image)[0]
    with VideoReader(job.path) as video:
        damages = [frame.is_damaged for frame in video.timed()]
        if any(damages):
            raise InputError(f"{sum(damages)} of its {len(damages)} frames are damaged; "
                             "save it again")
        if job.networks and job.networks not in _networks:
            from vidgen.evaluation.metrics.networks import Networks

            _networks[job.networks] = Networks({n: Path(p) for n, p in job.networks})
        found = measure_clip(
            video, video.fps, image=image, networks=_networks.get(job.networks))
        if found.num_frames < 2:
            raise InputError("it has a single frame, but temporal measures need two; give a longer "
                             "clip")
        if found.num_frames < WHOLE * (video.stated_frames or 0):
            raise InputError(f"it ends after {found.num_frames} of {video.stated_frames} frames; "
                             "save it again")
        return {**asdict(found), "fps": str(video.fps), "size": list(video.size)}


def _result(folder: Folder) -> dict[str, Any]:
    clips = []
    for item in folder.items:
        if item.name in folder.scores:
            row = folder.scores[item.name]
            relevant = {name: value if _counts(folder.suite, item.prompt, name) else None
                        for name, value in row["figures"].items()}
            clips.append({"name": item.name, "path": str(item.path), "prompt": item.prompt,
                          "origin": item.origin, **row, "figures": relevant})
    return {
        "name": folder.name, "path": folder.path, "clips": clips,
        "failed": dict(sorted(folder.failed.items())), "missing_prompts": folder.missing_prompts,
        "fps": sorted({clip["fps"] for clip in clips}),
        "sizes": sorted({tuple(clip["size"]) for clip in clips}),
        "models": _distinct(clip["origin"] for clip in clips),
        "dynamic": sum(clip["dynamic"] for clip in clips),
        **figures(clips),
    }


def _counts(suite: PromptSuite | None, prompt: str, measure: str) -> bool:
    """Return whether a prompt was written for the dimension of VBench that is measured."""
    return suite is None or not MEASURES[measure].scale or (
        suite.counts(prompt, measure.removeprefix(PROXY)))


def _distinct(origins: Any) -> list[dict[str, Any]]:
    """Return the models in the clips' recipes, each once, with all its seeds."""
    found: dict[str, dict[str, Any]] = {}
    for origin in origins:
        if origin is not None:
            model = {k: v for k, v in origin.items() if k != "seed"}
            entry = found.setdefault(json.dumps(model, sort_keys=True), {**model, "seeds": []})
            entry["seeds"].append(origin["seed"])
    return list(found.values())


def _skipped(paths: Mapping[str, Path], has_images: bool, compares: bool) -> Iterator[str]:
    for name, network in NETWORKS.items():
        wanted = [kind for kind in network.measures if has_images or not kind.startswith("i2v")]
        if name not in paths and wanted and (compares or name != "i3d"):
            stand_in = "" if name == "i3d" else "; proxy_* replace them"
            yield (f"without --network {name}=PATH, {network.given} (docs/reference/metrics.md), "
                   f"{' and '.join(wanted)} can't be measured{stand_in}")


def _left_out(folder: Folder, has_images: bool) -> Iterator[str]:
    missing = folder.missing_prompts
    if missing:
        shown = ", ".join(map(repr, missing[:3])) + (" and others" if len(missing) > 3 else "")
        yield (f"{folder.name} has no clip of {len(missing)} prompts: {shown}; clips are named "
               "'PROMPT-0.mp4'")
    bare = len(folder.items) - len(folder.images)
    if has_images and bare:
        yield (f"{bare} of {len(folder.items)} clips of {folder.name} have no picture named like "
               "them or their prompt; i2v measures leave them out")
    kinds: Counter[str] = Counter()
    for path in Path(folder.path).rglob("*"):
        is_clip = path.suffix.lower() in CLIP_SUFFIXES
        if path.is_file() and not (is_clip and path.parent == Path(folder.path)):
            kinds["clips in subfolders" if is_clip else path.suffix or path.name] += 1
    if kinds:
        found = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(8))
        remedy = "; give --videos a subfolder to measure it" * ("clips in subfolders" in kinds)
        yield f"files of {folder.name} were ignored: {found}{remedy}"


def _doubts(folder: Folder) -> Iterator[str]:
    for name, remedy in (("fps", "speeds and jerks"), ("size", "flows")):
        kinds = sorted({str(row[name]) for row in folder.scores.values()})
        if len(kinds) > 1:
            yield f"{folder.name} mixes {name} {', '.join(kinds)}; {remedy} are less comparable"
    flat = sum(row["flat"] for row in folder.scores.values())
    if flat:
        yield (f"{flat} of {len(folder.scores)} clips of {folder.name} have a single colour per "
               "frame and no edges; proxy_subject_consistency leaves them out")


def _few_segments(compared: Mapping[str, Any]) -> Iterator[str]:
    few, width = min(compared["fvd_segments"]), compared["fvd_width"]
    if compared["fvd"] is not None and few <= width:
        yield (f"{' or '.join(compared['folders'])} has only {few} segments of 16 frames for "
               f"features of {width} values, which makes FVD too low: compare it only with FVD of "
               "as many segments, or give more clips")
