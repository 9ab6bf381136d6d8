"""Choose stretches of files as items of buckets, or say why a file has none.

Everything here follows from the config, the model's geometry and what was found out about the
files; nothing is opened.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from vidgen.training.data.config import Bucket, DataConfig, Geometry
from vidgen.training.data.files import Captions, MediaFile
from vidgen.training.data.probe import FileFacts

ALIKE, WORST = 4.0, 14.0
"""Levels by which two files' cells may differ: root mean square, and the worst but for 1%. H.264 at
crf 35 has 2 and 5 at 320x240; another take of the same scene differs by more somewhere."""
LENGTHS, ASPECTS = 0.03, 0.03
"""Shares by which lengths and aspects of such files may differ."""
_BLOCK = 256


@dataclass(frozen=True)
class Item:
    """A stretch of a file, or a picture, as one sample of a bucket."""

    folder: int  # number of its folder in the config, -1 for validation
    name: str  # of its file, below that folder
    path: Path
    sha256: str  # of the file's content
    bucket: Bucket  # its shape
    start: int  # frame of the file that it begins with
    end: int  # frame of the file before which it ends
    captions: Captions  # prefix included
    group: str  # of files that look the same, which stay on one side of a held-out share

    @property
    def key(self) -> str:
        """Identifies its pixels among all others, at a rate."""
        facts = (self.sha256, self.bucket.label, self.start, self.end)
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


@dataclass
class Fate:
    """The items of a file, or the reason why it has none."""

    file: MediaFile
    facts: FileFacts
    items: list[Item] = field(default_factory=list)  # that it gives
    dropped: str | None = None  # why it gives none
    notes: list[str] = field(default_factory=list)  # on odd, cut, repeated or dropped parts


@dataclass
class Selection:
    """All items, and every file's fate, by folder and name."""

    geometry: Geometry
    fates: list[Fate]
    notes: list[str]

    @property
    def items(self) -> list[Item]:
        """All items, in the order of their files."""
        return [item for fate in self.fates for item in fate.items]


def select(
    config: DataConfig, geometry: Geometry, files: Sequence[MediaFile], facts: Sequence[FileFacts]
) -> list[Fate]:
    """Settle every file's fate by the facts about it."""
    groups = find_alike({each.sha256: each for each in facts if each.problem is None})
    first: dict[str, MediaFile] = {}
    fates = []
    for file, known in zip(files, facts, strict=True):
        fate = Fate(file, known, notes=[*file.notes, *known.notes])
        group = groups.get(known.sha256, known.sha256)
        fate.dropped = _unfit(fate, config) or _double(fate, group, first, config)
        if fate.dropped is None:
            _cut(fate, group, config, geometry)
        fates.append(fate)
    return fates


def _unfit(fate: Fate, config: DataConfig) -> str | None:
    facts = fate.facts
    if facts.problem is not None:
        return facts.problem
    if facts.pixel_aspect != 1:
        return f"its pixels are not square ({facts.pixel_aspect}); encode it with square ones"
    if facts.is_hdr:
        return (f"it is HDR ({facts.colour['transfer']}), which would look pale; convert it to "
                "BT.709")
    if not fate.file.captions and config.no_caption == "drop":
        return "it has no caption; write one beside it (.txt), or set no_caption: empty"
    return None


def _double(
    fate: Fate, group: str, first: dict[str, MediaFile], config: DataConfig
) -> str | None:
    same = first.setdefault(fate.facts.sha256, fate.file)
    like = first.setdefault(f"like {group}", fate.file)
    if same is not fate.file:
        told, is_dropped = f"it has the same bytes as {same.name}", config.duplicates != "keep"
    elif like is not fate.file:
        told, is_dropped = f"it looks like {like.name}", config.duplicates == "drop"
    else:
        return None
    if is_dropped:
        return told
    fate.notes.append(told)
    return None


def _cut(fate: Fate, group: str, config: DataConfig, geometry: Geometry) -> None:
    file, facts = fate.file, fate.facts
    size, shown = geometry.size_for(*facts.size), facts.size
    ratio = shown[0] * size[1] / (shown[1] * size[0])
    lost, scale = 1 - min(ratio, 1 / ratio), max(size[0] / shown[0], size[1] / shown[1])
    place = f"{shown[0]}x{shown[1]} for a bucket of {size[0]}x{size[1]}"
    if lost > config.max_crop:
        fate.dropped = (f"{lost:.0%} of the picture would be cut off, {place}; max_crop is "
                        f"{config.max_crop}")
        return
    if scale > config.max_enlarge:
        fate.dropped = (f"it would be enlarged {scale:.2f} times, {place}; max_enlarge is "
                        f"{config.max_enlarge}")
        return
    if lost > 0.02:
        fate.notes.append(f"{lost:.0%} of the picture is cut off for {size[0]}x{size[1]}")
    if facts.kind == "picture":
        flaws = [flaw.kind for flaw in facts.flaws if flaw.kind in config.avoid]
        fate.dropped = f"the picture is {flaws[0]}" if flaws else None
        stretches = [] if flaws else [(0, 1, 1)]
    else:
        possible, fate.dropped = _windows(facts, config, geometry)
        stretches = _spread(possible, config.windows)
        if len(stretches) < len(possible):
            fate.notes.append(f"{len(stretches)} of {len(possible)} possible items are taken "
                              f"(windows: {config.windows})")
    captions = tuple(f"{config.prefix} {text}".strip() for text in file.captions or ("",))
    fate.items += [Item(file.folder, file.name, file.path, facts.sha256, Bucket(*size, length),
                        start, end, captions, group) for start, end, length in stretches]
    if facts.kind == "video":
        _note_times(fate, geometry)


