"""What a comparison of samplers says: a pure function of its run directories, as numbers, tables and pictures.

    minem compare --samplers rsm:8,star:2,pps:1 --seeds 0,1,2      # ends with these tables; see minem/compare/experiment.py

The outcome, declared before any run: accuracy of the last model on the test split, greedy. Samplers are compared
within a seed, where base model, questions and random streams are the same, and the differences of all seeds make a
t-interval. McNemar's test says whether two checkpoints differ; pooled over seeds it would find samplers different far
too often when they are the same, so it is told per seed. Holm's correction is over all pairs of samplers and all tasks
of the command.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, combinations
from pathlib import Path
from typing import Any, Literal

from minem.files import read_rows
from minem.generation.request import stream_seed
from minem.runs.directory import read_facts, read_journal
from minem.statistics import holm, mcnemar, paired_t, standard_deviation
from minem.text import clean

Match = Literal["none", "kept", "cost"]
STEPS = re.compile(r"/(estep|mstep)(\.\d+)?$")  # stages whose time counts; a long E-step is done in numbered blocks
ENOUGH_SEEDS = 5  # with fewer a table describes its runs and supports no claim about samplers


@dataclass(frozen=True)
class Cell:
    """One run of the comparison."""

    task: str
    sampler: str  # name and budget, as in "rsm:8"
    seed: int
    folder: Path


@dataclass(frozen=True)
class Share:
    """What a run trains on in one iteration of a matched comparison."""

    questions: frozenset[str]  # ids of those that count
    rows: frozenset[tuple[str, int]]  # (question id, attempt) of accepted rows
    tokens: int  # drawn in the decided attempts at the questions that count


def matched(group: Sequence[Cell], iteration: int, match: Match) -> list[Share]:
    """The share of each run in a group (one task, one seed), from the E-steps that all of them have finished.

    Questions come in a random order, the same for the whole group, fixed by seed, iteration and id.
    "kept": every run takes its first n accepted rows in that order, n being the fewest that a run of the group has.
    "cost": every run takes the questions, in that order, whose attempts fit into the tokens of the thriftiest run of
        the group, and the accepted rows among them. As questions are drawn independently of each other, that is what
        an E-step over these questions alone would have found; it is equal up to the attempts at one question. Tokens
        drawn ahead of time and cancelled belong to the schedule, not to the sampler, and are not counted here.
    """
    costs, accepted = [], []
    for cell in group:
        folder = cell.folder / f"iter-{iteration:02d}"
        cost: Counter[str] = Counter()
        for row in read_rows(folder / "samples.jsonl"):
            cost[row["id"]] += len(row["token_ids"])
        costs.append(cost)
        accepted.append([(row["id"], row["attempt"]) for row in read_rows(folder / "accepted.jsonl")])
    place = {question: stream_seed(group[0].seed, "match", iteration, question) for cost in costs for question in cost}
    fewest, allowance = min(map(len, accepted)), min(cost.total() for cost in costs)
    shares = []
    for cost, rows in zip(costs, accepted, strict=True):
        rows.sort(key=lambda row: (place[row[0]], row[1]))
        questions = list(cost)
        if match == "kept":
            rows = rows[:fewest]
        else:
            questions.sort(key=place.__getitem__)
            spent = accumulate(cost[question] for question in questions)
            questions = questions[: sum(tokens <= allowance for tokens in spent)]
            counted = set(questions)
            rows = [row for row in rows if row[0] in counted]
        shares.append(Share(frozenset(questions), frozenset(rows), sum(cost[question] for question in questions)))
    return shares


def read_run(cell: Cell, group: Sequence[Cell], match: Match) -> dict[str, Any]:
    """The numbers of one finished run: accuracies, the parts of its gain, its costs and its curve."""
    lines = {line["stage"]: line for line in read_rows(cell.folder / "journal.jsonl")}
    iterations = range(1, read_facts(cell.folder)["config"]["run"]["iterations"] + 1)
    result = {stage: line["result"] for stage, line in lines.items()}
    esteps = [result[f"iter-{i:02d}/estep"] for i in iterations]
    msteps = [result[f"iter-{i:02d}/mstep"] for i in iterations]
    kept = sum(e["kept"] for e in esteps)
    attempts = sum(e["attempts"] for e in esteps)
    if match == "cost":
        spent = [matched(group, i, match)[group.index(cell)].tokens for i in iterations]
    else:
        spent = [e["tokens"] for e in esteps]
    base, last = result["iter-00/eval.test"], result[f"iter-{iterations[-1]:02d}/eval.test"]
    return {
        "run": cell.folder.name,
        "task": cell.task,
        "sampler": cell.sampler,
        "seed": cell.seed,
        "n": last["n"],
        "base": base["accuracy"],
        "accuracy": last["accuracy"],
        "sampled": last["sampled"],
        **_gain(cell.folder, iterations[-1]),
        "accepted_share": sum(e["statuses"].get("accepted", 0) for e in esteps) / attempts,
        "attempts": attempts,
        "kept": kept,
        "trained": sum(m["examples"] for m in msteps),
        "steps": sum(m["steps"] for m in msteps),
        "kept_length": sum((e["kept_length"] or 0) * e["kept"] for e in esteps) / kept,
        "tokens": sum(e["tokens"] for e in esteps),
        "cancelled_tokens": sum(e["cancelled_tokens"] for e in esteps),
        "prefill_tokens": _total([e.get("prefill_tokens") for e in esteps]),
        "counted_tokens": sum(spent),
        "seconds": sum(line["seconds"] for stage, line in lines.items() if STEPS.search(stage)),
        "curve": [
            [sum(spent[:i]), result[f"iter-{i:02d}/eval.validation"]["accuracy"]] for i in range(len(iterations) + 1)
        ],
    }


def _gain(folder: Path, last: int) -> dict[str, float]:
    """Of what kind the change from the base to the last model is; gain = format + reasoning - lost, as shares."""
    before, after = _statuses(folder, 0), _statuses(folder, last)
    changes = [(before[i], after[i]) for i in before]
    won = [old for old, new in changes if new == "accepted" != old]
    lost = sum(old == "accepted" != new for old, new in changes)
    reasoning = won.count("wrong")
    n = len(changes)
    return {
        "gain": (len(won) - lost) / n,
        "format": (len(won) - reasoning) / n,
        "reasoning": reasoning / n,
        "lost": lost / n,
    }


def _statuses(folder: Path, iteration: int) -> dict[str, str]:
    rows = read_rows(folder / f"iter-{iteration:02d}" / "eval.test.jsonl")
    return {row["id"]: row["status"] for row in rows}


def _total(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def finished(cell: Cell) -> bool:
    """Whether the run has all that `read_run` reads."""
    journal = read_journal(cell.folder)
    if not journal:
        return False
    last = read_facts(cell.folder)["config"]["run"]["iterations"]
    return f"iter-{last:02d}/eval.test" in journal


def compare_pairs(cells: Sequence[Cell], runs: Mapping[Cell, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every pair of samplers on every task, over the seeds that both have finished, with Holm's correction over all.

    A pair without a p-value (fewer than two seeds, or no spread) counts in the correction, as a p-value of 1.
    """
    pairs: list[dict[str, Any]] = []
    for task in dict.fromkeys(cell.task for cell in cells):
        of = {(c.sampler, c.seed): c for c in cells if c.task == task and c in runs}
        seeds = list(dict.fromkeys(c.seed for c in cells))
        for first, second in combinations(dict.fromkeys(c.sampler for c in cells), 2):
            both = [seed for seed in seeds if (first, seed) in of and (second, seed) in of]
            tests = {seed: _mcnemar(of[first, seed], of[second, seed]) for seed in both}
            # From counts: where equally many questions differ, the differences are equal to the last bit.
            differences = [
                (test["only_first"] - test["only_second"]) / runs[of[first, seed]]["n"] for seed, test in tests.items()
            ]
            pairs.append(
                {
                    "task": task,
                    "first": first,
                    "second": second,
                    "differences": dict(zip(map(str, both), differences, strict=True)),
                    "interval": asdict(paired_t(differences)) if both else None,
                    "mcnemar": {str(seed): test for seed, test in tests.items()},
                }
            )
    raw = [pair["interval"]["p_value"] if pair["interval"] else None for pair in pairs]
    for pair, p, adjusted in zip(pairs, raw, holm([1.0 if p is None else p for p in raw]), strict=True):
        pair["holm_p"] = None if p is None else adjusted
    return pairs


