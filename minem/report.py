"""The report: one HTML file about one run or many, which needs nothing but a browser.

    minem report runs/toy.rsm8.toy-llama.s0 -o report.html

A pure reader of run directories, unfinished ones too. Runs that differ in nothing but their seed are one line of each
chart. The page is minem/page.html, .css and .js; texts of models and files reach it as JSON and as text nodes, never as
HTML, and its content security policy lets no script run but its own and nothing be fetched.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import minem
from minem.charts import DASHES, SERIES, Line, Point, draw, themed
from minem.diagnostics import EXPLAINED, FALLING_RULE
from minem.errors import UserError
from minem.progress import percent, visible
from minem.reader import Choice, Run, read_run
from minem.statistics import mcnemar

MOST_SAMPLES = 2_000  # rows of samples.jsonl in a page
MOST_FLIPS = 200
CHARACTERS = 2_000_000  # of their texts, in all
TEXT_LIMIT = 10_000  # characters of one text
PAGE = Path(__file__).parent

# title, what it says, the stage and the key in its result
PANELS = (
    ("Accuracy at temperature 1", "Share of right draws on validation: what EM raises.", "eval.validation", "sampled"),
    ("Questions solved", "Share of the training questions with a right draw.", "estep", "solved_share"),
    ("Accepted attempts", "Share of all attempts that reached the right answer.", "estep", "accepted_share"),
    ("Length of kept rationales", "Mean tokens of what is trained on.", "estep", "kept_length"),
    ("Length of validation answers", "Mean tokens of a greedy answer.", "eval.validation", "tokens"),
)
NO_SHARES = ("kept_length", "tokens", "drawn", "ess", "entropy")  # everything else is a share, shown in percent


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


def write_report(runs: Sequence[Path], out: Path, comparison: Mapping[str, Any] | None = None) -> None:
    """Write the report on these run directories.

    comparison: of `minem compare`: "tables" (a list of {title, note, columns, rows}) and "plots" (of {title, svg}) are
        shown before all else, where they are there.
    Raises UserError for what is no run directory, or a file that cannot be written.
    """
    page = render([read_run(path) for path in runs], comparison or {})
    partial = out.with_name(f".partial.{out.name}")
    try:
        partial.write_text(page, encoding="utf-8")
        os.replace(partial, out)
    except OSError as error:
        raise UserError(f"the report {out} cannot be written: {error.strerror or error}") from error


def render(runs: Sequence[Run], comparison: Mapping[str, Any]) -> str:
    """The page as a text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(PAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["visible"] = lambda value: visible(str(value))
    names = _names(runs)
    script = (PAGE / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    tasks = sorted({_task_name(run) for run in runs})
    return environment.get_template("page.html").render(
        title=names[0] if len(runs) == 1 else f"{len(runs)} runs",
        version=minem.__version__,
        style=(PAGE / "page.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=f"sha256-{digest}",
        tables=[_comparison_table(table) for table in comparison.get("tables") or ()],
        plots=[
            {"title": plot["title"], "svg": themed(plot["svg"], f"comparison {number} {plot['title']}")}
            for number, plot in enumerate(comparison.get("plots") or ())
        ],
        summary=[_summary(name, run) for name, run in zip(names, runs, strict=True)],
        tasks=[_task_section(task, [run for run in runs if _task_name(run) == task]) for task in tasks],
        stages=[
            {"name": name, **stages}
            for name, run in zip(names, runs, strict=True)
            if (stages := _acceptance_by_stage(run))
        ],
        falls=_falls(names, runs),
        falling_rule=FALLING_RULE,
        runs=[_reproduction(name, run) for name, run in zip(names, runs, strict=True)],
        data=_for_script(_browsers(names, runs)),
    )


# ------------------------------------------------------------------------------------------------------ the numbers


def _names(runs: Sequence[Run]) -> list[str]:
    """The folders' names, or their whole paths where two have the same name."""
    names = [run.name for run in runs]
    return [run.name if names.count(run.name) == 1 else str(run.path) for run in runs]


def _task_name(run: Run) -> str:
    return str(run.config["task"].get("name"))


def _summary(name: str, run: Run) -> dict[str, Any]:
    """The row of a run in the first table."""
    last, wanted = max(run.iterations, default=0), run.config["run"].get("iterations")
    base, test, flips = run.results.get("iter-00/eval.test"), None, None
    if run.last_test is not None:
        test = run.results[f"iter-{run.last_test:02d}/eval.test"]
        lost, won = (len(ids) for ids in _flipped(run))
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


def _groups(runs: Sequence[Run]) -> list[Group]:
    """Runs by all of their config that decides what happens, the seed apart; labelled by what differs."""
    configs = [
        {
            f"{section}.{key}": value
            for section, values in run.config.items()
            for key, value in values.items()
            if (section, key) not in {("run", name) for name in ("seed", "out", "device", "slots", "keep")}
        }
        for run in runs
    ]
    told = {"sampler.name", "sampler.budget"}
    keys = sorted({key for config in configs for key in config} - told)
    differing = [key for key in keys if len({json.dumps(config.get(key)) for config in configs}) > 1]
    grouped: dict[str, list[Run]] = {}
    for run, config in zip(runs, configs, strict=True):
        label = " · ".join([run.sampler, *(f"{key} = {config.get(key)}" for key in differing)])
        grouped.setdefault(label, []).append(run)
    return [Group(number, label, members) for number, (label, members) in enumerate(grouped.items())]


def _task_section(task: str, runs: Sequence[Run]) -> dict[str, Any]:
    """Legend and charts of the runs on one task."""
    groups = _groups(runs)
    charts = [_chart(task, groups, "Accuracy", "Greedy, on validation.", _accuracy_points)]
    charts.append(
        _chart(
            task,
            groups,
            "Accuracy by cost",
            "The same, over all tokens drawn in E-steps so far, rejected and cancelled ones too.",
            _by_cost,
            x_label="tokens drawn",
        )
    )
    for title, sentence, stage, key in PANELS:
        charts.append(_chart(task, groups, title, sentence, _points_of(stage, key), share=key not in NO_SHARES))
    charts.insert(
        4,
        _chart(
            task, groups, "Tokens drawn", "By the E-steps up to each iteration.", _points_of("estep", "drawn"), False
        ),
    )
    diagnostics = [
        _chart(task, groups, label[0].upper() + label[1:], said, _points_of("diagnostics", key), key not in NO_SHARES)
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
    share: bool = True,
    x_label: str = "EM iteration (0: base model)",
) -> dict[str, Any] | None:
    """A chart and the same numbers as a table; None where no run has any."""
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


def _acceptance_by_stage(run: Run) -> dict[str, Any] | None:
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


def _falls(names: Sequence[str], runs: Sequence[Run]) -> list[str]:
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


def _comparison_table(table: Mapping[str, Any]) -> dict[str, Any]:
    return {key: table.get(key) or "" for key in ("title", "note")} | {
        "columns": list(table.get("columns") or ()),
        "rows": [["" if cell is None else cell for cell in row] for row in table.get("rows") or ()],
    }


def _reproduction(name: str, run: Run) -> dict[str, Any]:
    """What it takes to do a run again."""
    facts, command = run.facts, run.facts.get("command")
    config = run.path / "config.toml"
    return {
        "name": name,
        "path": str(run.path),
        "command": shlex.join(["minem", *map(str, command[1:])]) if isinstance(command, list) and command else "",
        "again": shlex.join(["minem", "train", str(config), "--out", "NEW"]),
        "config": config.read_text(encoding="utf-8", errors="replace") if config.exists() else "",
        "facts": {
            "started": facts.get("started"),
            "minem's commit": facts.get("commit") or "not known",
            "platform": facts.get("platform"),
            "versions": ", ".join(f"{package} {version}" for package, version in (facts.get("versions") or {}).items()),
            **{f"{what}, SHA-256": digest for what, digest in (facts.get("inputs") or {}).items()},
        },
    }


# --------------------------------------------------------------------------------------------------- the two browsers


def _flipped(run: Run) -> tuple[list[str], list[str]]:
    """Ids of the test questions that the base model had right and the last one has not, and the other way round."""
    assert run.last_test is not None
    base, last = ({i: r["status"] == "accepted" for i, r in run.answers(n, "test").items()} for n in (0, run.last_test))
    both = [id_ for id_ in base if id_ in last]
    return [i for i in both if base[i] and not last[i]], [i for i in both if last[i] and not base[i]]


class _Texts:
    """Texts that many rows share, each kept once; a row has its number."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def number(self, text: str | None) -> int | None:
        return None if text is None else self.numbers.setdefault(_shortened(text), len(self.numbers))


def _shortened(text: str) -> str:
    rest = len(text) - TEXT_LIMIT
    return visible(text) if rest <= 0 else f"{visible(text[:TEXT_LIMIT])} … ({rest:,} more characters)"


def _browsers(names: Sequence[str], runs: Sequence[Run]) -> dict[str, Any]:
    """What the page's script shows: samples, and test answers that changed."""
    choice = Choice(MOST_SAMPLES, CHARACTERS)
    for number, run in enumerate(runs):
        for row in run.samples():
            choice.add(number, row)
    prompts = _Texts()
    samples = [_sample(number, row, runs[number], prompts) for number, row in choice.chosen()]
    flips, total = _flips(runs, prompts)
    return {
        "runs": [visible(name) for name in names],
        "notes": sorted({visible(run.task) for run in runs if isinstance(run.task, str)}),
        "prompts": list(prompts.numbers),
        "samples": samples,
        "samples_total": choice.seen,
        "flips": flips,
        "flips_total": total,
    }


def _sample(number: int, row: Mapping[str, Any], run: Run, prompts: _Texts) -> dict[str, Any]:
    return {
        "run": number,
        "iteration": row["iteration"],
        "attempt": row["attempt"],
        "id": visible(row["id"]),
        "kind": visible(row["prompt"]),
        "status": visible(row["status"]),
        "leak": bool(row.get("leak")),
        "answer": _or_none(row.get("answer")),
        "gold": _or_none(row.get("gold")),
        "tokens": len(row["token_ids"]),
        "logq": _finite(row.get("logprob_q")),
        "logp": _finite(row.get("logprob_plain")),
        "text": _shortened(row["text"]),
        "prompt": prompts.number(run.prompt(row["id"], row["prompt"])),
    }


def _flips(runs: Sequence[Run], prompts: _Texts) -> tuple[list[dict[str, Any]], int]:
    """Answers that changed, as many of each run, and how many there are in all."""
    finished = [(number, run) for number, run in enumerate(runs) if run.last_test is not None]
    flips, total = [], 0
    for number, run in finished:
        base, last = run.answers(0, "test"), run.answers(run.last_test or 0, "test")
        lost, won = _flipped(run)
        total += len(lost) + len(won)
        share = max(2, MOST_FLIPS // len(finished))
        shown_lost = lost[: max(share // 2, share - len(won))]
        for id_ in [*shown_lost, *won[: share - len(shown_lost)]]:
            flips.append(
                {
                    "run": number,
                    "id": visible(id_),
                    "kind": "became wrong" if base[id_]["status"] == "accepted" else "became right",
                    "gold": _or_none(base[id_].get("gold")),
                    "before": _shortened(base[id_]["text"]),
                    "after": _shortened(last[id_]["text"]),
                    "answers": [_or_none(base[id_].get("answer")), _or_none(last[id_].get("answer"))],
                    "statuses": [visible(base[id_]["status"]), visible(last[id_]["status"])],
                    "prompt": prompts.number(run.prompt(id_, split="test")),
                }
            )
    return flips, total


def _or_none(value: Any) -> str | None:
    return None if value is None else visible(str(value))


def _finite(value: Any) -> float | None:
    return round(value, 3) if isinstance(value, int | float) and abs(value) < 1e9 else None


def _for_script(data: Any) -> str:
    """JSON that can stand inside a <script>: nothing in it can end the element, begin another, or end a line."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode("utf-8", "replace").decode()
