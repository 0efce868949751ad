"""Charts of the report: one small SVG per number, legible on light and on dark paper.

    minem report runs/*               # they are inline in report.html

matplotlib draws them; their colours are then replaced by those of the page around them (`currentColor` and the
variables of minem/page.css), so that the page's theme is theirs. They hold no text of anybody's but axis labels.
"""

from __future__ import annotations

import hashlib
import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minem.text import visible

# The first of matplotlib's default colours stand for those of the page, and black for the colour of its text.
SERIES = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f")
DASHES = ("-", "--", ":", "-.")
VARIABLES = {colour: f"var(--series-{number})" for number, colour in enumerate(SERIES)} | {"#000000": "currentColor"}
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text: small, selectable, in the page's own font
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#000000",
    "grid.alpha": 0.15,
    "grid.linewidth": 0.6,
}


@dataclass(frozen=True)
class Point:
    """`value` at `x`, with the ends of its band."""

    x: float
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Line:
    """The points of a series; `number` chooses its colour and dashes."""

    number: int
    points: Sequence[Point]


def draw(lines: Sequence[Line], *, share: bool, x_label: str, name: str) -> str:
    """An <svg> element with the lines and their bands.

    share: the values are shares, shown in percent; the axis shows ten points at least, and nothing outside 0 to 100.
        Other axes start at 0.
    x_label: what the other axis shows. Numbers of 1,000 and more are shortened on both ("12k").
    name: what a screen reader says.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    scale = 100 if share else 1
    style: Any = {**STYLE, "svg.hashsalt": name}  # the same name, the same bytes
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.2, 2.5), layout="constrained")
        axes = figure.add_subplot()
        for line in lines:
            x = [point.x for point in line.points]
            colour = SERIES[line.number % len(SERIES)]
            low, high = ([scale * bound for bound in bounds] for bounds in _bounds(line.points))
            axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
            axes.plot(
                x,
                [scale * point.value for point in line.points],
                color=colour,
                linestyle=DASHES[line.number // len(SERIES) % len(DASHES)],
                linewidth=1.6,
                marker="o",
                markersize=3.5,
            )
        axes.set_xlabel(x_label)
        axes.set_ylabel("%" if share else "")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        if share:
            axes.set_ylim(*_percent_range(*axes.get_ylim()))
        else:
            axes.set_ylim(0, 1.08 * (max(point.high for line in lines for point in line.points) or 1))
        for axis in (axes.xaxis, axes.yaxis):
            if axis.get_view_interval()[1] >= 1000:
                axis.set_major_formatter(EngFormatter(sep=""))
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return themed(file.getvalue(), name)


def themed(svg: str, name: str) -> str:
    """An SVG file of matplotlib as an element of a page: in the page's colours, named for screen readers, no prologue.

    Black becomes the colour of the page's text, white that of its paper, and matplotlib's default colours those of its
    series. Ids are made the element's own, for all ids of a page must differ.
    """
    start = svg.find("<svg")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[max(0, start) :], flags=re.DOTALL)
    for colour, variable in {**VARIABLES, "#ffffff": "var(--paper)"}.items():
        svg = svg.replace(colour, variable)
    prefix = "c" + hashlib.sha256(name.encode()).hexdigest()[:8] + "-"
    svg = re.sub(r'(\bid="|"#|\(#)', rf"\g<1>{prefix}", svg)
    svg = re.sub(r'^(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", svg)
    svg = re.sub(r'^(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(visible(name))}"', 1).strip()


def _bounds(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [point.low for point in points], [point.high for point in points]


def _percent_range(low: float, high: float) -> tuple[float, float]:
    """At least ten points of a percentage, between 0 and 100 (and a little air above)."""
    missing = max(0.0, 10 - (high - low)) / 2
    low, high = low - missing, high + missing
    return max(-1.0, min(low, 90.0)), min(101.0, max(high, 10.0))
