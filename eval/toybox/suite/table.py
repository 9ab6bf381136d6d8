"""The figures of `python -m eval.toybox` as tables for people."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from eval.toybox.suite.summary import DIFFERENCES, UNITS, reached

if TYPE_CHECKING:
    from rich.table import Table

_COLUMNS = ("clips", "measure", "score", "95% interval", "n", "chance", "rendered",
            "behind the VAE", "floor")  # fmt: skip
_REST = ("chance", "ceiling_render", "ceiling_vae", "floor")


def table(result: Mapping[str, Any]) -> Table:
    """All figures, by source; green and red where there is a floor."""
    from rich.table import Table

    drawn = Table(title=f"Toybox, {result['model']['name']}, split {result['split']}")
    for column in _COLUMNS:
        drawn.add_column(column, justify="left" if column in _COLUMNS[:2] else "right")
    for source, figures in result["scores"].items():
        for measure, figure in figures.items():
            met = reached(measure, figure)
            style = None if met is None else ("green" if met else "red")
            sides = DIFFERENCES.get(source.partition(",")[0])
            show = writer(measure, source)
            drawn.add_row(
                source if sides is None else _difference(source, sides), measure,
                show(figure["value"]), within(figure, show),
                str(figure["total"]), *(show(figure.get(name)) for name in _REST), style=style,
            )  # fmt: skip
        drawn.add_section()
    return drawn


def weak_spots_table(result: Mapping[str, Any]) -> Table | None:
    """Kinds of scenes of which more goes wrong than of others; None where there are none."""
    from rich.table import Table

    if not result["weak_spots"]:
        return None
    drawn = Table(title="Where more goes wrong than elsewhere, by more than chance")
    for column in ("clips", "measure", "scenes", "score", "others", "n"):
        drawn.add_column(column, justify="right" if column in ("score", "others", "n") else "left")
    for spot in result["weak_spots"]:
        rates = (f"{100 * spot[name]:.1f}%" for name in ("value", "others"))
        kind = f"{spot['trait']}: {spot['name']}"
        drawn.add_row(spot["source"], spot["measure"], kind, *rates, str(spot["total"]))
    return drawn


def _difference(source: str, sides: Mapping[str, str]) -> str:
    """What is subtracted from what."""
    which = source.partition(", ")[2]
    words = " less ".join(side.replace("_", " ") for side in sides)
    return f"{words}, {which}" if which else words


def writer(measure: str, source: str) -> Callable[[float | None], str]:
    """What writes values of a measure with their unit; None is nothing."""
    if source.partition(",")[0] in DIFFERENCES:
        return _points
    unit = UNITS[measure].unit if measure in UNITS else "%"
    formats: dict[str, Callable[[float], str]] = {
        "dB": "{:.1f} dB".format, "x": "{:.2f}".format, "": "{:.3f}".format,
        "ms": "{:.1f} ms".format, "%": lambda value: f"{100 * value:.1f}%",
    }  # fmt: skip
    return lambda value: "" if value is None else formats[unit](value)


def within(figure: Mapping[str, Any], show: Callable[[float | None], str]) -> str:
    """A figure's interval, or nothing."""
    if figure["low"] is None:
        return ""
    return f"{show(figure['low'])} .. {show(figure['high'])}"


def _points(value: float | None) -> str:
    """A difference of rates, in percentage points."""
    return "" if value is None else f"{100 * value:+.1f}"
