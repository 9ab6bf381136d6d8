"""Select items from the files of a data config, and report on them for `vidgen data check`.

Facts about each file are stored in the user's cache folder at once, so that a check that was killed
continues after them. The folders with the data are never written to.
"""

from __future__ import annotations

import io
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

from vidgen.core.config import build, dump
from vidgen.core.errors import ModelError
from vidgen.core.protocols import OnEvent
from vidgen.core.runtime import cache_folder
from vidgen.core.store import Store, address_of
from vidgen.models.tokenizer import PromptTokenizer
from vidgen.pipeline.workers.scheduler import results_of
from vidgen.training.data.config import DataConfig, Geometry
from vidgen.training.data.files import MediaFile, scan
from vidgen.training.data.probe import PROBE_VERSION, FileFacts, probe_file
from vidgen.training.data.select import Selection, select
from vidgen.weights.folder import ModelFolder
from vidgen.weights.layouts import open_model

T = TypeVar("T")
_SETTLED_S = 2.0  # a newer file may change again within the resolution of its time stamp
_FACTS = ("kind", "num_frames", "fps", "is_variable", "duration_s", "size", "rotation", "codec",
          "pix_fmt", "colour", "is_hdr", "num_repeats", "cuts", "flaws")
_SHOWN = 40
"""Most files per table in the terminal; --json lists all."""


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
    """Open the folder of a model for fine-tuning.

    Raises:
        ModelError: no such model, or one of the diffusers backend.
    """
    folder = open_model(model)
    if not isinstance(folder, ModelFolder):
        raise ModelError(f"{folder.name} is a {folder.class_name}; vidgen fine-tunes toybox and "
                         "the Wan family")
    return folder


def survey(
    config: DataConfig, folder: ModelFolder, on_event: OnEvent, *, workers: int = 1
) -> Selection:
    """Check all files of a config, and select items for a model.

    Raises:
        InputError: a folder or table can't be read, or the model doesn't support a size.
    """
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
    """Return the report for a terminal: tables of buckets, dropped files and files with notes."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=io.StringIO(), width=110, markup=False, highlight=False)
    buckets = Table("bucket", "items", "files", title="Buckets", title_justify="left")
    for label, row in report["buckets"].items():
        buckets.add_row(label, str(row["items"]), str(row["files"]))
    if report["buckets"]:
        console.print(buckets)
    dropped = [(row, [row["dropped"], *row["notes"]]) for row in report["files"] if row["dropped"]]
    noted = [(row, row["notes"]) for row in report["files"] if row["notes"] and not row["dropped"]]
    for title, rows in (("Dropped", dropped), ("Noted", noted)):
        table = Table("file", "content", "", title=f"{title}: {len(rows)}", title_justify="left")
        for row, words in rows[:_SHOWN]:
            table.add_row(Text(row["name"]), _describe(row), Text("; ".join(words)))
        if rows:
            console.print(table)
        if len(rows) > _SHOWN:
            console.print(f"and {len(rows) - _SHOWN} more; --json lists all")
    for note in report["notes"]:
        console.print(f"note: {note}")
    totals = report["totals"]
    console.print(
        f"{totals['files']} files, {totals['dropped']} dropped; {totals['items']} items, "
        f"{totals['seconds_used']:.1f} of {totals['seconds']:.1f} s of video, at "
        f"{report['geometry']['fps']} fps")
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().rstrip()


def _describe(row: Mapping[str, Any]) -> str:
    if "kind" not in row:
        return ""
    size = "{}x{}".format(*row["size"])
    if row["kind"] == "picture":
        return size
    variable = ", variable" if row["is_variable"] else ""
    rate = float(Fraction(row["fps"]))
    return f"{row['num_frames']} frames, {row['duration_s']:.2f} s at {rate:.4g}{variable}, {size}"