def _windows(
    facts: FileFacts, config: DataConfig, geometry: Geometry
) -> tuple[list[tuple[int, int, int]], str | None]:
    """Return (first frame, frame after, length in the bucket) of each item; or why it has none."""
    lengths = [length for length in geometry.frames if length > 1]
    if not lengths:
        return [], "it is a clip, and no bucket is longer than 1 frame"
    scale = float(facts.tick_s * geometry.fps)  # times in frames of the items, rounded to ticks
    begins, slack = facts.times.astype(np.float64) * scale, min(scale, 0.1) + 1e-6
    found, longest = list[tuple[int, int, int]](), 0
    for start, stop in _stretches(facts, config):
        room = float(begins[stop] - begins[start])
        longest = max(longest, int(room + slack))
        length = max((each for each in lengths if each <= int(room + slack)), default=0)
        count = int((room + slack) / length) if length else 0
        for number in range(count):  # side by side, as a whole in the stretch's middle
            margin = max(0.0, room - count * length) / 2
            moment = begins[start] + margin + number * length
            shown = np.searchsorted(begins[start:stop], moment + slack, side="right")
            found.append((start + max(0, int(shown) - 1), stop, length))
    if found:
        return found, None
    around = f" without {', '.join(config.avoid)}" if facts.cuts or facts.flaws else ""
    most = longest - (longest - 1) % geometry.stride_t
    remedy = f"; with frames: {most} it would fit" if most > 1 else ""
    return [], (f"its longest stretch{around} gives {longest} frames at "
                f"{float(geometry.fps):g} a second; the shortest bucket has {lengths[0]}{remedy}")


def _spread(
    windows: list[tuple[int, int, int]], most: int | Literal["all"]
) -> list[tuple[int, int, int]]:
    if most == "all" or len(windows) <= most:
        return windows
    places = (np.arange(most) + 0.5) * len(windows) / most
    return [windows[int(place)] for place in places]


def _stretches(facts: FileFacts, config: DataConfig) -> Iterator[tuple[int, int]]:
    """Yield (first frame, frame after) of stretches without anything that is to be avoided."""
    holes = [(flaw.first, flaw.last + 1) for flaw in facts.flaws
             if flaw.kind == "damaged" or flaw.kind in config.avoid]
    if "cut" in config.avoid:  # between the two frames, wherever it is
        holes += [(last + 1, first) for last, first in facts.cuts]
    begin = 0
    for start, stop in sorted(holes):
        if start > begin:
            yield begin, start
        begin = max(begin, stop)
    if facts.num_frames > begin:
        yield begin, facts.num_frames


def picks(item: Item, facts: FileFacts, geometry: Geometry) -> list[int]:
    """Return the frames of the file that an item shows; rising, with repeats where it lacks some.

    Frame n is the one whose showing begins nearest to n / fps after the item's first, the earlier
    of two.
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


def _note_times(fate: Fate, geometry: Geometry) -> None:
    facts, repeats, left, total = fate.facts, 0, 0, 0
    for item in fate.items:
        shown = picks(item, facts, geometry)
        repeats += len(shown) - len(set(shown))
        left += shown[-1] - shown[0] + 1 - len(set(shown))
        total += len(shown)
    told = f"{float(facts.fps):.4g} frames a second are shown at {float(geometry.fps):.4g}"
    if repeats:
        fate.notes.append(f"{told}: {repeats} of {total} frames are repeats")
    if left:
        fate.notes.append(f"{told}: {left} frames between are left out")
    if facts.cuts:
        moments = [int(facts.times[first]) * facts.tick_s for _, first in facts.cuts[:5]]
        more = f" and {len(facts.cuts) - 5} more" if len(facts.cuts) > 5 else ""
        told = ", ".join(f"{float(moment):.2f}" for moment in moments)
        fate.notes.append(f"it has cuts at {told} s{more}")
    kinds = Counter(flaw.kind for flaw in facts.flaws)
    if kinds:
        told = ", ".join(f"{kind} ({count})" for kind, count in sorted(kinds.items()))
        fate.notes.append(f"it has stretches that are {told}")


def find_alike(facts: Mapping[str, FileFacts]) -> dict[str, str]:
    """Return {SHA-256: the first, in the order of the hashes, of those that look the same}.

    They are encoded again, at another size, rate or quality, or copied. Compared are 8 moments of
    each file as pictures of 12x12 cells: a part of a longer file, or a mirrored or much recoloured
    copy, isn't found. Files are compared with those of about the same length alone, so that it
    takes a second for ten thousand files of all lengths.
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
        off = squares[start:end, None] + squares[start:stop]
        off -= 2 * shown[start:end] @ shown[start:stop].T
        rounding = 64  # what float32 leaves of sums of squares
        for a, b in np.argwhere(off <= shown.shape[1] * ALIKE**2 + rounding) + start:
            if (a < b and lengths[b] <= limits[a] and abs(aspects[a] / aspects[b] - 1) <= ASPECTS
                    and np.quantile(np.abs(shown[a] - shown[b]), 0.99) <= WORST):
                groups[groups == groups[b]] = groups[a]
    alike: dict[int, list[str]] = {}
    for sha256, group in zip(order, groups.tolist(), strict=True):
        alike.setdefault(group, []).append(sha256)
    return {sha: min(group) for group in alike.values() if len(group) > 1 for sha in group}
