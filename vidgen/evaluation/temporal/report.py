"""The results of `vidgen eval temporal` as one HTML page, charts inside, for any browser."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from html import escape
from typing import Any

from vidgen.evaluation.metrics.appearance import DISTANCES
from vidgen.evaluation.metrics.registry import MEASURES, PROXY
from vidgen.evaluation.temporal.summary import pairs_text

_COLORS = ("#2471a3", "#c0392b", "#1e8449", "#b7950b", "#7d3c98", "#566573")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 68em; padding: 0 1em;
 color: #222; }
table { border-collapse: collapse; margin: 1em 0; } caption { text-align: left; font-weight: 600; }
td, th { padding: .2em .8em; border-bottom: 1px solid #ddd; text-align: right; }
td:first-child, th:first-child, td.text, th.text { text-align: left; }
td { white-space: nowrap; } td:first-child, td.text { white-space: normal; min-width: 12em; }
.still { color: #c0392b; } .wide { overflow-x: auto; }
figure { display: inline-block; vertical-align: top; margin: .6em 1em .6em 0; }
figcaption { max-width: 320px; font-size: 13px; } pre { background: #f5f5f5; padding: 1em; }
"""
Line = tuple[str, Sequence[tuple[float, float]]]


def page(result: Mapping[str, Any]) -> str:
    """HTML of the results of `temporal.run_temporal`; it loads nothing from elsewhere."""
    folders = result["folders"]
    shaped = {k: result[k] for k in ("prompt_suite", "augmentation", "networks", "machine")}
    shaped["models"] = {folder["name"]: folder["models"] for folder in folders}
    parts = [
        "<h1>Clips in time</h1>",
        *(f"<p><b>{escape(' and '.join(c['folders']))}</b>: {escape(c['verdict'])}.</p>"
          for c in result["comparisons"]),
        _overview(folders), _charts(folders),
        *map(_comparison, result["comparisons"]), *map(_clips, folders),
        "<h2>What shaped this</h2>",
        f"<pre>{escape(json.dumps(shaped, indent=1))}</pre>",
    ]  # fmt: skip
    return document("Clips in time", parts, STYLE)


def document(title: str, parts: Sequence[str], style: str) -> str:
    """A page of HTML that stands alone."""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{style}</style><body>{''.join(parts)}</body></html>\n"
    )


def table_row(cells: Sequence[str], tag: str = "td", text: Collection[int] = ()) -> str:
    """A row of a table; cells are HTML, and words, no numbers, in the columns `text`."""
    kinds = [' class="text"' if column in text else "" for column in range(len(cells))]
    drawn = (f"<{tag}{kind}>{cell}</{tag}>" for cell, kind in zip(cells, kinds, strict=True))
    return f"<tr>{''.join(drawn)}</tr>"


def wide_table(rows: Sequence[str], caption: str = "") -> str:
    """A table of rows of HTML that scrolls by itself where the page is narrow."""
    head = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f'<div class="wide"><table>{head}{"".join(rows)}</table></div>'


def _overview(folders: Sequence[Mapping[str, Any]]) -> str:
    names = [escape(folder["name"]) for folder in folders]
    rows = [table_row(["measure", "better", *names], "th")]
    rows.append(table_row(["clips that move", "",
                      *(f"{f['dynamic']} of {len(f['clips'])}" for f in folders)]))  # fmt: skip
    for measure, kind in MEASURES.items():
        found = [folder["figures"].get(measure) for folder in folders]
        if any(found):
            label = f'<span title="{escape(kind.about)}">{measure}</span> {escape(kind.unit)}'
            rows.append(table_row([label, kind.better, *map(figure_cell, found)]))
    for name in ("temporal_subtotal", PROXY + "temporal_subtotal"):
        if any(folder[name] is not None for folder in folders):
            cells = ["" if f[name] is None else f"{f[name]:.4f}" for f in folders]
            rows.append(table_row([name, "more", *cells]))
    return wide_table(rows, "All clips")


def figure_cell(figure: Mapping[str, Any] | None) -> str:
    """A measure's value with half its interval, and normalised where VBench has a range."""
    if figure is None:
        return ""
    half = "" if figure["low"] is None else f" &plusmn; {figure['value'] - figure['low']:.2g}"
    raw = f"{figure['value']:.4g}{half}"
    return f"{raw} <small>[{figure['normalised']:.3f}]</small>" if "normalised" in figure else raw


def _charts(folders: Sequence[Mapping[str, Any]]) -> str:
    drift = []
    for folder in folders:
        found = ((d, folder["figures"].get(f"identity_drift_{d}")) for d in DISTANCES)
        drift.append((folder["name"], [(d, f["value"]) for d, f in found if f]))
    charts = [line_chart("identity drift against distance in frames, %", drift)]
    for measure, kind in MEASURES.items():
        lines = []
        for folder in folders:
            values = sorted(
                clip["figures"][measure] for clip in folder["clips"]
                if clip["figures"].get(measure) is not None
            )  # fmt: skip
            steps = [(100 * (i + 0.5) / len(values), value) for i, value in enumerate(values)]
            lines.append((folder["name"], steps))
        if any(len(points) > 1 for _, points in lines) and not measure.startswith("identity"):
            charts.append(line_chart(f"{measure} {kind.unit}".strip(), lines))
    about = ("<p>But for the first, each chart has the values of all clips from the least to the "
             "most; across is the share of the clips, in %.</p>")
    return f"<h2>Charts</h2>{about}{''.join(charts)}"


