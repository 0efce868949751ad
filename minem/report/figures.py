"""The numbers of a report: what is averaged over which runs, and what each chart and table shows.

minem report runs/*             # minem.report.page puts them on a page; what is not measured is not shown
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from minem.console import percent
from minem.em.diagnostics import EXPLAINED
from minem.report.charts import COLOURS, DASHES, Point, draw
from minem.report.reader import Run
from minem.report.tables import accuracy
from minem.statistics import mcnemar, mean, standard_deviation

BY_COST = "Accuracy by cost"  # the one chart over tokens instead of iterations
EVERY_TOKEN = "The same, over all tokens drawn in E-steps so far, rejected and cancelled ones too."
# Title, sentence, the stage and the key in its result.
CHARTS = (
    ("Accuracy", "Greedy, on validation.", "eval.validation", "accuracy"),
    (BY_COST, EVERY_TOKEN, "eval.validation", "accuracy"),
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
# Keys that do not make two runs different experiments, and the sampler's two, which open the label.
SAME = {"run.seed", "run.iterations", "run.out", "run.device", "run.slots", "run.keep"}
SAME |= {"eval.diagnostics", "eval.hinted_draws", "sampler.name", "sampler.budget"}
# Inputs that do: how `minem compare` matched the run with others, and the base model's fingerprint.
ALSO_DECIDE = ("match", "base model")


@dataclass(frozen=True)
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
        if key == "accuracy" and len(self.runs) == 1:
            results = {i: self.runs[0].result(i, stage) for i in series[0]}
            return [(i, result["accuracy"], result["low"], result["high"]) for i, result in results.items()]
        found: list[Point] = []
        for i in sorted(set().union(*series)):
            values = [one[i] for one in series if i in one]
            centre, spread = mean(values), standard_deviation(values) or 0.0
            found.append((i, centre, centre - spread, centre + spread))
        return found


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


def by_task(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Legend, charts and diagnostics for each of the tasks that the runs are about."""
    tasks, names = [], [str(run.config["task"].get("name")) for run in runs]
    for name in sorted(set(names)):
        groups = _groups([run for run, own in zip(runs, names, strict=True) if own == name])
        tasks.append({"name": name, "legend": [group.legend() for group in groups]})
        for kind, wanted in (("charts", CHARTS), ("diagnostics", DIAGNOSTICS)):
            tasks[-1][kind] = [chart for one in wanted if (chart := _chart(name, groups, *one))]
    return tasks


def _groups(runs: Sequence[Run]) -> list[Group]:
    """Runs by all of their config that decides what happens, except the seed; labelled by what differs."""
    configs = []
    for run in runs:
        config = {f"{section}.{key}": value for section, keys in run.config.items() for key, value in keys.items()}
        configs.append(config | {name: run.facts.get("inputs", {}).get(name) for name in ALSO_DECIDE})
    keys = sorted(set().union(*configs) - SAME)
    differing = [key for key in keys if len({json.dumps(config.get(key)) for config in configs}) > 1]
    grouped: dict[str, list[Run]] = {}
    for run, config in zip(runs, configs, strict=True):
        values = [f"{key} {'not set' if config.get(key) is None else config[key]}" for key in differing]
        grouped.setdefault(" · ".join([run.sampler, *values]), []).append(run)
    return [Group(number, label, members) for number, (label, members) in enumerate(grouped.items())]


def _chart(task: str, groups: Sequence[Group], title: str, text: str, stage: str, key: str) -> dict[str, Any] | None:
    """A chart and the same numbers as a table; None if no run has any."""
    share, x_label, curves, rows = key not in NO_SHARES, "EM iteration (0: base model)", {}, []
    shown = percent if share else "{:,.2f}".format
    for group in groups:
        points = group.points(stage, key)
        if title == BY_COST:
            x_label = "tokens drawn"
            cost = {0.0: 0.0} | {i: tokens for i, tokens, *_ in group.points("estep", "drawn")}  # means over the runs
            points = [(cost[i], value, low, high) for i, value, low, high in points if i in cost]
        if points:
            curves[group.number] = points
        for x, value, low, high in points:
            rows.append([group.label, f"{x:,.0f}", shown(value), f"{shown(low)} to {shown(high)}"])
    if not curves:
        return None
    svg = draw(curves, share, x_label, f"{task}: {title}")
    return {"title": title, "sentence": text, "svg": svg, "x": x_label, "rows": rows}


def _series(run: Run, stage: str, key: str) -> dict[int, float]:
    """A number of the journal, or one that follows from several."""
    if key == "drawn":
        tokens = run.series(stage, "tokens")
        return dict(zip(tokens, accumulate(tokens.values()), strict=True))
    if key == "solved_share":
        return {i: run.result(i, stage)["solved"] / n for i, n in run.series(stage, "questions").items() if n}
    if key == "accepted_share":
        attempts = run.series(stage, "attempts")
        return {i: run.result(i, stage)["statuses"].get("accepted", 0) / n for i, n in attempts.items() if n}
    return run.series(stage, key)


def warnings(name: str, run: Run) -> list[str]:
    """The warnings of a run's stages (minem.em.warnings)."""
    steps = [(i, run.result(i, stage)) for i in run.iterations for stage in ("estep", "diagnostics", "mstep")]
    found = [f"{name}, iteration {i}: {sentence}" for i, result in steps for sentence in result.get("warnings", ())]
    return found + [f"{name}: {sentence}" for sentence in run.stopped]
