"""Results of `python -m eval.toybox` on one page, ordered by how well prompts are followed.

python -m eval.toybox.leaderboard --results a.json --results b.json -o board.html
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from eval.toybox.suite.judging import TASKS
from eval.toybox.suite.table import within, writer
from vidgen.cli.main import as_exit_code, parser_of
from vidgen.cli.report import Report
from vidgen.core import pages
from vidgen.core.errors import InputError
from vidgen.core.pages import Cell, Table
from vidgen.core.runtime import atomic_write, check_output
from vidgen.evaluation.leaderboard import reading_results
from vidgen.evaluation.statistics import mean_interval, paired_interval
from vidgen.evaluation.temporal.comparison import FEWEST_PAIRS

#: By the first of these that a result has, models are compared.
_HEADLINES = ("text", "phrased", "held_triples", "image")
FOLLOWING = "following"
_SHOWN = {
    "text": (*TASKS, "path"), "held_out": TASKS, "two": ("sprite", "motion"),
    "image": ("last_sprite", "motion", "first_psnr", "jump"), "triples": ("sprite",),
    "phrased": TASKS, "extend": ("last_sprite", "brightness_drift", "joins"),
    "sound": ("sync_median", "sync_f1", "voice", "ambience"), "vae": ("psnr", "mask_psnr"),
}  # fmt: skip


@dataclass(frozen=True)
class ToyboxEntry:
    """One model's results on the Toybox suite.

    Attributes:
        file: where they stand.
        result: what is in it.
        following: of each prompt by which models are compared, in their order, the share that its
            clips get right of sprite, motion, place and camera; empty where none was asked.
    """

    file: str
    result: Mapping[str, Any]
    following: tuple[float, ...]

    @classmethod
    def of(cls, file: str, result: Mapping[str, Any]) -> ToyboxEntry:
        """Take results apart.

        Raises:
            KeyError: they lack something; so do those of before "outcomes" were kept.
        """
        entry = cls(file, result, tuple(_following(result)))
        _ = entry.conditions, entry.name, entry.model, entry.settings, entry.result["machine"]
        return entry

    @property
    def name(self) -> str:
        """Of the model."""
        return str(self.result["model"]["name"])

    @property
    def model(self) -> str:
        """Its name and the beginning of its hash."""
        return f"{self.name} {self.result['model']['sha256'][:12]}"

    @property
    def settings(self) -> str:
        """How the clips were made: one model's runs may differ in it."""
        made = self.result["settings"]
        pull = made["guidance"]
        told = f"{made['num_steps']} steps, guidance {pull['scale']:g}"
        if pull["interval"] != [0, 1]:
            told += " in {:g} .. {:g}".format(*pull["interval"])
        return f"{told}, shift {made['shift']:g}, {made['sampler']}, {self.result['dtype']}"

    @property
    def headline(self) -> float:
        """By which entries are ordered."""
        return fmean(self.following) if self.following else 0.0

    @property
    def conditions(self) -> dict[str, Any]:
        """What two entries must share to be ranked together."""
        result, made = self.result, self.result["settings"]
        suite = result["prompt_suite"]
        return {
            "suite": f"toybox, {result['part']}",
            "prompts": f"{suite['name']} ({suite['sha256'][:12]})",
            "clips a prompt": result["clips_a_prompt"], "fps": made["fps"],
            "size": f"{made['width']}x{made['height']}", "frames": made["num_frames"],
            "judge": result["judge"][:12],
            "sound judge": result["sound_judge"] and result["sound_judge"][:12],
            "world version": result["world_version"],
            "measures version": result["measures_version"],
        }  # fmt: skip


def _following(result: Mapping[str, Any]) -> list[float]:
    source = next((name for name in _HEADLINES if result["outcomes"].get(name)), None)
    if source is None:
        return []
    tasks = [result["outcomes"][source][task] for task in TASKS]
    shares = [fmean(sign == "1" for sign in signs) for signs in zip(*tasks, strict=True)]
    count = len(shares) // result["clips_a_prompt"]  # every prompt once, and then again
    return [fmean(shares[prompt::count]) for prompt in range(count)]


def _columns(group: Sequence[ToyboxEntry]) -> list[str]:
    """The figures that a table shows, of those that its entries have."""
    known = {
        f"{source}, {measure}" for entry in group
        for source, figures in entry.result["scores"].items() for measure in figures
    }  # fmt: skip
    wanted = [f"{source}, {name}" for source, names in _SHOWN.items() for name in names]
    return [FOLLOWING] * any(e.following for e in group) + [c for c in wanted if c in known]


def _cell(column: str, figure: Mapping[str, Any] | None) -> Cell | str:
    """Return a figure with its interval."""
    if figure is None:
        return ""
    source, _, measure = column.rpartition(", ")
    show = writer(measure, source)
    return Cell(show(figure["value"]), below=within(figure, show))


