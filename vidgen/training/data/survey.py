"""Select items from the files of a data config, and report on them for `vidgen data check`.

Facts about each file are stored in the user's cache folder at once, so that a check that was killed
continues after them. The folders with the data are never written to.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from vidgen.core.config import build, dump
from vidgen.core.errors import ModelError
from vidgen.core.protocols import OnEvent
from vidgen.core.runtime import cache_folder
from vidgen.core.store import Store, address_of
from vidgen.models.tokenizer import PromptTokenizer
from vidgen.pipeline.workers.scheduler import results_of
from vidgen.training.config import Bucket, DataConfig, Geometry
from vidgen.training.data.files import Item, MediaFile, scan
from vidgen.training.data.probe import PROBE_VERSION, FileFacts, probe_file
from vidgen.weights.folder import ModelFolder
from vidgen.weights.layouts import open_model

T = TypeVar("T")
_SETTLED_S = 2.0  # a newer file may change again within the resolution of its time stamp
_FACTS = ("kind", "num_frames", "fps", "is_variable", "duration_s", "size", "rotation", "codec",
          "pix_fmt", "colour", "is_hdr", "num_repeats", "cuts", "flaws")
_SHOWN = 40
"""Most files of each kind in the terminal; --json lists all."""
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


def probe_files(
    files: Sequence[MediaFile], on_event: OnEvent, *, workers: int = 1, folder: Path | None = None
) -> None:
    """Set the facts about each file; unknown files are decoded in `workers` processes.

    Facts are stored in `folder` by a file's path, size and modification time.
    """
    store, fresh = Store(folder or cache_folder() / "data"), dict[Path, list[MediaFile]]()
    address = {file.path: address_of([str(file.path.resolve()), file.num_bytes, file.mtime_ns,
                                      PROBE_VERSION]) for file in files}
    for file in files:
        kept = store.data(address[file.path])
        if kept:
            file.facts = build(FileFacts, kept)
        else:
            fresh.setdefault(file.path, []).append(file)
    found = results_of(probe_file, {path: path for path in fresh}, workers, on_event)
    for path, facts in track(on_event, "look", found, len(fresh)):
        for file in fresh[path]:
            file.facts = facts
        is_settled = time.time() - fresh[path][0].mtime_ns / 1e9 > _SETTLED_S
        if is_settled and facts.sha256:  # an unreadable file may be readable later
            store.keep(address[path], dump(facts))


def track(on_event: OnEvent, stage: str, things: Iterable[T], total: int) -> Iterator[T]:
    """Yield `things`, and report progress after each of `total`."""
    done = 0
    on_event({"event": "progress", "stage": stage, "done": done, "total": total})
    for done, each in enumerate(things, 1):
        yield each
        on_event({"event": "progress", "stage": stage, "done": done, "total": total})


def open_trainable(model: str) -> ModelFolder:
    """Open a model for fine-tuning; raise ModelError for none, or one that diffusers runs."""
    folder = open_model(model)
    if not isinstance(folder, ModelFolder):
        raise ModelError(f"{folder.name} is a {folder.class_name}; vidgen fine-tunes toybox and "
                         "the Wan family")
    return folder


def survey(
    config: DataConfig, folder: ModelFolder, on_event: OnEvent, *, workers: int = 1
) -> Selection:
    """Check all files of a config, and select items; raises as `Geometry.of` and `scan` do."""
    geometry = Geometry.of(config, folder)
    files, notes = scan(config)
    probe_files(files, on_event, workers=workers)
    select(config, geometry, files)
    limit = folder.components["transformer"].config.text_len
    tokenizer = PromptTokenizer(folder.tokenizer, limit)
    for file in files:
        for caption in file.items[0].captions if file.items else ():
            count = tokenizer.count(caption)
            if count > limit:
                file.notes.append(
                    f"its caption has {count} tokens, but the model reads {limit}: the last "
                    f"{count - limit} are ignored")
            unknown = [word for word, _ in tokenizer.unknown_words(caption)]
            if unknown:
                file.notes.append(f"the model doesn't know the words: {', '.join(unknown[:8])}")
    return Selection(geometry, files, notes)


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
        stretches, file.dropped = _windows(facts, config, geometry)
        possible, most = len(stretches), config.windows
        if most != "all" and most < possible:
            places = (np.arange(most) + 0.5) * possible / most  # evenly spread
            stretches = [stretches[int(place)] for place in places]
            file.notes.append(f"{most} of {possible} possible items are used (windows: {most})")
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


def as_data(chosen: Selection, config: DataConfig) -> dict[str, Any]:
    """Return the report as JSON data; `buckets` are by label."""
    used = [file for file in chosen.files if file.items]
    counts = Counter(item.bucket for item in chosen.items)
    files = Counter(bucket for file in used for bucket in {item.bucket for item in file.items})
    seconds = sum(item.bucket.num_frames / chosen.geometry.fps for item in chosen.items
                  if item.bucket.num_frames > 1)
    return {
        "settings": dump(config),
        "geometry": {"fps": str(chosen.geometry.fps), "frames": list(chosen.geometry.frames),
                     "sizes": [list(size) for size in chosen.geometry.sizes]},
        "totals": {
            "files": len(chosen.files), "dropped": len(chosen.files) - len(used),
            "items": len(chosen.items), "seconds_used": round(float(seconds), 3),
            "seconds": round(sum(file.facts.duration_s for file in chosen.files), 3),
        },
        "buckets": {bucket.label: {**dump(bucket), "items": counts[bucket], "files": files[bucket]}
                    for bucket in sorted(counts)},
        "files": [_row(file, config) for file in chosen.files],
        "notes": chosen.notes,
    }


def _row(file: MediaFile, config: DataConfig) -> dict[str, Any]:
    root = config.folders[file.folder].path if file.folder >= 0 else config.validation
    facts = {} if file.facts.problem is not None else {
        name: getattr(file.facts, name) for name in _FACTS}
    row: dict[str, Any] = dump({
        "folder": root, "name": file.name, "bytes": file.num_bytes,
        "captions": file.captions, "dropped": file.dropped, "notes": file.notes,
        "items": [{"bucket": item.bucket.label, "first_frame": item.start} for item in file.items],
        **facts,
    })
    return row


def as_text(report: Mapping[str, Any]) -> str:
    """Return the report for a terminal: buckets, dropped files, files with notes, totals."""
    lines = [f"bucket {label}: {row['items']} items of {row['files']} files"
             for label, row in report["buckets"].items()]
    dropped = [(row, [row["dropped"], *row["notes"]]) for row in report["files"] if row["dropped"]]
    noted = [(row, row["notes"]) for row in report["files"] if row["notes"] and not row["dropped"]]
    for title, rows in (("dropped", dropped), ("noted", noted)):
        lines += [f"{title} {row['name']}{_describe(row)}: {'; '.join(words)}"
                  for row, words in rows[:_SHOWN]]
        if len(rows) > _SHOWN:
            lines.append(f"{len(rows) - _SHOWN} more files are {title}; --json lists all")
    totals = report["totals"]
    return "\n".join([
        *lines, *(f"note: {note}" for note in report["notes"]),
        f"{totals['files']} files, {totals['dropped']} dropped; {totals['items']} items, "
        f"{totals['seconds_used']:.1f} of {totals['seconds']:.1f} s of video, at "
        f"{report['geometry']['fps']} fps"])


def _describe(row: Mapping[str, Any]) -> str:
    if "kind" not in row:
        return ""
    size = "{}x{}".format(*row["size"])
    if row["kind"] == "picture":
        return f" ({size})"
    variable = ", variable" if row["is_variable"] else ""
    rate = float(Fraction(row["fps"]))
    return (f" ({row['num_frames']} frames, {row['duration_s']:.2f} s at {rate:.4g} fps{variable}, "
            f"{size})")
