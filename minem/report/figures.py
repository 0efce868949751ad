"""The numbers of a report: what is averaged over which runs, and what each chart and table shows.

    minem report runs/*             # minem.report.page puts them on a page

Everything is read from `minem.report.reader.Run`: nothing is shown that a run has not measured.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minem.console import percent
from minem.em.diagnostics import EXPLAINED
from minem.report.charts import DASHES, SERIES, Line, Point, draw
from minem.report.reader import Run, changed
from minem.statistics import mcnemar

# title, what it says, the stage and the key in its result
PANELS = (
    ("Accuracy at temperature 1", "Share of right draws on validation: what EM raises.", "eval.validation", "sampled"),
    ("Questions solved", "Share of the training questions with a right draw.", "estep", "solved_share"),
    ("Tokens drawn", "By the E-steps up to each iteration.", "estep", "drawn"),
    ("Accepted attempts", "Share of all attempts that reached the right answer.", "estep", "accepted_share"),
    ("Length of kept rationales", "Mean tokens of what is trained on.", "estep", "kept_length"),
    ("Length of validation answers", "Mean tokens of a greedy answer.", "eval.validation", "tokens"),
)
NO_SHARES = ("kept_length", "tokens", "drawn", "ess", "entropy")  # everything else is a share, shown in percent


# Keys that do not make two runs different experiments.
BESIDE_THE_POINT = {"run.seed", "run.iterations", "run.out", "run.device", "run.slots", "run.keep"}
BESIDE_THE_POINT |= {"eval.diagnostics", "eval.hinted_draws"}
# Inputs beside the config that do: how `minem compare` matched the run with others, and the base model's fingerprint.
ALSO_DECIDE = ("match", "base model")


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone; `number` chooses colour and dashes."""

    number: int
    label: str
    runs: list[Run]

    @property
    def band(self) -> str:
        if len(self.runs) == 1:
            return "one run; the band of its accuracy is the 95 % Wilson interval"
        return f"mean of {len(self.runs)} seeds; the band is one standard deviation between them, either way"


def _task_name(run: Run) -> str:
    return str(run.config["task"].get("name"))


def summary(name: str, run: Run) -> dict[str, Any]:
    """The row of a run in the first table."""
    last, wanted = max(run.iterations, default=0), run.config["run"].get("iterations")
    base, test, flips = run.results.get("iter-00/eval.test"), None, None
    if run.last_test is not None:
        test = run.results[f"iter-{run.last_test:02d}/eval.test"]
        lost, won = (len(ids) for ids in changed(run.answers(0, "test"), run.answers(run.last_test, "test")))
        flips = f"{won} became right, {lost} became wrong", f"{mcnemar(lost, won):.2g}"
    tokens = sum(run.series("estep", "tokens").values())
    return {
        "run": name,
        "sampler": run.sampler,
        "seed": run.config["run"].get("seed"),
        "state": "finished" if test else f"unfinished, in iteration {last} of {wanted}",
        "base": _accuracy(base),
        "test": _accuracy(test),
        "flips": flips[0] if flips else "",
        "p": flips[1] if flips else "",
        "tokens": f"{tokens:,.0f}",
    }


def _accuracy(result: Mapping[str, Any] | None) -> str:
    try:
        return percent(result["accuracy"], (result["low"], result["high"])) if result else ""
    except (KeyError, TypeError):  # of `minem train --samples`, or another version
        return ""