def tables(entries: Sequence[ToyboxEntry]) -> list[dict[str, Any]]:
    """Entries that may be ranked together, the best first: `conditions`, `columns` and `rows`."""
    return [
        {"conditions": group[0].conditions, "columns": _columns(group),
         "rows": [_row(entry, group[0]) for entry in group]}
        for group in _ranked(entries)
    ]  # fmt: skip


def _ranked(entries: Sequence[ToyboxEntry]) -> list[list[ToyboxEntry]]:
    """Return groups of entries that may be ranked together, the best of each first."""
    groups: dict[str, list[ToyboxEntry]] = {}
    for entry in entries:
        groups.setdefault(json.dumps(entry.conditions, sort_keys=True), []).append(entry)
    return [sorted(group, key=lambda entry: -entry.headline) for group in groups.values()]


def page(entries: Sequence[ToyboxEntry]) -> str:
    """Return the page of all tables."""
    intro = (
        "Ordered by how well prompts are followed. An order means something only where the "
        "verdict names a winner: each model is compared with the first of its table, prompt by "
        "prompt. Figures have their 95% interval."
    )
    sections = [
        {"conditions": "; ".join(f"{name}: {'unknown' if value is None else value}"
                                 for name, value in table["conditions"].items()),
         "table": _drawn(table),
         "machines": "\n".join(sorted({json.dumps(each["machine"], sort_keys=True)
                                       for each in table["rows"]}))}
        for table in tables(entries)
    ]  # fmt: skip
    return pages.page("leaderboard", title="Leaderboard", intro=intro, sections=sections)


def _drawn(table: Mapping[str, Any]) -> Table:
    heads = [column.replace(", ", "\n") for column in table["columns"]]
    rows = [
        [Cell(entry["name"], entry["file"], below=f"{entry['model']}\n{entry['settings']}"),
         entry["verdict"], str(entry["clips"]),
         *(_cell(column, entry["figures"].get(column)) for column in table["columns"])]
        for entry in table["rows"]
    ]  # fmt: skip
    return Table(["model", "against the first", "clips", *heads], rows, words=[1])


def _row(entry: ToyboxEntry, first: ToyboxEntry) -> dict[str, Any]:
    scores = entry.result["scores"]
    figures = {f"{source}, {name}": figure
               for source, part in scores.items() for name, figure in part.items()}  # fmt: skip
    if entry.following:
        low, high = mean_interval(entry.following)
        known = len(entry.following) > 1
        figures[FOLLOWING] = {"value": entry.headline, "low": low if known else None,
                              "high": high if known else None}  # fmt: skip
    rates = entry.result["outcomes"].values()
    return {
        "name": entry.name, "model": entry.model, "settings": entry.settings, "file": entry.file,
        "clips": sum(len(next(iter(part.values()), "")) for part in rates),
        "figures": figures, "machine": entry.result["machine"],
        "verdict": "the first" if entry is first else _verdict(entry, first),
    }  # fmt: skip


def _verdict(entry: ToyboxEntry, first: ToyboxEntry) -> str:
    """Whether an entry follows its prompts worse than the first one, in percentage points."""
    count = len(entry.following)
    if count < FEWEST_PAIRS:
        return f"too few prompts ({count} of {FEWEST_PAIRS})"
    low, high = paired_interval(entry.following, first.following)
    points = 100 * (entry.headline - first.headline)
    told = f"{points:+.1f} points ({100 * low:+.1f} .. {100 * high:+.1f})"
    return f"no significant difference: {told}" if low <= 0 <= high else f"follows less: {told}"


def read_entry(path: str) -> ToyboxEntry:
    """Return the entry of a results file, after a page could be made of it.

    Raises:
        InputError: it can't be read, or holds no such results.
    """
    with reading_results(path, "python -m eval.toybox"):
        entry = ToyboxEntry.of(path, json.loads(Path(path).read_text("utf-8")))
        page([entry, entry])  # validate it by rendering
        return entry


DESCRIPTION = "Compare results of the Toybox suites on one page."


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("--results", action="append", default=[], metavar="FILE",
        help="of python -m eval.toybox; may be repeated")
    add("-o", "--output", metavar="HTML", required=True)
    add("--overwrite", action="store_true", help="replace an existing page")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page; exit codes as everywhere."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    with as_exit_code(arguments) as codes:
        codes.append(_run(arguments))
    return codes[-1]


def _run(arguments: Sequence[str]) -> int:
    prog = "python -m eval.toybox.leaderboard"
    args = parser_of(sys.modules[__name__], prog, is_long=False).parse(arguments)
    if not args.results:
        raise InputError("no results; give --results FILE, as python -m eval.toybox wrote it")
    check_output(args.output, overwrite=args.overwrite)
    entries = [read_entry(path) for path in args.results]
    found = tables(entries)
    atomic_write(args.output, page(entries).encode())
    lines = [f"{number}. {row['name']}: {row['verdict']}" for table in found
             for number, row in enumerate(table["rows"], 1)]
    with Report(as_json=args.json, events=None) as report:
        report.written(args.output)
        report.result({"path": args.output, "tables": found}, "\n".join([*lines, args.output]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
