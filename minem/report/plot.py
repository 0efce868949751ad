"""accuracy.png: what EM did to a run's accuracy, iteration by iteration; comparison.png: what tokens buy.

minem train            # ends by drawing runs/.../accuracy.png
minem compare          # ends by drawing runs/.../comparison.png
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minem.config import Config
from minem.text import clean


def plot_accuracy(results: Mapping[str, Mapping[str, Any]], config: Config, path: Path) -> None:
    """Validation accuracy per iteration with its 95 % Wilson band, and test accuracy of the base and the last model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    last = config.run.iterations
    iterations = list(range(last + 1))
    validation = [results[f"iter-{i:02d}/eval.validation"] for i in iterations]
    test = {i: results[f"iter-{i:02d}/eval.test"] for i in (0, last)}
    figure, axes = pyplot.subplots(figsize=(6.4, 4.0), dpi=150)
    low, high = ([100 * v[bound] for v in validation] for bound in ("low", "high"))
    axes.fill_between(iterations, low, high, alpha=0.2, linewidth=0, label="95 % interval (Wilson)")
    axes.plot(iterations, [100 * v["accuracy"] for v in validation], marker="o", label="validation, greedy")
    if all(v["sampled"] is not None for v in validation):
        sampled = [100 * v["sampled"] for v in validation]
        axes.plot(iterations, sampled, linestyle="--", marker=".", label="validation, temperature 1")
    axes.errorbar(
        list(test),
        [100 * t["accuracy"] for t in test.values()],
        [
            [100 * (t["accuracy"] - t["low"]) for t in test.values()],
            [100 * (t["high"] - t["accuracy"]) for t in test.values()],
        ],
        fmt="s",
        capsize=4,
        color="black",
        label="test, greedy",
    )
    sampler = config.sampler
    axes.set_title(clean(f"{config.task.name}: {sampler.name}, budget {sampler.budget}"), parse_math=False)
    axes.set_xlabel("EM iteration (0: base model)")
    axes.set_ylabel("accuracy in %")
    axes.set_xticks(iterations)
    axes.set_ylim(0, 102)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, format="png", metadata={"Software": None})
    pyplot.close(figure)


def plot_spent(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """comparison.png: accuracy against the tokens spent on it, a panel per task, from the runs of `read_comparison`."""
    tasks = list(dict.fromkeys(run["task"] for run in runs))
    figure, panels = _subplots(len(tasks))
    for task, axes in zip(tasks, panels, strict=True):
        _draw_spent([run for run in runs if run["task"] == task], axes)
    figure.savefig(path, format="png", metadata={"Software": None})


def svg_spent(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The panels of `plot_spent` as inline SVG on no background, {title, svg}, for the report."""
    found = []
    for task in dict.fromkeys(run["task"] for run in runs):
        figure, (axes,) = _subplots(1)
        _draw_spent([run for run in runs if run["task"] == task], axes)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
        svg = text.getvalue()
        found.append({"title": f"{task}: accuracy against tokens spent", "svg": svg[svg.index("<svg") :]})
    return found


def _subplots(count: int) -> tuple[Any, list[Any]]:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "minem"  # the same picture gives the same bytes
    figure = Figure(figsize=(6.4 * count, 4.0), dpi=150, layout="tight")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def _draw_spent(runs: Sequence[Mapping[str, Any]], axes: Any) -> None:
    """A thin line per seed and a thick one for their mean, iteration by iteration."""
    for number, sampler in enumerate(dict.fromkeys(run["sampler"] for run in runs)):
        curves = [run["curve"] for run in runs if run["sampler"] == sampler]
        for curve in curves:
            axes.plot(*zip(*_scaled(curve), strict=True), color=f"C{number}", alpha=0.35, linewidth=0.8)
        mean = [
            [sum(values) / len(curves) for values in zip(*points, strict=True)] for points in zip(*curves, strict=True)
        ]
        axes.plot(*zip(*_scaled(mean), strict=True), color=f"C{number}", marker="o", linewidth=2, label=sampler)
    axes.set_title(clean(runs[0]["task"]), parse_math=False)
    axes.set_xlabel("thousand tokens spent in E-steps (points: iterations)")
    axes.set_ylabel("validation accuracy, greedy, in %")
    axes.set_ylim(None, 102)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", title="mean of seeds", frameon=False)


def _scaled(curve: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    return [(tokens / 1000, 100 * accuracy) for tokens, accuracy in curve]
