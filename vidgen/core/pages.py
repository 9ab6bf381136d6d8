"""Self-contained HTML pages from the Jinja templates in `templates`, which escape all values.

`_parts.html.j2` draws tables and charts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment

_COLORS = ("#2471a3", "#c0392b", "#1e8449", "#b7950b", "#7d3c98", "#566573")


@dataclass(frozen=True)
class Cell:
    """Cell of a table; line breaks in its texts are kept."""

    text: str
    title: str = ""  # tooltip
    small: str = ""  # small print after the text
    below: str = ""  # small print below it
    marks: Sequence[str] = ()  # warnings after the text


@dataclass(frozen=True)
class Table:
    """Table of a page."""

    heads: Sequence[Cell | str]
    rows: Sequence[Sequence[Cell | str]]
    words: Sequence[int] = ()  # columns of text, aligned left, other than column 0
    caption: str = ""


@dataclass(frozen=True)
class Chart:
    """Line chart with one colour for each line and a legend; not drawn without points."""

    title: str
    lines: Sequence[tuple[str, Sequence[tuple[float, float]]]]  # (name, points (x, y)) of each
    width: int = 320
    height: int = 180
    is_faded: bool = False  # pale, as less important

    @property
    def bounds(self) -> tuple[float, float, float, float] | None:
        """(min x, max x, min y, max y) of all points; None without points."""
        points = [point for _, line in self.lines for point in line]
        if not points:
            return None
        xs, ys = [x for x, _ in points], [y for _, y in points]
        return min(xs), max(xs), min(ys), max(ys)

    @property
    def curves(self) -> Iterator[tuple[str, str, list[tuple[str, str]]]]:
        """(name, colour, points in pixels) of each line."""
        left, right, low, high = self.bounds or (0.0, 0.0, 0.0, 0.0)
        across = (self.width - 62) / ((right - left) or 1.0)
        bottom = self.height - 24
        up = (self.height - 36) / ((high - low) or 1.0)
        for index, (name, line) in enumerate(self.lines):
            places = [(f"{52 + across * (x - left):.1f}", f"{bottom - up * (y - low):.1f}")
                      for x, y in line]
            yield name, _COLORS[index % len(_COLORS)], places


def page(template: str, **values: Any) -> str:
    """Render a template, such as "storyboard", to an HTML page."""
    return "".join(page_parts(template, **values))


def page_parts(template: str, **values: Any) -> Iterator[str]:
    """Render a template piece by piece, for pages larger than memory."""
    return _environment().get_template(f"{template}.html.j2").generate(values)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("vidgen.core"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
