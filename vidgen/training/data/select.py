"""Which stretch of which file becomes an item of which bucket, and why others don't.

Everything here follows from the config, the model's geometry and what was found out about the
files; nothing is opened.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from vidgen.training.data.config import Bucket, DataConfig, Geometry
from vidgen.training.data.files import MediaFile, Scan
from vidgen.training.data.probe import FileFacts

ALIKE, WORST = 4.0, 14.0
"""Levels by which two files' cells may differ: root mean square, and the worst but for 1%. H.264 at
crf 35 has 2 and 5 at 320x240; another take of the same scene differs by more somewhere."""
LENGTHS, ASPECTS = 0.03, 0.03
"""Shares by which lengths and aspects of such files may differ."""
_BLOCK, _AGAINST = 256, 4096

Cells = np.ndarray[tuple[int, int], np.dtype[np.uint8]]
Flags = np.ndarray[tuple[int, int], np.dtype[np.bool_]]


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
    centring: tuple[float, float]  # which part of the picture is kept, see `media.read.fit`
    captions: tuple[str, ...]  # prefix included; one is drawn each time
    group: str  # of files that look the same, which stay on one side of a held-out share

    @property
    def key(self) -> str:
        """What tells its pixels from all others', given rate and rule."""
        facts = (self.sha256, self.bucket.label, self.start, self.end, self.centring)
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


@dataclass
class Fate:
    """What becomes of a file."""

    file: MediaFile  # the file
    facts: FileFacts | None  # what is known of it; None: it can't be read
    items: list[Item] = field(default_factory=list)  # that it gives
    dropped: str | None = None  # why it gives none
    notes: list[str] = field(default_factory=list)  # what is odd, cut off, repeated or left out


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
    config: DataConfig, geometry: Geometry, found: Scan, hashes: Sequence[str],
    facts: Mapping[str, FileFacts],
) -> Selection:
    """Settle every file's fate by its SHA-256, "" where it can't be read, and facts by SHA-256."""
    fates = [Fate(file, facts.get(sha)) for file, sha in zip(found.files, hashes, strict=True)]
    usable = {sha: told for sha, told in facts.items() if told.problem is None}
    groups = find_alike(usable)
    first: dict[str, MediaFile] = {}
    for fate, sha256 in zip(fates, hashes, strict=True):
        fate.notes += [*fate.file.notes, *(fate.facts.notes if fate.facts else ())]
        group = groups.get(sha256, sha256)
        fate.dropped = _unfit(fate, config) or _double(fate, sha256, group, first, config)
        if fate.dropped is None:
            _cut(fate, sha256, group, config, geometry)
    return Selection(geometry, fates, list(found.notes))


def _unfit(fate: Fate, config: DataConfig) -> str | None:
    facts = fate.facts
    if facts is None:
        return "it can't be read"
    if facts.problem is not None:
        return facts.problem
    if facts.pixel_aspect != 1:
        return f"its pixels are not square ({facts.pixel_aspect}); encode it with square ones"
    if facts.is_hdr:
        if config.hdr == "drop":
            return (f"it is HDR ({facts.colour['transfer']}), which would look pale; convert it to "
                    "BT.709, or set hdr: keep")
        fate.notes.append("HDR taken as it is, without tone mapping")
    if not fate.file.captions and config.no_caption == "drop":
        return "it has no caption; write one beside it (.txt), or set no_caption: empty"
    return None


def _double(
    fate: Fate, sha256: str, group: str, first: dict[str, MediaFile], config: DataConfig
) -> str | None:
    same = first.setdefault(sha256, fate.file)
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


def _cut(fate: Fate, sha256: str, group: str, config: DataConfig, geometry: Geometry) -> None:
    facts = fate.facts
    assert facts is not None
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
        if flaws:
            fate.dropped = f"the picture is {flaws[0]}"
            return
        stretches = [(0, 1, 1)]
    else:
        possible, fate.dropped = _windows(facts, config, geometry)
        stretches = _spread(possible, config.windows)
        if len(stretches) < len(possible):
            fate.notes.append(f"{len(stretches)} of {len(possible)} possible items are taken "
                              f"(windows: {config.windows})")
    captions = tuple(f"{config.prefix} {text}".strip() for text in fate.file.captions or ("",))
    for start, end, length in stretches:
        item = Item(fate.file.folder, fate.file.name, fate.file.path, sha256, Bucket(*size, length),
                    start, end, (0.5, 0.5), captions, group)
        if config.crop == "random":
            digest = hashlib.sha256(f"{config.seed} {item.key}".encode()).digest()
            across, down = (int.from_bytes(digest[i : i + 2], "big") / 65535 for i in (0, 2))
            item = replace(item, centring=(round(across, 4), round(down, 4)))
        fate.items.append(item)
    if facts.kind == "video":
        _note_times(fate, facts, config, geometry)