def _mcnemar(first: Cell, second: Cell) -> dict[str, Any]:
    last = (read_facts(cell.folder)["config"]["run"]["iterations"] for cell in (first, second))
    one, two = (_statuses(cell.folder, i) for cell, i in zip((first, second), last, strict=True))
    only_first = sum(one[i] == "accepted" != two[i] for i in one)
    only_second = sum(two[i] == "accepted" != one[i] for i in one)
    return {"only_first": only_first, "only_second": only_second, "p": mcnemar(only_first, only_second)}


def read_comparison(cells: Sequence[Cell], match: Match) -> dict[str, Any]:
    """All numbers of the comparison and its tables, from the runs that are finished: what comparison.json holds."""
    groups = {cell: [c for c in cells if (c.task, c.seed) == (cell.task, cell.seed)] for cell in cells}
    complete = [cell for cell in cells if finished(cell)]
    if match != "none":  # whose shares can be told only where the whole group is there
        complete = [cell for cell in complete if all(map(finished, groups[cell]))]
    runs = {cell: read_run(cell, groups[cell], match) for cell in complete}
    pairs = compare_pairs(cells, runs)
    samplers = [
        _summary(task, sampler, [run for run in runs.values() if (run["task"], run["sampler"]) == (task, sampler)])
        for task in dict.fromkeys(cell.task for cell in cells)
        for sampler in dict.fromkeys(cell.sampler for cell in cells)
    ]
    comparison = {
        "match": match,
        "unfinished": [cell.folder.name for cell in cells if cell not in runs],
        "samplers": [summary for summary in samplers if summary["seeds"]],
        "pairs": pairs,
        "runs": list(runs.values()),
    }
    return {**comparison, "tables": tables(comparison)}


