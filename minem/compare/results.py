"""What a comparison of samplers found: a pure function of its run directories, as numbers and tables.

    minem compare --samplers rsm:8,star:2,pps:1 --seeds 0,1,2      # ends with these tables

The outcome, declared before any run: greedy accuracy of the last model on the test split. Samplers are compared within
a seed, where base model, questions and random streams are the same; the differences of all seeds make a t-interval.
McNemar's test is per seed: pooled over seeds it would find equal samplers different far too often.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, combinations
from pathlib import Path
from typing import Any, Literal

from minem.files import read_rows
from minem.generation.request import stream_seed
from minem.report.reader import Run, flips
from minem.runs.directory import read_journal
from minem.statistics import holm, mcnemar, mean, paired_t, standard_deviation
from minem.text import clean

Match = Literal["none", "kept", "cost"]
STEPS = re.compile(r"/(estep|mstep)(\.\d+)?$")  # stages whose time counts; a long E-step is done in numbered blocks
SUMMED = ("attempts", "kept", "tokens", "cancelled_tokens", "prefill_tokens")
NOT_AVERAGED = ("run", "task", "sampler", "seed", "curve")
ENOUGH_SEEDS = 5  # with fewer a table describes its runs and supports no claim about samplers


@dataclass(frozen=True)
class Cell:
    """One run of the comparison."""

    task: str
    sampler: str  # name and budget, as in "rsm:8"
    seed: int
    folder: Path
    iterations: int

    def rows(self, iteration: int, name: str) -> list[dict[str, Any]]:
        return list(read_rows(self.folder / f"iter-{iteration:02d}" / f"{name}.jsonl"))

    def statuses(self, iteration: int) -> dict[str, str]:
        """{question id: status} on the test split."""
        return {row["id"]: row["status"] for row in self.rows(iteration, "eval.test")}


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
    "cost": every run takes the first questions whose attempts fit into the tokens of the thriftiest run, and their
        accepted rows: what an E-step over these questions alone would have found. Cancelled tokens belong to the
        schedule, not to the sampler, and are not counted.
    """
    costs = [Counter[str]() for _ in group]
    for cell, cost in zip(group, costs, strict=True):
        for row in cell.rows(iteration, "samples"):
            cost[row["id"]] += len(row["token_ids"])
    place = {question: stream_seed(group[0].seed, "match", iteration, question) for cost in costs for question in cost}
    accepted = [[(row["id"], row["attempt"]) for row in cell.rows(iteration, "accepted")] for cell in group]
    fewest, allowance = min(map(len, accepted)), min(cost.total() for cost in costs)
    shares = []
    for cost, rows in zip(costs, accepted, strict=True):
        rows.sort(key=lambda row: (place[row[0]], row[1]))
        chosen = sorted(cost, key=place.__getitem__)
        if match == "cost":
            chosen = chosen[: sum(tokens <= allowance for tokens in accumulate(cost[question] for question in chosen))]
        questions = frozenset(chosen)
        rows = rows[:fewest] if match == "kept" else [row for row in rows if row[0] in questions]
        shares.append(Share(questions, frozenset(rows), sum(cost[question] for question in questions)))
    return shares


def read_run(cell: Cell, group: Sequence[Cell], match: Match) -> dict[str, Any]:
    """The numbers of one finished run: accuracies, the parts of its gain, its costs and its curve."""
    run, iterations = Run(cell.folder, {}, {}, read_journal(cell.folder)), range(1, cell.iterations + 1)
    base, test = run.result(0, "eval.test"), run.result(cell.iterations, "eval.test")
    esteps = [run.result(i, "estep") for i in iterations]
    spent = [estep["tokens"] for estep in esteps]
    if match == "cost":
        spent = [matched(group, i, match)[group.index(cell)].tokens for i in iterations]
    sums = {key: sum(estep[key] for estep in esteps) for key in SUMMED}
    journal = read_rows(cell.folder / "journal.jsonl")
    return {
        **{"run": cell.folder.name, "task": cell.task, "sampler": cell.sampler, "seed": cell.seed},
        **{"n": test["n"], "base": base["accuracy"], "accuracy": test["accuracy"], "sampled": test["sampled"]},
        **_gain(cell),
        **sums,
        "accepted_share": sum(estep["statuses"].get("accepted", 0) for estep in esteps) / sums["attempts"],
        "trained": sum(run.series("mstep", "examples").values()),
        "steps": sum(run.series("mstep", "steps").values()),
        "kept_length": sum((estep["kept_length"] or 0) * estep["kept"] for estep in esteps) / sums["kept"],
        "counted_tokens": sum(spent),
        "seconds": sum(line["seconds"] for line in journal if STEPS.search(line["stage"])),
        "curve": [[sum(spent[:i]), share] for i, share in run.series("eval.validation", "accuracy").items()],
    }


