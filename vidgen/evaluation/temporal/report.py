"""Tables and an HTML page with charts of the results of `vidgen eval temporal`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vidgen.core import pages
from vidgen.core.pages import Cell, Chart, Table
from vidgen.evaluation.metrics.vbench import DISTANCES, MEASURES, PROXY

if TYPE_CHECKING:
    import rich.table

SUBTOTALS = ("temporal_subtotal", PROXY + "temporal_subtotal")


def page(result: Mapping[str, Any]) -> str:
    """Return the HTML page of the results of `run_temporal`."""
    folders, comparisons = result["folders"], result["comparisons"]
    shaped = {k: result[k] for k in ("prompt_suite", "networks", "machine")}
    shaped["models"] = {folder["name"]: folder["models"] for folder in folders}
    return pages.page(
        "temporal", title="Clips in time", overview=_overview(folders), charts=_charts(folders),
        verdicts=[(" and ".join(each["folders"]), each["verdict"]) for each in comparisons],
        comparisons=[{"title": pair_title(each["folders"]), "table": _comparison(each),
                      "facts": pairs_text(each) + _distances(each)} for each in comparisons],
        folders=[{**folder, "facts": _facts(folder), "table": _clips(folder)}
                 for folder in folders],
        shaped=json.dumps(shaped, indent=1))


def tables(result: Mapping[str, Any]) -> Iterator[rich.table.Table]:
    """Yield the table of all folders, then that of each comparison, for a terminal."""
    yield _for_terminal(_overview(result["folders"]), "Clips in time")
    for compared in result["comparisons"]:
        title = f"{pair_title(compared['folders'])}: {compared['verdict']}"
        caption = pairs_text(compared) + _distances(compared)
        yield _for_terminal(_comparison(compared), title, caption)


def pair_title(folders: Sequence[str]) -> str:
    """Return the title of a comparison of two folders, such as "a vs. b (a - b)"."""
    return f"{' vs. '.join(folders)} ({' - '.join(folders)})"


def _for_terminal(table: Table, title: str, caption: str | None = None) -> rich.table.Table:
    import rich.table

    drawn = rich.table.Table(title=title, caption=caption)
    for column, head in enumerate(table.heads):
        is_words = column == 0 or column in table.words
        drawn.add_column(_text(head), justify="left" if is_words else "right")
    for row in table.rows:
        drawn.add_row(*map(_text, row))
    return drawn


def _text(cell: Cell | str) -> str:
    return cell if isinstance(cell, str) else cell.text


def _overview(folders: Sequence[Mapping[str, Any]]) -> Table:
    rows: list[list[Cell | str]] = [
        ["clips that move", "", *(f"{f['dynamic']} of {len(f['clips'])}" for f in folders)]]
    for measure, kind in MEASURES.items():
        found = [folder["figures"].get(measure) for folder in folders]
        if any(found):
            label = Cell(f"{measure} {kind.unit}".strip(), kind.about)
            rows.append([label, kind.better, *map(figure_cell, found)])
    for name in SUBTOTALS:
        values = [folder[name] for folder in folders]
        if any(value is not None for value in values):
            rows.append([name, "more", *map(subtotal_cell, values)])
    heads = ["measure", "better", *(folder["name"] for folder in folders)]
    return Table(heads, rows, words=[1], caption="All clips")


def figure_cell(figure: Mapping[str, Any] | None) -> Cell:
    """Return a measure's value with its interval, and normalised if VBench has a range."""
    if figure is None:
        return Cell("")
    text = f"{figure['value']:.4g}"
    if figure["low"] is not None:
        text += f" ({figure['low']:.4g} .. {figure['high']:.4g})"
    return Cell(text, small=f"[{figure['normalised']:.3f}]" if "normalised" in figure else "")


def subtotal_cell(value: float | None) -> str:
    """Return VBench's temporal subtotal as text, empty if it is None."""
    return "" if value is None else f"{value:.4f}"


def _charts(folders: Sequence[Mapping[str, Any]]) -> list[Chart]:
    drift = []
    for folder in folders:
        found = ((d, folder["figures"].get(f"identity_drift_{d}")) for d in DISTANCES)
        drift.append((folder["name"], [(d, f["value"]) for d, f in found if f]))
    charts = [Chart("identity drift against distance in frames, %", drift)]
    for measure, kind in MEASURES.items():
        lines = []
        for folder in folders:
            known = (clip["figures"].get(measure) for clip in folder["clips"])
            values = sorted(value for value in known if value is not None)
            shares = [(100 * (i + 0.5) / len(values), value) for i, value in enumerate(values)]
            lines.append((folder["name"], shares))
        if any(len(points) > 1 for _, points in lines) and not measure.startswith("identity"):
            charts.append(Chart(f"{measure} {kind.unit}".strip(), lines))
    return charts


def _comparison(compared: Mapping[str, Any]) -> Table:
    heads = ["measure", "difference", "95% interval", "pairs", "verdict"]
    rows = [[measure, f"{row['difference']:+.4g}", f"{row['low']:.4g} .. {row['high']:.4g}",
             str(row["pairs"]), row["verdict"]] for measure, row in compared["measures"].items()]
    return Table(heads, rows, words=[4])


def pairs_text(compared: Mapping[str, Any]) -> str:
    """Return the number of pairs of a comparison and of unpaired clips, as text."""
    text = f"{compared['pairs']} pairs, of {compared['both_dynamic']} both clips move"
    unpaired = dict(zip(compared["folders"], compared["unpaired"], strict=True))
    alone = [f"{count} of {name}" for name, count in unpaired.items() if count]
    return text + (f"; without a pair: {', '.join(alone)}" if alone else "")


def _distances(compared: Mapping[str, Any]) -> str:
    if compared["fvd"] is None:
        return ""
    counts = " and ".join(map(str, compared["fvd_segments"]))
    return f"; FVD {compared['fvd']:.4g}, KVD {compared['kvd']:.4g} of {counts} segments"


def _clips(folder: Mapping[str, Any]) -> Table:
    shown = [measure for measure in MEASURES if measure in folder["figures"]]
    rows: list[list[Cell | str]] = []
    for clip in folder["clips"]:
        marks = ["not dynamic"] * (not clip["dynamic"]) + ["of a single colour"] * clip["flat"]
        values = (clip["figures"].get(measure) for measure in shown)
        rows.append([Cell(clip["name"], marks=marks),
                     *("" if value is None else f"{value:.4g}" for value in values)])
    return Table(["clip", *shown], rows)


def _facts(folder: Mapping[str, Any]) -> str:
    if not folder["clips"]:
        return "No clip could be measured"
    sizes = ", ".join(f"{width}x{height}" for width, height in folder["sizes"])
    rates = ", ".join(folder["fps"])
    return f"{len(folder['clips'])} clips of {sizes} pixels at {rates} frames a second"