def _windows(
    facts: FileFacts, config: DataConfig, geometry: Geometry
) -> tuple[list[tuple[int, int, int]], str | None]:
    """(first frame, frame behind, length in the bucket) of a file's items; or why it has none."""
    lengths = [length for length in geometry.frames if length > 1]
    if not lengths:
        return [], "it is a clip, and no bucket is longer than 1 frame"
    if config.fps_rule == "native":
        begins, slack = np.arange(facts.num_frames + 1, dtype=np.float64), 0.0
    else:  # when each frame is shown, in frames of the items; times are rounded to ticks
        scale = float(facts.tick_s * geometry.fps)
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
    is_native = config.fps_rule == "native"
    rate = "its own rate" if is_native else f"{float(geometry.fps):g} a second"
    most = longest - (longest - 1) % geometry.stride_t
    remedy = f"; with frames: {most} it would fit" if most > 1 else ""
    return [], (f"its longest stretch{around} gives {longest} frames at {rate}; the shortest "
                f"bucket has {lengths[0]}{remedy}")


def _spread(
    windows: list[tuple[int, int, int]], most: int | Literal["all"]
) -> list[tuple[int, int, int]]:
    if most == "all" or len(windows) <= most:
        return windows
    places = (np.arange(most) + 0.5) * len(windows) / most
    return [windows[int(place)] for place in places]


def _stretches(facts: FileFacts, config: DataConfig) -> Iterator[tuple[int, int]]:
    """(first frame, frame behind) of what holds nothing that is to be avoided."""
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


def picks(item: Item, facts: FileFacts, config: DataConfig, geometry: Geometry) -> list[int]:
    """Frames of the file that an item shows, by index; rising, with repeats where it lacks some.

    By the rule "nearest" frame n is the one whose showing begins nearest to n / fps behind the
    item's first, the earlier of two.
    """
    count = item.bucket.num_frames
    if config.fps_rule == "native" or count == 1:
        return list(range(item.start, item.start + count))
    times = facts.times[item.start : item.end]
    step, shown = 1 / (geometry.fps * facts.tick_s), []
    for number in range(count):
        moment = int(times[0]) + number * step
        behind = min(int(np.searchsorted(times, float(moment))), len(times) - 1)
        before = max(behind - 1, 0)
        near = moment - int(times[before]) <= int(times[behind]) - moment
        shown.append(item.start + (before if near else behind))
    return shown


def _note_times(fate: Fate, facts: FileFacts, config: DataConfig, geometry: Geometry) -> None:
    if config.fps_rule == "nearest":
        repeats = left = total = 0
        for item in fate.items:
            shown = picks(item, facts, config, geometry)
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
    """{SHA-256: the first, in the order of the hashes, of those that look the same}, two or more.

    They are encoded again, at another size, rate or quality, or copied. Compared are 8 moments of
    each file as pictures of 12x12 cells: a part of a longer file, or a mirrored or much recoloured
    copy, isn't found. Files are compared with those of about the same length alone, so that it
    takes a second for ten thousand files of all lengths.
    """
    order = sorted(facts, key=lambda sha: (facts[sha].duration_s, sha))
    lengths = np.array([facts[sha].duration_s for sha in order])
    aspects = np.array([facts[sha].size[0] / facts[sha].size[1] for sha in order])
    shown = [facts[sha].small_pictures().reshape(-1) for sha in order]
    parent = list(range(len(order)))

    def root(index: int) -> int:
        while parent[index] != index:
            index = parent[index]
        return index

    for start in range(0, len(order), _BLOCK):
        stop = min(start + _BLOCK, len(order))
        limit = lengths[stop - 1] * (1 + LENGTHS) + 1e-6
        last = int(np.searchsorted(lengths, limit, side="right"))
        for begin in range(start, last, _AGAINST):
            others = shown[begin : min(begin + _AGAINST, last)]
            near = _near(np.stack(shown[start:stop]), np.stack(others))
            for one, other in zip(*np.nonzero(near), strict=True):
                a, b = start + int(one), begin + int(other)
                fits = lengths[b] <= lengths[a] * (1 + LENGTHS) + 1e-6
                if a < b and fits and abs(aspects[a] / aspects[b] - 1) <= ASPECTS:
                    parent[root(b)] = root(a)
    groups: dict[int, list[str]] = {}
    for index, sha256 in enumerate(order):
        groups.setdefault(root(index), []).append(sha256)
    return {sha: min(group) for group in groups.values() if len(group) > 1 for sha in group}


def _near(some: Cells, others: Cells) -> Flags:
    """Whether each of `some` [n, d] looks like each of `others` [m, d]: [n, m]."""
    a, b = some.astype(np.float32), others.astype(np.float32)
    squares = (a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * (a @ b.T)
    near: Flags = squares <= a.shape[1] * ALIKE**2 + 64  # what float32 leaves of sums of squares
    for i, j in zip(*np.nonzero(near), strict=True):
        near[i, j] = np.quantile(np.abs(a[i] - b[j]), 0.99) <= WORST
    return near
