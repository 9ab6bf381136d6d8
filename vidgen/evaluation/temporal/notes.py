"""What `vidgen eval temporal` tells of what is left out, missing or less comparable."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidgen.core.protocols import OnEvent
from vidgen.evaluation.metrics.network_files import NETWORKS
from vidgen.evaluation.suite import CLIP_SUFFIXES

if TYPE_CHECKING:
    from vidgen.evaluation.temporal.run import Folder


def note_skipped(
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


def note_unmatched(folder: Folder, has_images: bool, tell: OnEvent) -> None:
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


def note_left_alone(folder: Folder, tell: OnEvent) -> None:
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


def note_few_segments(compared: Mapping[str, Any], tell: OnEvent) -> None:
    """Say where FVD is of too few segments to be compared with what is published."""
    few, width = min(compared["fvd_segments"]), compared["fvd_width"]
    if compared["fvd"] is not None and few <= width:
        tell({"event": "note", "text": f"of {' and '.join(compared['folders'])} one has only {few} "
              f"segments of 16 frames, and a feature has {width} values; so few make FVD too low: "
              "compare it only with FVD of as many, or give more clips"})


def note_flat(folder: Folder, tell: OnEvent) -> None:
    """Say how many clips show nothing that a subject could be told by."""
    flat = sum(row["flat"] for row in folder.scores.values())
    if flat:
        tell({"event": "note", "text": f"{flat} of {len(folder.scores)} clips of {folder.name} are "
              "of a single colour in each frame: without an edge proxy_subject_consistency isn't "
              "measurable, and leaves them out"})


def note_mixture(folder: Folder, tell: OnEvent) -> None:
    """Say which rates or sizes a folder mixes, if it does."""
    for name, remedy in (("fps", "speeds and jerks"), ("size", "flows")):
        kinds = sorted({str(row[name]) for row in folder.scores.values()})
        if len(kinds) > 1:
            text = f"{folder.name} mixes {name} {', '.join(kinds)}; {remedy} are less comparable"
            tell({"event": "note", "text": text})
