"""Reports of `vidgen data check`: data for programs, text for a terminal."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from vidgen.core.config import dump
from vidgen.training.data.config import DataConfig
from vidgen.training.data.select import Fate, Selection

_FACTS = ("kind", "num_frames", "fps", "is_variable", "duration_s", "size", "rotation", "codec",
          "pix_fmt", "colour", "is_hdr", "num_repeats", "cuts", "flaws")
_SHOWN = 40
"""Most files per table in the terminal; --json lists all."""


def as_data(chosen: Selection, config: DataConfig) -> dict[str, Any]:
    """Return the report as JSON data; `buckets` are by label."""
    used = [fate for fate in chosen.fates if fate.items]
    counts = Counter(item.bucket for item in chosen.items)
    files = {bucket: sum(any(item.bucket == bucket for item in fate.items) for fate in used)
             for bucket in counts}
    seconds = sum(item.bucket.num_frames / chosen.geometry.fps for item in chosen.items
                  if item.bucket.num_frames > 1)
    return {
        "settings": dump(config),
        "geometry": {"fps": str(chosen.geometry.fps), "frames": list(chosen.geometry.frames),
                     "sizes": [list(size) for size in chosen.geometry.sizes]},
        "totals": {
            "files": len(chosen.fates), "dropped": len(chosen.fates) - len(used),
            "items": len(chosen.items), "seconds_used": round(float(seconds), 3),
            "seconds": round(sum(f.facts.duration_s for f in chosen.fates), 3),
        },
        "buckets": {bucket.label: {**dump(bucket), "items": counts[bucket], "files": files[bucket]}
                    for bucket in sorted(counts)},
        "files": [_file(fate, config) for fate in chosen.fates],
        "notes": chosen.notes,
    }


def _file(fate: Fate, config: DataConfig) -> dict[str, Any]:
    file, facts = fate.file, fate.facts
    root = config.folders[file.folder].path if file.folder >= 0 else config.validation
    row: dict[str, Any] = {
        "folder": root, "name": file.name, "bytes": file.num_bytes,
        "captions": list(file.captions), "dropped": fate.dropped, "notes": fate.notes,
        "items": [{"bucket": item.bucket.label, "first_frame": item.start} for item in fate.items],
    }
    if facts.problem is not None:
        return row
    shown: dict[str, Any] = dump({name: getattr(facts, name) for name in _FACTS})
    return row | shown


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
