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
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 80em; color: #222; }
table { border-collapse: collapse; } td, th { padding: .2em 1em; text-align: left; }
th, td { border-bottom: 1px solid #ddd; } .files { display: grid; gap: 1em;
grid-template-columns: repeat(auto-fill, minmax(24em, 1fr)); }
article { border: 1px solid #ddd; border-radius: 6px; padding: .8em; overflow-wrap: anywhere; }
article.dropped { border-color: #c0392b; } .why { color: #c0392b; } .note { color: #8a6d00; }
img { width: 31%; margin-right: 4px; } h3 { font-size: 15px; margin: 0; } p { margin: .3em 0; }
small { color: #666; }
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
        f"<style>{_STYLE}</style><body>{''.join(parts)}</body></html>\n"
    )


def _article(row: Mapping[str, Any], fate: Fate) -> str:
    pictures = fate.facts.thumbnails if fate.facts is not None else ()
    shown = "".join(f'<img alt="" src="data:image/jpeg;base64,{each}">' for each in pictures)
    name = row["name"].encode("utf-8", "replace").decode()
    buckets = ", ".join(dict.fromkeys(item["bucket"] for item in row["items"]))
    caption = escape(" | ".join(row["captions"])[:300]) or "<i>no caption</i>"
    why = f'<p class="why">dropped: {escape(row["dropped"])}</p>' if row["dropped"] else ""
    items = f"{len(row['items'])} items in {buckets}" if row["items"] else ""
    what = "; ".join(part for part in (describe(row), items) if part)
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in row["notes"])
    kind = ' class="dropped"' if row["dropped"] else ""
    return (
        f"<article{kind}><h3>{escape(name)}</h3>{shown}<p><small>{escape(what)}</small></p>"
        f"<p>{caption}</p>{why}{notes}</article>"
    )
