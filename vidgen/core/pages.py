"""Pages of HTML, each one file that loads nothing from elsewhere, from the templates next to this.

Templates escape all that they are given; `_parts.html.j2` draws tables and charts.
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
    """A cell of a table; line breaks of its texts are kept.

    Attributes:
        title: explains the text where a pointer rests on it.
        below: shown in small letters below the text.
        marks: warnings after the text.
    """

    text: str
    title: str = ""
    small: str = ""
    below: str = ""
    marks: Sequence[str] = ()


@dataclass(frozen=True)
class Table:
    """A table of a page.

    Attributes:
        words: columns that hold words instead of numbers; the first always does.
    """

    heads: Sequence[Cell | str]
    rows: Sequence[Sequence[Cell | str]]
    words: Sequence[int] = ()
    caption: str = ""


@dataclass(frozen=True)
class Chart:
    """Lines through points (x, y), one colour for each line, with a legend.

    Attributes:
        lines: (name, points) of each; without any point nothing is drawn.
        is_faded: drawn pale, as of less interest.
    """

    title: str
    lines: Sequence[tuple[str, Sequence[tuple[float, float]]]]
    width: int = 320
    height: int = 180
    is_faded: bool = False

    @property
    def bounds(self) -> tuple[float, float, float, float] | None:
        """Least and most of x, least and most of y; None without points."""
        points = [point for _, line in self.lines for point in line]
        if not points:
            return None
        xs, ys = [x for x, _ in points], [y for _, y in points]
        return min(xs), max(xs), min(ys), max(ys)

    @property
    def curves(self) -> Iterator[tuple[str, str, list[tuple[str, str]]]]:
        """Name, colour and places in pixels of each line."""
        left, right, low, high = self.bounds or (0.0, 0.0, 0.0, 0.0)
        across = (self.width - 62) / ((right - left) or 1.0)
        bottom = self.height - 24
        up = (self.height - 36) / ((high - low) or 1.0)
        for index, (name, line) in enumerate(self.lines):
            places = [(f"{52 + across * (x - left):.1f}", f"{bottom - up * (y - low):.1f}")
                      for x, y in line]
            yield name, _COLORS[index % len(_COLORS)], places


def page(template: str, **values: Any) -> str:
    """Return the page of a template, such as "storyboard", with these values."""
    return "".join(page_parts(template, **values))


def page_parts(template: str, **values: Any) -> Iterator[str]:
    """Yield the same page from its beginning to its end, so that it need not fit the memory."""
    return _environment().get_template(f"{template}.html.j2").generate(values)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("vidgen.core"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