def by_task(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Legend and charts for each of the tasks that the runs are about."""
    tasks = sorted({_task_name(run) for run in runs})
    return [_task_section(task, [run for run in runs if _task_name(run) == task]) for task in tasks]


def _groups(runs: Sequence[Run]) -> list[Group]:
    """Runs by all of their config that decides what happens, the seed apart; labelled by what differs."""
    configs = [
        {
            f"{section}.{key}": value
            for section, values in run.config.items()
            for key, value in values.items()
            if f"{section}.{key}" not in BESIDE_THE_POINT
        }
        | {what: run.facts.get("inputs", {}).get(what) for what in ALSO_DECIDE}
        for run in runs
    ]
    told = {"sampler.name", "sampler.budget"}
    keys = sorted({key for config in configs for key in config} - told)
    differing = [key for key in keys if len({json.dumps(config.get(key)) for config in configs}) > 1]
    grouped: dict[str, list[Run]] = {}
    for run, config in zip(runs, configs, strict=True):
        label = " · ".join([run.sampler, *(f"{key} {_set(config.get(key))}" for key in differing)])
        grouped.setdefault(label, []).append(run)
    return [Group(number, label, members) for number, (label, members) in enumerate(grouped.items())]


def _set(value: Any) -> str:
    return "not set" if value is None else str(value)


def _task_section(task: str, runs: Sequence[Run]) -> dict[str, Any]:
    """Legend and charts of the runs on one task."""
    groups = _groups(runs)
    cost = "The same, over all tokens drawn in E-steps so far, rejected and cancelled ones too."
    charts = [
        _chart(task, groups, "Accuracy", "Greedy, on validation.", _accuracy_points),
        _chart(task, groups, "Accuracy by cost", cost, _by_cost, x_label="tokens drawn"),
        *(_chart(task, groups, title, said, _points_of(stage, key), key) for title, said, stage, key in PANELS),
    ]
    diagnostics = [
        _chart(task, groups, label if "-" in label else label.capitalize(), said, _points_of("diagnostics", key), key)
        for key, (label, said) in EXPLAINED.items()
    ]
    legend = [
        {
            "label": group.label,
            "band": group.band,
            "number": group.number % len(SERIES),
            "dashes": {"-": "", "--": "6 3", ":": "2 2", "-.": "6 2 2 2"}[DASHES[group.number // len(SERIES) % 4]],
        }
        for group in groups
    ]
    return {
        "name": task,
        "legend": legend,
        "charts": [chart for chart in charts if chart],
        "diagnostics": [chart for chart in diagnostics if chart],
    }


def _chart(
    task: str,
    groups: Sequence[Group],
    title: str,
    sentence: str,
    points: Callable[[Group], list[Point]],
    key: str = "accuracy",
    x_label: str = "EM iteration (0: base model)",
) -> dict[str, Any] | None:
    """A chart and the same numbers as a table; None where no run has any."""
    share = key not in NO_SHARES
    lines = {group.label: Line(group.number, points(group)) for group in groups}
    lines = {label: line for label, line in lines.items() if line.points}
    if not lines:
        return None
    rows = [
        [
            label,
            f"{point.x:,.0f}",
            _number(point.value, share),
            f"{_number(point.low, share)} to {_number(point.high, share)}",
        ]
        for label, line in lines.items()
        for point in line.points
    ]
    svg = draw(list(lines.values()), share=share, x_label=x_label, name=f"{task}: {title}")
    return {"title": title, "sentence": sentence, "svg": svg, "x": x_label, "rows": rows}


def _number(value: float, share: bool) -> str:
    return percent(value) if share else f"{value:,.2f}"


def _accuracy_points(group: Group) -> list[Point]:
    """Of one run with its Wilson interval, of several their mean and spread."""
    if len(group.runs) > 1:
        return _points_of("eval.validation", "accuracy")(group)
    value, low, high = (group.runs[0].series("eval.validation", key) for key in ("accuracy", "low", "high"))
    return [Point(i, value[i], low[i], high[i]) for i in value if i in low and i in high]


def _by_cost(group: Group) -> list[Point]:
    """The accuracy of each iteration at the mean number of tokens drawn by then."""
    costs = [_series(run, "estep", "drawn") for run in group.runs]
    points = []
    for point in _accuracy_points(group):
        known = [cost[int(point.x)] for cost in costs if int(point.x) in cost]
        if not point.x or known:
            points.append(Point(statistics.fmean(known) if known else 0.0, point.value, point.low, point.high))
    return points


def _points_of(stage: str, key: str) -> Callable[[Group], list[Point]]:
    """Mean and standard deviation over the runs of a group that have got that far."""

    def points(group: Group) -> list[Point]:
        series = [_series(run, stage, key) for run in group.runs]
        found = []
        for iteration in sorted(set().union(*series)):
            values = [one[iteration] for one in series if iteration in one]
            mean, spread = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
            found.append(Point(iteration, mean, mean - spread, mean + spread))
        return found

    return points


def _series(run: Run, stage: str, key: str) -> dict[int, float]:
    """A number of the journal, or one that follows from several."""
    if key == "drawn":
        total, found = 0.0, {}
        for iteration, tokens in run.series("estep", "tokens").items():
            total += tokens
            found[iteration] = total
        return found
    if key == "solved_share":
        return _ratio(run.series(stage, "solved"), run.series(stage, "questions"))
    if key == "accepted_share":
        accepted = {
            i: run.results[f"iter-{i:02d}/estep"].get("statuses", {}).get("accepted", 0)
            for i in run.series("estep", "attempts")
        }
        return _ratio(accepted, run.series("estep", "attempts"))
    return run.series(stage, key)


def _ratio(above: Mapping[int, float], below: Mapping[int, float]) -> dict[int, float]:
    return {i: above[i] / below[i] for i in above if below.get(i)}


def acceptance_by_stage(run: Run) -> dict[str, Any] | None:
    """Attempts by prompt and number, a column for each iteration, as the diagnostics counted them."""
    counted = {i: run.results.get(f"iter-{i:02d}/diagnostics", {}).get("attempts") for i in run.iterations}
    found = {i: {(one["prompt"], one["attempt"]): one for one in all_} for i, all_ in counted.items() if all_}
    stages = sorted({stage for by_stage in found.values() for stage in by_stage}, key=lambda s: (s[0] != "plain", s[1]))
    if not stages:
        return None

    def cell(one: Mapping[str, Any] | None) -> str:
        return f"{percent(one['accepted'] / one['drawn'])} of {one['drawn']:,}" if one else ""

    rows = [[f"{prompt}, attempt {n}", *(cell(by.get((prompt, n))) for by in found.values())] for prompt, n in stages]
    return {"columns": ["prompt", *(f"iteration {i}" for i in found)], "rows": rows}


def warnings(names: Sequence[str], runs: Sequence[Run]) -> list[str]:
    """What the E- and M-steps of the runs warned of (minem.em.warnings)."""
    return [
        f"{name}, iteration {i}: {sentence}"
        for name, run in zip(names, runs, strict=True)
        for i in run.iterations
        for stage in ("estep", "mstep")
        for sentence in run.results.get(f"iter-{i:02d}/{stage}", {}).get("warnings", ())
    ]


def falls(names: Sequence[str], runs: Sequence[Run]) -> list[str]:
    """Sentences on hinted acceptance that fell."""
    sentences = []
    for name, run in zip(names, runs, strict=True):
        hinted = run.series("diagnostics", "hinted")
        for i, share in hinted.items():
            if run.results[f"iter-{i:02d}/diagnostics"].get("falling") and 1 in hinted:
                sentences.append(
                    f"{name}: from {percent(hinted[1])} in iteration 1 to {percent(share)} in iteration {i}"
                )
    return sentences
