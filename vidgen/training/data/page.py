"""What `vidgen data check` found as one HTML page with thumbnails, for any browser, offline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from vidgen.training.data.report import describe
from vidgen.training.data.select import Fate

_MOST = 2_000
"""Files shown with thumbnails; what was dropped or noted comes first."""
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #777; --note: #8a6d00; --why: #c0392b }
@media (prefers-color-scheme: dark) { :root { --note: #d9b94a; --why: #ff8a7a; --soft: #999 } }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 80em; padding: 24px }
h1 { font-size: 26px; margin: 0 } h2 { font-size: 19px; margin: 28px 0 8px }
h3 { font-size: 15px; margin: 0 0 6px } p { margin: .3em 0 } table { border-collapse: collapse }
th, td { border-bottom: 1px solid var(--line); padding: .2em 2em .2em 0; text-align: left }
td + td, th + th { text-align: right; font-variant-numeric: tabular-nums }
.files { align-items: start; display: grid; gap: 16px;
  grid-template-columns: repeat(auto-fill, minmax(min(22em, 100%), 1fr)) }
article { border: 1px solid var(--line); border-radius: 6px; overflow-wrap: anywhere;
  padding: 12px; break-inside: avoid } article.dropped { border-color: var(--why) }
.shown { align-items: flex-start; display: flex; gap: 4px } img { border-radius: 3px; width: 32% }
.why { color: var(--why) } .note { color: var(--note) } small { color: var(--soft) }
"""


def page(told: Mapping[str, Any], fates: Sequence[Fate]) -> str:
    """HTML of `report.as_data`; the thumbnails are those of the fates."""
    pairs = list(zip(told["files"], fates, strict=True))
    pairs.sort(key=lambda pair: (pair[0]["dropped"] is None, not pair[0]["notes"]))
    totals = told["totals"]
    rows = "".join(f"<tr><td>{label}</td><td>{row['items']}</td><td>{row['files']}</td></tr>"
                   for label, row in told["buckets"].items())
    more = len(pairs) - _MOST
    parts = [
        "<h1>Fine-tuning data</h1>",
        f"<p>{totals['files']} files, <b>{totals['dropped']} dropped</b>; {totals['items']} items, "
        f"{totals['seconds_used']:.1f} of {totals['seconds']:.1f} s of film, at "
        f"{escape(told['geometry']['fps'])} frames a second.</p>",
        f"<table><tr><th>bucket</th><th>items</th><th>files</th></tr>{rows}</table>",
        *(f"<p>{escape(note)}</p>" for note in told["notes"]),
        '<h2>Files</h2><div class="files">',
        *(_article(row, fate) for row, fate in pairs[:_MOST]),
        "</div>", f"<p>{more} more files are fine and not shown.</p>" if more > 0 else "",
    ]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Fine-tuning data</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style><body>{''.join(parts)}</body></html>\n"
    )


def _article(row: Mapping[str, Any], fate: Fate) -> str:
    pictures = fate.facts.thumbnails if fate.facts is not None else ()
    shown = "".join(f'<img alt="" src="data:image/jpeg;base64,{each}">' for each in pictures)
    shown = f'<div class="shown">{shown}</div>' if shown else ""
    name = row["name"].encode("utf-8", "replace").decode()
    buckets = ", ".join(dict.fromkeys(item["bucket"] for item in row["items"]))
    caption = escape(" | ".join(row["captions"])[:300]) or "<i>no caption</i>"
    why = f'<p class="why">dropped: {escape(row["dropped"])}</p>' if row["dropped"] else ""
    count = len(row["items"])
    items = f"{count} {'item' if count == 1 else 'items'} in {buckets}" if count else ""
    what = "; ".join(part for part in (describe(row), items) if part)
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in row["notes"])
    kind = ' class="dropped"' if row["dropped"] else ""
    return (
        f"<article{kind}><h3>{escape(name)}</h3>{shown}<p><small>{escape(what)}</small></p>"
        f"<p>{caption}</p>{why}{notes}</article>"
    )
