"""A leaderboard page of the results of many models.

Scores depend on prompts, frame rate, size, networks and the measures' version.
Only results that share all of these are ranked in one table. Each model is compared clip by clip
with the first of its table.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidgen.core import pages
from vidgen.core.errors import InputError
from vidgen.core.pages import Cell, Table
from vidgen.core.store import address_of
from vidgen.evaluation.metrics.vbench import MEASURES, PROXY
from vidgen.evaluation.suite import prompt_of
from vidgen.evaluation.temporal.comparison import HEADLINE, by_name, compare
from vidgen.evaluation.temporal.report import SUBTOTALS, figure_cell, subtotal_cell

_SHOWN = (
    HEADLINE, "subject_consistency", PROXY + "subject_consistency", "background_consistency",
    PROXY + "background_consistency", "motion_smoothness", PROXY + "motion_smoothness",
    "warp_error", "flicker", "identity_drift_16", "motion_speed",
)


@dataclass(frozen=True)
class Entry:
    """Results of one model on one suite."""

    file: str  # path of the results
    folder: Mapping[str, Any]  # one of the results' `folders`
    result: Mapping[str, Any]  # the whole content

    @property
    def conditions(self) -> dict[str, Any]:
        """Conditions that two entries must share to be ranked together."""
        suite, result = self.result["prompt_suite"], self.result
        known = {clip["prompt"] for clip in self.folder["clips"]}
        known |= {prompt_of(Path(name).stem) for name in self.folder["failed"]}
        return {
            "prompts": f"{suite['name']} ({suite['sha256'][:12]})" if suite else
            f"{len(known)} of no suite ({address_of(sorted(known))[:12]})",
            "fps": self.folder["fps"],
            "sizes": [f"{width}x{height}" for width, height in self.folder["sizes"]],
            "clips a prompt": len(result.get("generation", {}).get("seeds", ())) or None,
            "networks": result["networks"], "measures version": result["measures_version"]}


def read_entries(paths: Sequence[str | Path]) -> list[Entry]:
    """Return the entries of results files, checked by rendering a page of each.

    Raises:
        InputError: no files, or one that is unreadable or holds no results.
    """
    if not paths:
        raise InputError("no results; give --results FILE, as vidgen eval wrote it")
    return [entry for path in paths for entry in _read(path)]


def _read(path: str | Path) -> list[Entry]:
    with reading_results(path, "vidgen eval SUITE or temporal"):
        result = json.loads(Path(path).read_text("utf-8"))
        entries = [Entry(str(path), folder, result) for folder in result["folders"]]
        page([*entries, *entries])  # validate them by rendering
        return entries


@contextmanager
def reading_results(path: str | Path, program: str) -> Iterator[None]:
    """Read and validate the results of a program inside the block.

    Raises:
        InputError: the file can't be read, or holds no such results.
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"results {path} can't be read: {error.strerror}") from None
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError,
            RecursionError) as error:
        raise InputError(f"{path} holds no results of {program} "
                         f"({type(error).__name__}: {error}); make it again") from None


def tables(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Return tables of the entries that share their conditions, the best first.

    Returns:
        `conditions` and `rows` of each table. A row has `name`, `model`, `settings`, `file`,
        `clips`, `dynamic`, `figures`, the subtotals, `failed`, `machine`, and the `verdict` of
        the comparison with the first.
    """
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(json.dumps(entry.conditions, sort_keys=True), []).append(entry)
    found = []
    for group in groups.values():
        group.sort(key=lambda e: -float(e.folder["figures"].get(HEADLINE, {}).get("value", 0.0)))
        found.append({"conditions": group[0].conditions,
                      "rows": [_row(entry, group[0]) for entry in group]})
    return found


def _row(entry: Entry, first: Entry) -> dict[str, Any]:
    folder, made = entry.folder, entry.result.get("generation", {})
    settings = {**made.get("settings", {}), **({"dtype": made["dtype"]} if made else {})}
    models = dict.fromkeys(f"{each['model']} {(each['model_sha256'] or '')[:12]}".strip()
                           for each in folder["models"])
    name, leader = str(folder["name"]), str(first.folder["name"])
    verdict = "the first"
    if entry is not first:
        if name == leader:  # two runs of one model
            name, leader = f"{name} ({entry.file})", f"{leader} ({first.file})"
        verdict = compare(leader, by_name(first.folder), name, by_name(folder))["verdict"]
    return {
        "name": str(folder["name"]), "model": ", ".join(models) or "unknown", "file": entry.file,
        "settings": ", ".join(f"{key} {value}" for key, value in settings.items()),
        "clips": len(folder["clips"]), "dynamic": folder["dynamic"], "figures": folder["figures"],
        "failed": len(folder["failed"]), **{name: folder[name] for name in SUBTOTALS},
        "verdict": verdict, "machine": entry.result["machine"]}


def page(entries: Sequence[Entry]) -> str:
    """Return the HTML page of all tables."""
    intro = ("Ordered by steadiness, which is 0 for clips that don't move. An order means "
             "something only where the verdict names a winner: each model is compared with the "
             "first of its table, clip by clip. Figures have their 95% interval.")
    return pages.page("leaderboard", title="Leaderboard", intro=intro, sections=[
        {
            "conditions": "; ".join(f"{name}: {_words(value)}"
                                    for name, value in table["conditions"].items()),
            "table": _drawn(table["rows"]),
            "machines": "\n".join(sorted({json.dumps(each["machine"], sort_keys=True)
                                          for each in table["rows"]})),
        } for table in tables(entries)
    ])  # fmt: skip


def _drawn(rows: Sequence[Mapping[str, Any]]) -> Table:
    shown = [m for m in _SHOWN if any(m in each["figures"] for each in rows)]
    totals = [name for name in SUBTOTALS if any(each[name] is not None for each in rows)]
    heads = [Cell(m, MEASURES[m].about, below=f"{MEASURES[m].better} is better")
             if MEASURES[m].better != "neither" else m for m in shown]
    lines: list[list[Cell | str]] = []
    for entry in rows:
        failed = f", {entry['failed']} failed" if entry["failed"] else ""
        lines.append([
            Cell(entry["name"], entry["file"], below=f"{entry['model']}\n{entry['settings']}"),
            entry["verdict"],
            f"{entry['dynamic']} of {entry['clips']}{failed}",
            *(figure_cell(entry["figures"].get(measure)) for measure in shown),
            *(subtotal_cell(entry[name]) for name in totals)])
    return Table(["model", "against the first", "clips that move", *heads, *totals], lines, [1])


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {str(v)[:12]}" for k, v in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "unknown" if value is None else str(value)
