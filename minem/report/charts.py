"""The pictures of a run, all drawn by matplotlib: charts in report.html, accuracy.png and comparison.png.

    minem report runs/*               # charts, inline as SVG

An SVG's colours become variables of page.css, so that charts follow the page's theme.
"""

import hashlib
import html
import io
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from minem.report.reader import read_run
from minem.statistics import mean
from minem.text import clean, visible

Point = tuple[float, float, float, float]  # x, the value there, and the ends of its band
# Of a curve, by its number: matplotlib's own colours, which the page has in both themes, as variables.
COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f")
DASHES = ("-", "--", ":", "-.")
VARIABLES = {colour: f"var(--series-{number})" for number, colour in enumerate(COLOURS)}
VARIABLES |= {"#000000": "currentColor", "#ffffff": "var(--paper)"}
# Text stays text: small, selectable, in the page's own font. The same picture gives the same bytes.
STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "minem", "legend.frameon": False}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.grid.axis": "y"}
STYLE |= dict.fromkeys(("axes.linewidth", "xtick.major.width", "ytick.major.width", "grid.linewidth"), 0.6)
STYLE |= {"grid.color": "#000000", "grid.alpha": 0.15}


@matplotlib.rc_context(STYLE)
def draw(curves: Mapping[int, Sequence[Point]], share: bool, x_label: str, name: str) -> str:
    """An <svg> element with curves and their bands. Numbers of 1,000 and more are shortened on both axes ("12k").

    curves: by the number that chooses colour and dashes. name: for screen readers.
    share: show percent, at least ten points of it, and nothing outside 0 to 100; other axes start at 0.
    """
    figure = Figure(figsize=(4.2, 2.5))
    axes = figure.add_axes((0.15, 0.2, 0.83, 0.77), xlabel=x_label, ylabel="%" if share else "")
    for number, points in curves.items():
        x, *bands = zip(*points, strict=True)
        value, low, high = ([100 * one if share else one for one in band] for band in bands)
        colour, dash = COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(x, value, color=colour, linestyle=dash, linewidth=1.6, marker="o", markersize=3.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    if share:
        bottom, top = axes.get_ylim()
        missing = max(0.0, 10 - (top - bottom)) / 2
        axes.set_ylim(max(-1.0, min(bottom - missing, 90.0)), min(101.0, max(top + missing, 10.0)))
    else:
        axes.set_ylim(0, 1.08 * (max(high for points in curves.values() for *_, high in points) or 1))
    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_view_interval()[1] >= 1000:
            axis.set_major_formatter(EngFormatter(sep=""))
    return _svg(figure, name)


@matplotlib.rc_context(STYLE)
def plot_accuracy(run: Path, path: Path) -> None:
    """accuracy.png: validation per iteration with its 95 % Wilson band, and test of the base and the last model."""
    read = read_run(run)

    def percents(split: str, key: str) -> tuple[list[int], list[float]]:
        series = read.series(f"eval.{split}", key)
        return list(series), [100 * share for share in series.values()]

    figure = Figure(figsize=(6.4, 4.0), dpi=150)
    title = f"{read.config['task']['name']}: {read.sampler}"
    axes = _panel(figure, title, "EM iteration (0: base model)", "accuracy in %")
    iterations, low = percents("validation", "low")
    axes.fill_between(iterations, low, percents("validation", "high")[1], alpha=0.2, label="95 % interval (Wilson)")
    axes.plot(*percents("validation", "accuracy"), marker="o", label="validation, greedy")
    if (sampled := percents("validation", "sampled"))[0]:
        axes.plot(*sampled, "--", marker=".", label="validation, temperature 1")
    axes.vlines(*percents("test", "low"), percents("test", "high")[1], color="black")
    axes.plot(*percents("test", "accuracy"), "ks", label="test, greedy")
    axes.set_xticks(iterations)
    axes.set_ylim(0, 102)
    axes.legend(loc="lower right")
    FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})


@matplotlib.rc_context(STYLE)
def plot_spent(runs: Sequence[Mapping[str, Any]]) -> bytes:
    """comparison.png: accuracy by the tokens spent on it, a panel per task, from the runs of `read_comparison`."""
    FigureCanvasAgg(_spent(runs)).print_png(picture := io.BytesIO(), metadata={"Software": None})
    return picture.getvalue()


@matplotlib.rc_context(STYLE)
def svg_spent(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The panels of `plot_spent` as <svg> elements for the report: {title, svg}."""
    panels = []
    for task in dict.fromkeys(run["task"] for run in runs):
        title = f"{task}: accuracy against tokens spent"
        panels.append({"title": title, "svg": _svg(_spent([run for run in runs if run["task"] == task]), title)})
    return panels


def _spent(runs: Sequence[Mapping[str, Any]]) -> Figure:
    """A thin line per seed and a thick one for their mean, iteration by iteration."""
    by_task: dict[str, dict[str, list[Any]]] = {}
    for run in runs:
        points = [(tokens / 1000, 100 * accuracy) for tokens, accuracy in run["curve"]]
        by_task.setdefault(run["task"], {}).setdefault(run["sampler"], []).append(points)
    figure = Figure(figsize=(6.4 * len(by_task), 4.0), dpi=150)
    x_label, y_label = "thousand tokens spent in E-steps (points: iterations)", "validation accuracy, greedy, in %"
    for number, (task, by_sampler) in enumerate(by_task.items()):
        axes = _panel(figure, task, x_label, y_label, number, len(by_task))
        for (sampler, seeds), colour in zip(by_sampler.items(), itertools.cycle(COLOURS), strict=False):
            for points in seeds:
                axes.plot(*zip(*points, strict=True), color=colour, alpha=0.35, linewidth=0.8)
            means = [[mean(values) for values in zip(*points, strict=True)] for points in zip(*seeds, strict=True)]
            axes.plot(*zip(*means, strict=True), color=colour, marker="o", linewidth=2, label=sampler)
        axes.set_ylim(None, 102)
        axes.legend(loc="lower right", title="mean of seeds")
    return figure


def _panel(figure: Figure, title: str, x_label: str, y_label: str, number: int = 0, panels: int = 1) -> Axes:
    axes = figure.add_axes(((number + 0.1) / panels, 0.13, 0.88 / panels, 0.79), xlabel=x_label, ylabel=y_label)
    axes.set_title(clean(title), parse_math=False)
    return axes


def _svg(figure: Figure, name: str) -> str:
    """The figure as an element of a page: in the page's colours, named for screen readers, with ids of its own."""
    file = io.StringIO()
    for patch in (figure.patch, *(axes.patch for axes in figure.axes)):
        patch.set_visible(False)
    FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None, "Creator": None})
    svg = re.sub(r"<metadata>.*?</metadata>|^.*?(?=<svg)", "", file.getvalue(), flags=re.DOTALL)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, variable)
    prefix = "c" + hashlib.sha256(name.encode()).hexdigest()[:8] + "-"
    svg = re.sub(r'(\bid="|"#|\(#)', rf"\g<1>{prefix}", svg)
    svg = re.sub(r"^<svg.*?>", lambda tag: re.sub(r' (width|height)="[^"]*"', "", tag[0]), svg, flags=re.DOTALL)
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(visible(name))}"', 1).strip()