def _summary(task: str, sampler: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean of each number over the seeds, and the standard deviation of the accuracy; None where a run lacks it."""
    means = {key: _mean([run[key] for run in runs]) for key in runs[0] if key not in NOT_AVERAGED} if runs else {}
    spread = standard_deviation([run["accuracy"] for run in runs])
    return {"task": task, "sampler": sampler, "seeds": [run["seed"] for run in runs], **means, "spread": spread}


NOT_AVERAGED = ("run", "task", "sampler", "seed", "curve")


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if len(known) == len(values) else None


# ------------------------------------------------------------------------------------------------------ tables


def tables(comparison: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tables for people, each {title, note, columns, rows of texts}; one task alone moves into the titles."""
    made = [f(comparison) for f in (_accuracy_table, _cost_table, _pair_table, _mcnemar_table)]
    made = [table for table in made if table["rows"]]  # one sampler alone has no pairs
    tasks = {row[0] for table in made for row in table["rows"]}
    if len(tasks) == 1:
        for table in made:
            table["title"] = f"{min(tasks)}: {table['title']}"
            table["columns"], table["rows"] = table["columns"][1:], [row[1:] for row in table["rows"]]
    return made


def _points(share: float | None, signed: bool = False) -> str:
    if share is None:
        return "-"
    points = round(100 * share, 1) + 0.0  # no -0.0
    return f"{points:+.1f}" if signed else f"{points:.1f}"


def _p(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}" if value >= 1e-15 else "<1e-15"


def _accuracy_table(comparison: Mapping[str, Any]) -> dict[str, Any]:
    rows = []
    for s in comparison["samplers"]:
        spread = "" if s["spread"] is None else f" ± {_points(s['spread'])}"
        row = [s["task"], s["sampler"], str(len(s["seeds"])), _points(s["base"]), _points(s["accuracy"]) + spread]
        row += [_points(s["sampled"]), _points(s["gain"], signed=True), _points(s["format"], signed=True)]
        rows.append([*row, _points(s["reasoning"], signed=True), _points(-s["lost"], signed=True)])
    missing = ", ".join(comparison["unfinished"])
    return {
        "title": "accuracy on the test split, in %",
        "note": (
            "Greedy, mean over seeds ± their standard deviation. The gain over the base model is made of format "
            "(unparsed or truncated before, right now), reasoning (wrong before, right now) and lost (right before, "
            "not now)." + (f" NOT IN ANY TABLE, for they did not finish: {missing}." if missing else "")
        ),
        "columns": [
            "task",
            "sampler",
            "seeds",
            "base",
            "last, greedy",
            "last, temperature 1",
            "gain",
            "format",
            "reasoning",
            "lost",
        ],
        "rows": rows,
    }


def _cost_table(comparison: Mapping[str, Any]) -> dict[str, Any]:
    counted = comparison["match"] == "cost"
    rows = []
    for s in comparison["samplers"]:
        prefill = "-" if s["prefill_tokens"] is None else f"{s['prefill_tokens']:,.0f}"
        row = [s["task"], s["sampler"], f"{s['attempts']:,.0f}", f"{_points(s['accepted_share'])} %"]
        row += [f"{s['kept']:,.0f}", f"{s['trained']:,.0f}", f"{s['steps']:,.0f}", f"{s['kept_length']:.1f}"]
        row += [f"{s['tokens']:,.0f}", *([f"{s['counted_tokens']:,.0f}"] if counted else [])]
        rows.append([*row, f"{s['cancelled_tokens']:,.0f}", prefill, f"{s['seconds']:.0f} s"])
    note = {
        "none": " Not matched: samplers train on as many examples as they find, and take as many steps as those need.",
        "kept": " Matched by kept examples: in each iteration all samplers of a seed train on equally many of them.",
        "cost": " Matched by cost: in each iteration all samplers of a seed train on what the tokens of the thriftiest "
        "find; those are the tokens that count.",
    }[comparison["match"]]
    return {
        "title": "what it cost, all iterations together, mean per run",
        "note": (
            "Tokens are all that the E-steps generated, those of rejected and of cancelled attempts too; prefill are "
            "those of prompts that were read. Length is tokens per kept rationale. Time is that of E- and M-steps."
            f"{note}"
        ),
        "columns": [
            "task",
            "sampler",
            "attempts",
            "accepted",
            "kept",
            "trained on",
            "steps",
            "length",
            "tokens",
            *(["that count"] if counted else []),
            "cancelled",
            "prefill",
            "time",
        ],
        "rows": rows,
    }


def _pair_table(comparison: Mapping[str, Any]) -> dict[str, Any]:
    rows, fewest = [], ENOUGH_SEEDS
    for pair in comparison["pairs"]:
        interval = pair["interval"] or {"n": 0, "mean": None, "low": None, "p_value": None}
        fewest = min(fewest, interval["n"])
        each = " ".join(_points(d, signed=True) for d in pair["differences"].values())
        span = "-"
        if interval["low"] is not None:
            span = f"{_points(interval['low'], signed=True)} to {_points(interval['high'], signed=True)}"
        row = [pair["task"], f"{pair['first']} - {pair['second']}", each or "-", _points(interval["mean"], signed=True)]
        rows.append([*row, span, _p(interval["p_value"]), _p(pair["holm_p"])])
    note = (
        "Differences of test accuracy between two samplers with the same seed, in points, with Student's 95 % "
        f"interval of their mean. Holm's correction is over the {len(rows)} comparisons of this command. They speak of "
        "repeating the training of this base model on these questions, not of other models or questions."
    )
    if fewest < ENOUGH_SEEDS:
        note = f"DESCRIPTIVE ONLY: claims about samplers need {ENOUGH_SEEDS} seeds or more, here are {fewest}. {note}"
    columns = ["task", "pair", "per seed", "mean", "95 % interval", "p", "p, Holm"]
    return {"title": "paired differences", "note": note, "columns": columns, "rows": rows}


def _mcnemar_table(comparison: Mapping[str, Any]) -> dict[str, Any]:
    seeds = list(dict.fromkeys(seed for pair in comparison["pairs"] for seed in pair["mcnemar"]))

    def cell(test: Mapping[str, Any] | None) -> str:
        return "-" if test is None else f"{test['only_first']} : {test['only_second']} (p {_p(test['p'])})"

    rows = [
        [pair["task"], f"{pair['first']} - {pair['second']}", *(cell(pair["mcnemar"].get(seed)) for seed in seeds)]
        for pair in comparison["pairs"]
    ]
    return {
        "title": "McNemar's test, seed by seed",
        "note": (
            "Questions that only the first : only the second of two checkpoints gets right. A small p says that "
            "these two checkpoints differ, not that the samplers do; it must not be pooled over seeds."
        ),
        "columns": ["task", "pair", *(f"seed {seed}" for seed in seeds)],
        "rows": rows,
    }


def markdown(comparison: Mapping[str, Any]) -> str:
    """The tables as Markdown."""
    parts = []
    for table in comparison["tables"]:
        lines = [table["columns"], ["---"] * len(table["columns"]), *table["rows"]]
        cells = [[clean(str(cell)).replace("|", "\\|") for cell in line] for line in lines]
        body = "\n".join("| " + " | ".join(line) + " |" for line in cells)
        parts.append(f"### {clean(table['title'])}\n\n{clean(table['note'])}\n\n{body}\n")
    return "\n".join(parts).replace("<", "&lt;")