def _comparison(compared: Mapping[str, Any]) -> str:
    heads = ["measure", "difference", "95% interval", "pairs", "verdict"]
    rows = [table_row(heads, "th", text=[4])]
    for measure, row in compared["measures"].items():
        interval = f"{row['low']:.4g} .. {row['high']:.4g}"
        rows.append(table_row([measure, f"{row['difference']:+.4g}", interval, str(row["pairs"]),
                               escape(row["verdict"])], text=[4]))  # fmt: skip
    distance = compared["motion_distance"]
    told = "too few segments" if distance is None else f"{distance:.4g}"
    if compared["fvd"] is not None:
        counts = " and ".join(map(str, compared["fvd_segments"]))
        told += f"; FVD {compared['fvd']:.4g}, KVD {compared['kvd']:.4g} of {counts} segments"
    names = " less ".join(compared["folders"])
    return (
        f"<h2>{escape(names)}</h2><p>{escape(pairs_text(compared))}; Fr&eacute;chet distance of "
        f"motion histograms: {told}.</p>"
        + wide_table(rows)
    )


def _clips(folder: Mapping[str, Any]) -> str:
    shown = [m for m in MEASURES if m in folder["figures"]]
    rows = [table_row(["clip", *shown], "th")]
    for clip in folder["clips"]:
        name = escape(clip["name"])
        if not clip["dynamic"]:
            name += ' <span class="still">not dynamic</span>'
        if clip["flat"]:
            name += ' <span class="still">of a single colour</span>'
        values = (clip["figures"].get(measure) for measure in shown)
        rows.append(table_row([name, *("" if v is None else f"{v:.4g}" for v in values)]))
    failed = "".join(
        f"<li>{escape(name)}: {escape(why)}</li>" for name, why in folder["failed"].items()
    )
    missing = "".join(f"<li>{escape(prompt)}</li>" for prompt in folder["missing_prompts"])
    return (
        f"<h2>{escape(folder['name'])}, clip by clip</h2>"
        + f"<p>{escape(_facts(folder))}.</p>"
        + (f"<p>Not measured:</p><ul>{failed}</ul>" if failed else "")
        + (f"<p>Prompts without a clip:</p><ul>{missing}</ul>" if missing else "")
        + wide_table(rows)
    )


def _facts(folder: Mapping[str, Any]) -> str:
    """What kind of clips a folder holds."""
    if not folder["clips"]:
        return "No clip could be measured"
    sizes = ", ".join(f"{width}x{height}" for width, height in folder["sizes"])
    rates = ", ".join(folder["fps"])
    return f"{len(folder['clips'])} clips of {sizes} pixels at {rates} frames a second"


def line_chart(title: str, lines: Sequence[Line], width: int = 320, height: int = 180) -> str:
    """A figure with an SVG of lines through points (x, y), one colour a line, with a legend."""
    points = [point for _, line in lines for point in line]
    if not points:
        return ""
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    left, right, low, high = min(xs), max(xs), min(ys), max(ys)
    wide, tall = (right - left) or 1.0, (high - low) or 1.0

    def place(point: tuple[float, float]) -> str:
        x = 52 + (width - 62) * (point[0] - left) / wide
        y = height - 24 - (height - 36) * (point[1] - low) / tall
        return f"{x:.1f},{y:.1f}"

    drawn = [
        f'<text x="2" y="16">{high:.4g}</text><text x="2" y="{height - 24}">{low:.4g}</text>',
        f'<text x="52" y="{height - 6}">{left:.3g}</text>',
        f'<text x="{width - 8}" y="{height - 6}" text-anchor="end">{right:.3g}</text>',
        f'<path d="M52,8V{height - 22}H{width - 8}" fill="none" stroke="#999"/>',
    ]
    legend = []
    for index, (name, line) in enumerate(lines):
        color = _COLORS[index % len(_COLORS)]
        spots = [place(point) for point in line]
        drawn.append(
            f'<polyline points="{" ".join(spots)}" fill="none" stroke="{color}" stroke-width="2"/>'
        )
        drawn += [f'<circle cx="{s.split(",")[0]}" cy="{s.split(",")[1]}" r="2" fill="{color}"/>'
                  for s in spots]  # fmt: skip
        legend.append(f'<span style="color:{color}">{escape(name)}</span>')
    return (
        f'<figure><svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'font-size="11">{"".join(drawn)}</svg>'
        f"<figcaption>{escape(title)}<br>{', '.join(legend)}</figcaption></figure>"
    )