def _gain(cell: Cell) -> dict[str, float]:
    """The parts of the change from the base to the last model, as shares; gain = format + reasoning - lost."""
    before = cell.statuses(0)
    lost, won = flips(before, cell.statuses(cell.iterations))
    reasoning = sum(before[i] == "wrong" for i in won)
    parts = {"gain": len(won) - len(lost), "format": len(won) - reasoning, "reasoning": reasoning, "lost": len(lost)}
    return {part: count / len(before) for part, count in parts.items()}


def compare_pairs(cells: Sequence[Cell], runs: Mapping[Cell, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every pair of samplers on every task, over the seeds that both have finished, with Holm's correction over all.

    A pair without a p-value (fewer than two seeds, or no spread) counts in the correction, as a p-value of 1.
    """
    pairs: list[dict[str, Any]] = []
    for task in dict.fromkeys(cell.task for cell in cells):
        of = {(c.sampler, c.seed): c for c in cells if c.task == task and c in runs}
        for first, second in combinations(dict.fromkeys(c.sampler for c in cells), 2):
            tests, differences = {}, {}
            for seed in dict.fromkeys(c.seed for c in cells):
                if (first, seed) in of and (second, seed) in of:
                    one, two = of[first, seed], of[second, seed]
                    a, b = map(len, flips(one.statuses(one.iterations), two.statuses(two.iterations)))
                    tests[str(seed)] = {"only_first": a, "only_second": b, "p": mcnemar(a, b)}
                    # From counts: equal counts give differences that are equal to the last bit.
                    differences[str(seed)] = (a - b) / runs[one]["n"]
            interval = paired_t(list(differences.values())) if tests else None
            found = {"task": task, "first": first, "second": second, "differences": differences}
            pairs.append({**found, "interval": interval, "mcnemar": tests})
    raw = [_of_interval(pair, "p_value") for pair in pairs]
    for pair, p, adjusted in zip(pairs, raw, holm([1.0 if p is None else p for p in raw]), strict=True):
        pair["holm_p"] = None if p is None else adjusted
    return pairs


def _of_interval(pair: Mapping[str, Any], key: str) -> Any:
    return (pair["interval"] or {}).get(key)


def read_comparison(cells: Sequence[Cell], match: Match) -> dict[str, Any]:
    """All numbers of the comparison and its tables, from the runs that are finished: what comparison.json holds."""
    groups = {cell: [c for c in cells if (c.task, c.seed) == (cell.task, cell.seed)] for cell in cells}
    finished = {cell for cell in cells if f"iter-{cell.iterations:02d}/eval.test" in read_journal(cell.folder)}
    # The shares of a matched group need all of its runs.
    complete = [c for c in cells if c in finished and (match == "none" or finished.issuperset(groups[c]))]
    runs = {cell: read_run(cell, groups[cell], match) for cell in complete}
    cases = dict.fromkeys((cell.task, cell.sampler) for cell in runs)
    same = [[run for cell, run in runs.items() if (cell.task, cell.sampler) == case] for case in cases]
    comparison = {
        "match": match,
        "unfinished": [cell.folder.name for cell in cells if cell not in runs],
        "samplers": [_summary(case) for case in same],
        "pairs": compare_pairs(cells, runs),
        "runs": list(runs.values()),
    }
    return {**comparison, "tables": tables(comparison)}


def _summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of one sampler on one task: means over the seeds, and the standard deviation of the accuracy; None if unknown."""
    values = {key: [run[key] for run in runs] for key in runs[0] if key not in NOT_AVERAGED}
    means = {key: None if None in own else mean(own) for key, own in values.items()}
    about = {"task": runs[0]["task"], "sampler": runs[0]["sampler"], "seeds": [run["seed"] for run in runs]}
    return {**about, **means, "spread": standard_deviation(values["accuracy"])}


def _points(share: float | None, sign: str = "") -> str:
    return "-" if share is None else f"{round(100 * share, 1) + 0.0:{sign}.1f}"  # no -0.0


def _p(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}" if value >= 1e-15 else "<1e-15"


def _span(pair: Mapping[str, Any]) -> str:
    low = _of_interval(pair, "low")
    return "-" if low is None else f"{_signed(low)} to {_signed(pair['interval']['high'])}"


def _only(seed: str, pair: Mapping[str, Any]) -> str:
    test = pair["mcnemar"].get(seed)
    return "-" if test is None else f"{test['only_first']} : {test['only_second']} (p {_p(test['p'])})"


_signed = partial(_points, sign="+")
_pair = "{0[first]} - {0[second]}".format
Columns = Mapping[str, Callable[[Mapping[str, Any]], str]]
ACCURACY: Columns = {
    "sampler": "{0[sampler]}".format,
    "seeds": lambda s: str(len(s["seeds"])),
    "base": lambda s: _points(s["base"]),
    "last, greedy": lambda s: _points(s["accuracy"]) + ("" if s["spread"] is None else f" ± {_points(s['spread'])}"),
    "last, temperature 1": lambda s: _points(s["sampled"]),
    "gain": lambda s: _signed(s["gain"]),
    "format": lambda s: _signed(s["format"]),
    "reasoning": lambda s: _signed(s["reasoning"]),
    "lost": lambda s: _signed(-s["lost"]),
}
COST: Columns = {
    "sampler": "{0[sampler]}".format,
    "attempts": "{0[attempts]:,.0f}".format,
    "accepted": lambda s: f"{_points(s['accepted_share'])} %",
    "kept": "{0[kept]:,.0f}".format,
    "trained on": "{0[trained]:,.0f}".format,
    "steps": "{0[steps]:,.0f}".format,
    "length": "{0[kept_length]:.1f}".format,
    "tokens": "{0[tokens]:,.0f}".format,
    "that count": "{0[counted_tokens]:,.0f}".format,  # of --match cost alone
    "cancelled": "{0[cancelled_tokens]:,.0f}".format,
    "prefill": "{0[prefill_tokens]:,.0f}".format,
    "time": "{0[seconds]:.0f} s".format,
}
PAIRS: Columns = {
    "pair": _pair,
    "per seed": lambda pair: " ".join(map(_signed, pair["differences"].values())) or "-",
    "mean": lambda pair: _signed(_of_interval(pair, "mean")),
    "95 % interval": _span,
    "p": lambda pair: _p(_of_interval(pair, "p_value")),
    "p, Holm": lambda pair: _p(pair["holm_p"]),
}
NOTES = {
    "accuracy": "Greedy, mean over seeds ± their standard deviation. The gain over the base model is made of format "
    "(unparsed or truncated before, right now), reasoning (wrong before, right now) and lost (right before, not now).",
    "costs": "Tokens are all that the E-steps generated, those of rejected and of cancelled attempts too; prefill are "
    "those of prompts that were read. Length is tokens per kept rationale. Time is that of E- and M-steps.",
    "none": " Not matched: samplers train on as many examples as they find, and take as many steps as those need.",
    "kept": " Matched by kept examples: in each iteration all samplers of a seed train on equally many of them.",
    "cost": " Matched by cost: in each iteration all samplers of a seed train on what the tokens of the thriftiest "
    "find; those are the tokens that count.",
    "descriptive": "DESCRIPTIVE ONLY: claims about samplers need {needed} seeds or more, here are {fewest}. ",
    "pairs": "Differences of test accuracy between two samplers with the same seed, in points, with Student's 95 % "
    "interval of their mean. Holm's correction is over the {count} comparisons of this command. They speak of "
    "repeating the training of this base model on these questions, not of other models or questions.",
    "mcnemar": "Questions that only the first : only the second of two checkpoints gets right. A small p shows that "
    "these two checkpoints differ, not that the samplers do; it must not be pooled over seeds.",
}


def tables(comparison: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tables for people, each {title, note, columns, rows of texts}; one task alone moves into the titles."""
    match, samplers, pairs, missing = (comparison[key] for key in ("match", "samplers", "pairs", "unfinished"))
    left_out = f" NOT IN ANY TABLE, for they did not finish: {', '.join(missing)}." if missing else ""
    cost = {name: show for name, show in COST.items() if match == "cost" or name != "that count"}
    fewest = min((_of_interval(pair, "n") or 0 for pair in pairs), default=0)
    claims = NOTES["descriptive"].format(needed=ENOUGH_SEEDS, fewest=fewest) if fewest < ENOUGH_SEEDS else ""
    seeds = dict.fromkeys(seed for pair in pairs for seed in pair["mcnemar"])
    tests: Columns = {"pair": _pair, **{f"seed {seed}": partial(_only, seed) for seed in seeds}}
    made = [
        _table("accuracy on the test split, in %", NOTES["accuracy"] + left_out, samplers, ACCURACY),
        _table("what it cost, all iterations together, mean per run", NOTES["costs"] + NOTES[match], samplers, cost),
        _table("paired differences", claims + NOTES["pairs"].format(count=len(pairs)), pairs, PAIRS),
        _table("McNemar's test, seed by seed", NOTES["mcnemar"], pairs, tests),
    ]
    made = [table for table in made if table["rows"]]  # one sampler alone has no pairs
    tasks = {row[0] for table in made for row in table["rows"]}
    if len(tasks) == 1:
        for table in made:
            table["title"] = f"{min(tasks)}: {table['title']}"
            table["columns"], table["rows"] = table["columns"][1:], [row[1:] for row in table["rows"]]
    return made


def _table(title: str, note: str, found: Sequence[Mapping[str, Any]], columns: Columns) -> dict[str, Any]:
    rows = [[one["task"], *(show(one) for show in columns.values())] for one in found]
    return {"title": title, "note": note, "columns": ["task", *columns], "rows": rows}


def markdown(comparison: Mapping[str, Any]) -> str:
    """The tables as Markdown."""
    parts = []
    for table in comparison["tables"]:
        parts.append(f"### {clean(table['title'])}\n\n{clean(table['note'])}\n")
        for line in (table["columns"], ["---"] * len(table["columns"]), *table["rows"]):
            parts.append("| " + " | ".join(clean(cell).replace("|", "\\|") for cell in line) + " |")
        parts.append("")
    return "\n".join(parts).replace("<", "&lt;")
