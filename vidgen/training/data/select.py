"""Choose stretches of files as items of buckets, or give the reason why a file has none.

Items follow from the config, the model's geometry and the facts about files; no file is opened.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vidgen.training.data.config import Bucket, DataConfig, Geometry
from vidgen.training.data.files import Item, MediaFile
from vidgen.training.data.probe import FileFacts

ALIKE, WORST = 4.0, 14.0
"""Levels of 0 to 255 by which cells of similar files may differ: root mean square, and the quantile
at 99%. H.264 at crf 35 has 2 and 5 at 320x240; another take of the same scene has more."""
LENGTHS, ASPECTS = 0.03, 0.03
"""Shares by which lengths and aspect ratios of similar files may differ."""
_BLOCK = 256


@dataclass
class Selection:
    """Hold all files with their items or the reasons for none, and notes on folders."""

    geometry: Geometry
    files: list[MediaFile]  # by folder and name
    notes: list[str]

    @property
    def items(self) -> list[Item]:
        """All items, in the order of their files."""
        return [item for file in self.files for item in file.items]


def select(config: DataConfig, geometry: Geometry, files: Sequence[MediaFile]) -> None:
    """Set the items of each file, or the reason why it has none, from the facts about it."""
    groups = find_similar({file.facts.sha256: file.facts for file in files
                           if file.facts.problem is None})
    first: dict[str, MediaFile] = {}
    for file in files:
        file.notes += file.facts.notes
        group = groups.get(file.facts.sha256, file.facts.sha256)
        file.dropped = _unfit(file, config) or _double(file, group, first, config)
        if file.dropped is None:
            _cut(file, group, config, geometry)


def _unfit(file: MediaFile, config: DataConfig) -> str | None:
    facts = file.facts
    if facts.problem is not None:
        return facts.problem
    if facts.pixel_aspect != 1:
        return f"its pixels are not square ({facts.pixel_aspect}); convert it to square pixels"
    if facts.is_hdr:
        return (f"it is HDR ({facts.colour['transfer']}), which would look pale; convert it to "
                "BT.709")
    if not file.captions and config.no_caption == "drop":
        return "it has no caption; write one to a .txt file of its name, or set no_caption: empty"
    return None


def _double(
    file: MediaFile, group: str, first: dict[str, MediaFile], config: DataConfig
) -> str | None:
    same = first.setdefault(file.facts.sha256, file)
    like = first.setdefault(f"like {group}", file)
    if same is not file:
        reason, is_dropped = f"it has the same bytes as {same.name}", config.duplicates != "keep"
    elif like is not file:
        reason, is_dropped = f"it looks like {like.name}", config.duplicates == "drop"
    else:
        return None
    if is_dropped:
        return reason
    file.notes.append(reason)
    return None


def _cut(file: MediaFile, group: str, config: DataConfig, geometry: Geometry) -> None:
    facts, shown = file.facts, file.facts.size
    size = geometry.size_for(*shown)
    ratio = shown[0] * size[1] / (shown[1] * size[0])
    lost, scale = 1 - min(ratio, 1 / ratio), max(size[0] / shown[0], size[1] / shown[1])
    place = f"{shown[0]}x{shown[1]} for a bucket of {size[0]}x{size[1]}"
    if lost > config.max_crop:
        file.dropped = (f"{lost:.0%} of each frame would be cropped, {place}; max_crop is "
                        f"{config.max_crop}")
        return
    if scale > config.max_enlarge:
        file.dropped = (f"it would be enlarged {scale:.2f} times, {place}; max_enlarge is "
                        f"{config.max_enlarge}")
        return
    if lost > 0.02:
        file.notes.append(f"{lost:.0%} of each frame is cropped for {size[0]}x{size[1]}")
    if facts.kind == "picture":
        flaws = [flaw.kind for flaw in facts.flaws if flaw.kind in config.avoid]
        file.dropped = f"the picture is {flaws[0]}" if flaws else None
        stretches = [] if flaws else [(0, 1, 1)]
    else:
        possible, file.dropped = _windows(facts, config, geometry)
        stretches = _spread(possible, config.windows)
        if len(stretches) < len(possible):
            file.notes.append(f"{len(stretches)} of {len(possible)} possible items are used "
                              f"(windows: {config.windows})")
    captions = tuple(f"{config.prefix} {text}".strip() for text in file.captions or ("",))
    file.items += [Item(file.folder, file.name, file.path, facts.sha256, Bucket(*size, length),
                        start, end, captions, group) for start, end, length in stretches]
    if facts.kind == "video":
        _note_times(file, geometry)


def _windows(
    facts: FileFacts, config: DataConfig, geometry: Geometry
) -> tuple[list[tuple[int, int, int]], str | None]:
    """Return (first frame, end, length in the bucket) of each item, and the reason for none."""
    lengths = [length for length in geometry.frames if length > 1]
    if not lengths:
        return [], "it is a clip, but all buckets are for pictures (1 frame)"
    scale = float(facts.tick_s * geometry.fps)  # frames of an item per tick
    begins, slack = facts.times.astype(np.float64) * scale, min(scale, 0.1) + 1e-6
    found, longest = list[tuple[int, int, int]](), 0
    for start, stop in _stretches(facts, config):
        room = float(begins[stop] - begins[start])
        longest = max(longest, int(room + slack))
        length = max((each for each in lengths if each <= int(room + slack)), default=0)
        count = int((room + slack) / length) if length else 0
        for number in range(count):  # one after another, centred in the stretch
            margin = max(0.0, room - count * length) / 2
            moment = begins[start] + margin + number * length
            shown = np.searchsorted(begins[start:stop], moment + slack, side="right")
            found.append((start + max(0, int(shown) - 1), stop, length))
    if found:
        return found, None
    around = f" without {', '.join(config.avoid)}" if facts.cuts or facts.flaws else ""
    most = longest - (longest - 1) % geometry.stride_t
    remedy = f"; set frames to {most} to use it" if most > 1 else ""
    return [], (f"its longest stretch{around} has {longest} frames at {float(geometry.fps):g} fps, "
                f"but the shortest bucket has {lengths[0]}{remedy}")


def _spread(
    windows: list[tuple[int, int, int]], most: int | Literal["all"]
) -> list[tuple[int, int, int]]:
    if most == "all" or len(windows) <= most:
        return windows
    places = (np.arange(most) + 0.5) * len(windows) / most
    return [windows[int(place)] for place in places]


def _stretches(facts: FileFacts, config: DataConfig) -> Iterator[tuple[int, int]]:
    """Yield (first frame, end) of the stretches without damage and flaws of `config.avoid`."""
    flaws = [(flaw.first, flaw.last + 1) for flaw in facts.flaws
             if flaw.kind == "damaged" or flaw.kind in config.avoid]
    if "cut" in config.avoid:  # anywhere between the two frames
        flaws += [(last + 1, first) for last, first in facts.cuts]
    begin = 0
    for start, stop in sorted(flaws):
        if start > begin:
            yield begin, start
        begin = max(begin, stop)
    if facts.num_frames > begin:
        yield begin, facts.num_frames


def picks(item: Item, facts: FileFacts, geometry: Geometry) -> list[int]:
    """Return the frame numbers of the file for an item's frames, rising, with repeats if needed.

    Frame n of the item is the file's frame that starts nearest to n / fps after the item's first
    one; of two equally near, the earlier.
    """
    times = facts.times[item.start : item.end]
    step, shown = 1 / (geometry.fps * facts.tick_s), []
    for number in range(item.bucket.num_frames):
        moment = int(times[0]) + number * step
        after = min(int(np.searchsorted(times, float(moment))), len(times) - 1)
        before = max(after - 1, 0)
        near = moment - int(times[before]) <= int(times[after]) - moment
        shown.append(item.start + (before if near else after))
    return shown


def _note_times(file: MediaFile, geometry: Geometry) -> None:
    facts, repeats, left, total = file.facts, 0, 0, 0
    for item in file.items:
        shown = picks(item, facts, geometry)
        repeats += len(shown) - len(set(shown))
        left += shown[-1] - shown[0] + 1 - len(set(shown))
        total += len(shown)
    rates = f"{float(facts.fps):.4g} to {float(geometry.fps):.4g} fps"
    if repeats:
        file.notes.append(f"{rates}: {repeats} of {total} frames are repeats")
    if left:
        is_half = facts.fps == 2 * geometry.fps and not facts.is_variable
        dropped = "every second frame" if is_half else f"{left} of {left + total - repeats} frames"
        file.notes.append(f"{rates}: {dropped} dropped")
    if facts.cuts:
        moments = [int(facts.times[first]) * facts.tick_s for _, first in facts.cuts[:5]]
        more = f" and {len(facts.cuts) - 5} more" if len(facts.cuts) > 5 else ""
        times = ", ".join(f"{float(moment):.2f}" for moment in moments)
        file.notes.append(f"it has cuts at {times} s{more}")
    kinds = Counter(flaw.kind for flaw in facts.flaws)
    if kinds:
        counts = ", ".join(f"{kind} ({count})" for kind, count in sorted(kinds.items()))
        file.notes.append(f"it has stretches that are {counts}")


def find_similar(facts: Mapping[str, FileFacts]) -> dict[str, str]:
    """Return {SHA-256: lowest SHA-256 of its group} for files that look the same.

    Such files are copies, or differ in size, frame rate or quality. Signatures of 8 moments with
    12x12 cells are compared, which don't find parts of longer files, mirrored or recoloured ones.
    Only files of similar length are compared: ten thousand of varied length take one second.
    """
    order = sorted(facts, key=lambda sha: (facts[sha].duration_s, sha))
    lengths, aspects, shown = (np.array(values, dtype=np.float32) for values in (
        [facts[sha].duration_s for sha in order],
        [facts[sha].size[0] / facts[sha].size[1] for sha in order],
        [facts[sha].small_pictures().reshape(-1) for sha in order]))
    limits = lengths * (1 + LENGTHS) + 1e-6
    squares, groups = (shown * shown).sum(-1), np.arange(len(order))
    for start in range(0, len(order), _BLOCK):
        end = start + _BLOCK
        stop = int(np.searchsorted(lengths, limits[start:end][-1], side="right"))
        distances = squares[start:end, None] + squares[start:stop]
        distances -= 2 * shown[start:end] @ shown[start:stop].T
        rounding = 64  # error of float32 in sums of squares
        for a, b in np.argwhere(distances <= shown.shape[1] * ALIKE**2 + rounding) + start:
            if (a < b and lengths[b] <= limits[a] and abs(aspects[a] / aspects[b] - 1) <= ASPECTS
                    and np.quantile(np.abs(shown[a] - shown[b]), 0.99) <= WORST):
                groups[groups == groups[b]] = groups[a]
    alike: dict[int, list[str]] = {}
    for sha256, group in zip(order, groups.tolist(), strict=True):
        alike.setdefault(group, []).append(sha256)
    return {sha: min(group) for group in alike.values() if len(group) > 1 for sha in group}
