"""The numbers of a report: what is averaged over which runs, and what each chart and table shows.

    minem report runs/*             # minem.report.page puts them on a page

Everything is read from `minem.report.reader.Run`; what a run has not measured is not shown.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from minem.console import percent
from minem.em.diagnostics import EXPLAINED
from minem.report.charts import COLOURS, DASHES, Point, draw
from minem.report.reader import Run
from minem.report.tables import accuracy
from minem.statistics import mcnemar, mean, standard_deviation

BY_COST = "Accuracy by cost", "The same, over all tokens drawn in E-steps so far, rejected and cancelled ones too."
# Title, sentence, the stage and the key in its result.
CHARTS = (
    ("Accuracy", "Greedy, on validation.", "eval.validation", "accuracy"),
    (*BY_COST, "eval.validation", "accuracy"),
    ("Accuracy at temperature 1", "Share of right draws on validation: what EM raises.", "eval.validation", "sampled"),
    ("Questions solved", "Share of the training questions with a right draw.", "estep", "solved_share"),
    ("Tokens drawn", "By the E-steps up to each iteration.", "estep", "drawn"),
    ("Accepted attempts", "Share of all attempts that reached the right answer.", "estep", "accepted_share"),
    ("Length of kept rationales", "Mean tokens of what is trained on.", "estep", "kept_length"),
    ("Length of validation answers", "Mean tokens of a greedy answer.", "eval.validation", "tokens"),
)
DIAGNOSTICS = tuple(
    (label if "-" in label else label.capitalize(), sentence, "diagnostics", key)
    for key, (label, sentence) in EXPLAINED.items()
)
NO_SHARES = ("kept_length", "tokens", "drawn", "ess", "entropy")  # everything else is a share, shown in percent
# Keys that do not make two runs different experiments.
BESIDE_THE_POINT = {"run.seed", "run.iterations", "run.out", "run.device", "run.slots", "run.keep"}
BESIDE_THE_POINT |= {"eval.diagnostics", "eval.hinted_draws"}
# Inputs beside the config that do: how `minem compare` matched the run with others, and the base model's fingerprint.
ALSO_DECIDE = ("match", "base model")


@dataclass(frozen=True, eq=False)
class Group:
    """Runs that differ in their seed alone; `number` chooses colour and dashes."""

    number: int
    label: str
    runs: list[Run]

    def legend(self) -> dict[str, Any]:
        band = "one run; the band of its accuracy is the 95 % Wilson interval"
        if len(self.runs) > 1:
            band = f"mean of {len(self.runs)} seeds; the band is one standard deviation between them, either way"
        dashes = {"-": "", "--": "6 3", ":": "2 2", "-.": "6 2 2 2"}[DASHES[self.number // len(COLOURS) % len(DASHES)]]
        return {"label": self.label, "band": band, "number": self.number % len(COLOURS), "dashes": dashes}

    def points(self, stage: str, key: str) -> list[Point]:
        """Mean and standard deviation over the runs that have got that far; the Wilson interval of one accuracy."""
        series = [_series(run, stage, key) for run in self.runs]
        found = []
        for iteration in sorted(set().union(*series)):
            values = [one[iteration] for one in series if iteration in one]
            centre, spread = mean(values), standard_deviation(values) or 0.0
            bounds = centre - spread, centre + spread
            if key == "accuracy" and len(self.runs) == 1:
                result = self.runs[0].result(iteration, stage)
                bounds = result["low"], result["high"]
            found.append(Point(iteration, centre, *bounds))
        return found

    def by_cost(self, points: Sequence[Point]) -> list[Point]:
        """The points of iterations at the mean number of tokens drawn by then."""
        cost = {0.0: 0.0} | {point.x: point.value for point in self.points("estep", "drawn")}
        return [point._replace(x=cost[point.x]) for point in points if point.x in cost]


def summary(name: str, run: Run) -> dict[str, Any]:
    """The row of a run in the first table."""
    last, wanted, tested = max(run.iterations, default=0), run.config["run"].get("iterations"), run.last_test
    base, test = run.result(0, "eval.test"), run.result(tested or 0, "eval.test")
    lost, won = map(len, run.flips)
    return {
        "run": name,
        "sampler": run.sampler,
        "seed": run.config["run"].get("seed"),
        "state": "finished" if tested else f"unfinished, in iteration {last} of {wanted}",
        "base": accuracy(base) if base else "",
        "test": accuracy(test) if tested else "",
        "flips": f"{won} became right, {lost} became wrong" if tested else "",
        "p": f"{mcnemar(lost, won):.2g}" if tested else "",
        "tokens": f"{sum(run.series('estep', 'tokens').values()):,.0f}",
    }


def by_task(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """Legend, charts and diagnostics for each of the tasks that the runs are about."""
    by_name: dict[str, list[Run]] = {}
    for run in runs:
        by_name.setdefault(str(run.config["task"].get("name")), []).append(run)
    return [
        {
            "name": name,
            "legend": [group.legend() for group in groups],
            "charts": [chart for one in CHARTS if (chart := _chart(name, groups, *one))],
            "diagnostics": [chart for one in DIAGNOSTICS if (chart := _chart(name, groups, *one))],
        }
        for name in sorted(by_name)
        for groups in [_groups(by_name[name])]
    ]


def _groups(runs: Sequence[Run]) -> list[Group]:
    """Runs by all of their config that decides what happens, except the seed; labelled by what differs."""
    configs = []
    for run in runs:
        config = {f"{section}.{key}": value for section, keys in run.config.items() for key, value in keys.items()}
        inputs = {name: run.facts.get("inputs", {}).get(name) for name in ALSO_DECIDE}
        configs.append({key: value for key, value in config.items() if key not in BESIDE_THE_POINT} | inputs)
    keys = sorted({key for config in configs for key in config} - {"sampler.name", "sampler.budget"})
    differing = [key for key in keys if len({json.dumps(config.get(key)) for config in configs}) > 1]
    grouped: dict[str, list[Run]] = {}
    for run, config in zip(runs, configs, strict=True):
        values = [f"{key} {'not set' if config.get(key) is None else config[key]}" for key in differing]
        grouped.setdefault(" · ".join([run.sampler, *values]), []).append(run)
    return [Group(number, label, members) for number, (label, members) in enumerate(grouped.items())]


def _chart(task: str, groups: Sequence[Group], title: str, text: str, stage: str, key: str) -> dict[str, Any] | None:
    """A chart and the same numbers as a table; None if no run has any."""
    share, x_label = key not in NO_SHARES, "EM iteration (0: base model)"
    curves = {group: group.points(stage, key) for group in groups}
    if (title, text) == BY_COST:
        x_label = "tokens drawn"
        curves = {group: group.by_cost(points) for group, points in curves.items()}
    curves = {group: points for group, points in curves.items() if points}
    if not curves:
        return None

    def shown(value: float) -> str:
        return percent(value) if share else f"{value:,.2f}"

    rows = [
        [group.label, f"{point.x:,.0f}", shown(point.value), f"{shown(point.low)} to {shown(point.high)}"]
        for group, points in curves.items()
        for point in points
    ]
    svg = draw({group.number: points for group, points in curves.items()}, share, x_label, f"{task}: {title}")
    return {"title": title, "sentence": text, "svg": svg, "x": x_label, "rows": rows}


def _series(run: Run, stage: str, key: str) -> dict[int, float]:
    """A number of the journal, or one that follows from several."""
    if key == "drawn":
        tokens = run.series(stage, "tokens")
        return dict(zip(tokens, accumulate(tokens.values()), strict=True))
    if key == "solved_share":
        return _ratio(run.series(stage, "solved"), run.series(stage, "questions"))
    if key == "accepted_share":
        attempts = run.series(stage, "attempts")
        return _ratio({i: run.result(i, stage)["statuses"].get("accepted", 0) for i in attempts}, attempts)
    return run.series(stage, key)


def _ratio(above: Mapping[int, float], below: Mapping[int, float]) -> dict[int, float]:
    return {i: above[i] / below[i] for i in above if below.get(i)}


def acceptance_by_stage(name: str, run: Run) -> dict[str, Any] | None:
    """Attempts by prompt and number, a column for each iteration, as the diagnostics counted them."""
    counted = {i: run.result(i, "diagnostics").get("attempts") for i in run.iterations}
    found = {i: {(one["prompt"], one["attempt"]): one for one in all_} for i, all_ in counted.items() if all_}
    stages = sorted({stage for by_stage in found.values() for stage in by_stage}, key=lambda s: (s[0] != "plain", s[1]))

    def cell(one: Mapping[str, Any] | None) -> str:
        return f"{percent(one['accepted'] / one['drawn'])} of {one['drawn']:,}" if one else ""

    rows = [[f"{prompt}, attempt {n}", *(cell(by.get((prompt, n))) for by in found.values())] for prompt, n in stages]
    return {"name": name, "columns": ["prompt", *(f"iteration {i}" for i in found)], "rows": rows} if rows else None


def warnings(name: str, run: Run) -> list[str]:
    """The warnings of a run's E- and M-steps (minem.em.warnings)."""
    steps = [(i, run.result(i, stage)) for i in run.iterations for stage in ("estep", "mstep")]
    return [f"{name}, iteration {i}: {sentence}" for i, result in steps for sentence in result.get("warnings", ())]


def falls(name: str, run: Run) -> list[str]:
    """Sentences on hinted acceptance that fell."""
    hinted = run.series("diagnostics", "hinted")
    fell = [i for i in hinted if run.result(i, "diagnostics").get("falling") and 1 in hinted]
    return [f"{name}: from {percent(hinted[1])} in iteration 1 to {percent(hinted[i])} in iteration {i}" for i in fell]
