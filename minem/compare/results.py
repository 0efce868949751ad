"""What a comparison found: a pure function of its run directories, as numbers and tables.

    minem compare --samplers rsm:8,star:2,pps:1 --seeds 0,1,2      # ends with these tables

The outcome, declared before any run: greedy accuracy of the last model on the test split. Samplers are compared within
a seed, where base model, questions and random streams are the same.
"""

import re
import tomllib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, combinations
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

from minem.config import difference
from minem.errors import UserError
from minem.files import own_file, read_rows
from minem.generation.request import stream_seed
from minem.report import reader
from minem.report.reader import Run, checked, flips
from minem.runs.directory import read_journal
from minem.runs.folder import folder_name, model_name
from minem.statistics import holm, mcnemar, mean, paired_t, standard_deviation
from minem.text import clean

Match = Literal["none", "kept", "cost"]
STEPS = re.compile(r"/(estep|mstep)(\.\d+)?$")  # stages whose time counts; a long E-step is done in numbered blocks
NOT_KNOWN = {"n": 0, "mean": None, "low": None, "high": None, "p_value": None}  # as paired_t's
SUMMED = ("attempts", "kept", "tokens", "cancelled_tokens", "prefill_tokens")
NAMES = ("task", "model", "sampler")  # by which a row of the tables is known
NOT_AVERAGED = ("run", *NAMES, "seed", "curve")
# Of the evaluations, and of the E-step in each iteration.
MEASURED = ("accuracy", "flexible", "unparsed", "truncated", "sampled")
DRAWN = ("kept", "kept_length", "valid", "tokens")
GROUP = attrgetter("task", "model", "seed")  # of a Cell: what runs share that are matched and compared
ENOUGH_SEEDS = 5  # with fewer a table describes its runs and supports no claim about samplers


@dataclass(frozen=True)
class Cell:
    """One run of the comparison."""

    task: str
    model: str  # as it is called in folder names
    sampler: str  # name and budget, as in "rsm:8", or the name of an arm
    seed: int
    folder: Path
    iterations: int

    def rows(self, iteration: int, name: str) -> list[dict[str, Any]]:
        return list(read_rows(own_file(self.folder / f"iter-{iteration:02d}", f"{name}.jsonl")))

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
    """The share of each run in a group (one task, model and seed), from the E-steps that all of them have finished.

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
    """The numbers of one finished run: accuracies, the parts of its gain, its costs, its iterations and its curve."""
    run, iterations = Run(cell.folder, {}, {}, read_journal(cell.folder)), range(1, cell.iterations + 1)
    base, test = (_measured(run, i, "test") for i in (0, cell.iterations))
    esteps: list[dict[str, Any]] = [run.result(i, "estep") for i in iterations]
    spent = [estep["tokens"] for estep in esteps]
    if match == "cost":
        spent = [matched(group, i, match)[group.index(cell)].tokens for i in iterations]
    drawn = [{key: estep.get(key) for key in DRAWN} for estep in ({}, *esteps)]
    sums = {key: sum(estep[key] for estep in esteps) for key in SUMMED}
    return {
        **{"run": cell.folder.name, **{name: getattr(cell, name) for name in NAMES}, "seed": cell.seed},
        **{"n": run.result(0, "eval.test")["n"], **test, **{f"base_{key}": value for key, value in base.items()}},
        **_gain(cell),
        **sums,
        "accepted_share": sum(estep["statuses"].get("accepted", 0) for estep in esteps) / max(1, sums["attempts"]),
        "trained": sum(run.series("mstep", "examples").values()),
        "steps": sum(run.series("mstep", "steps").values()),
        "kept_length": sum((estep["kept_length"] or 0) * estep["kept"] for estep in esteps) / max(1, sums["kept"]),
        "counted_tokens": sum(spent) if match == "cost" else None,
        "seconds": sum(s["seconds"] for s in read_rows(cell.folder / "journal.jsonl") if STEPS.search(s["stage"])),
        "iterations": [{"iteration": i, **_measured(run, i, "validation"), **one} for i, one in enumerate(drawn)],
        "curve": [[sum(spent[:i]), share] for i, share in run.series("eval.validation", "accuracy").items()],
    }


def _measured(run: Run, iteration: int, split: str) -> dict[str, Any]:
    result = run.result(iteration, f"eval.{split}")
    passed = {f"pass_at_{k}": share for k, share in result.get("pass_at_k", {}).items()}
    return {**{key: result.get(key) for key in MEASURED}, "length": result.get("tokens"), **passed}


def _gain(cell: Cell) -> dict[str, float]:
    """What the base model gained, in shares: net reasoning (an answer was read both times) and the rest, net format."""
    before, after = cell.statuses(0), cell.statuses(cell.iterations)
    lost, won = flips(before, after)
    gain = len(won) - len(lost)
    reasoning = sum(before[i] == "wrong" for i in won) - sum(after[i] == "wrong" for i in lost)
    parts = {"gain": gain, "reasoning": reasoning, "format": gain - reasoning}
    return {part: count / len(before) for part, count in parts.items()}


def compare_pairs(cells: Sequence[Cell], runs: Mapping[Cell, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every pair of samplers, over the seeds that both have finished; without a p-value it counts as 1 in Holm's."""
    pairs: list[dict[str, Any]] = []
    for task, model in dict.fromkeys((cell.task, cell.model) for cell in cells):
        of = {(c.sampler, c.seed): c for c in cells if (c.task, c.model) == (task, model) and c in runs}
        for first, second in combinations(dict.fromkeys(c.sampler for c in cells), 2):
            tests, differences = {}, {}
            for seed in dict.fromkeys(c.seed for c in cells):
                if (first, seed) in of and (second, seed) in of:
                    one, two = of[first, seed], of[second, seed]
                    a, b = map(len, flips(one.statuses(one.iterations), two.statuses(two.iterations)))
                    tests[str(seed)] = {"only_first": a, "only_second": b, "p": mcnemar(a, b)}
                    # From counts: equal counts give differences that are equal to the last bit.
                    differences[str(seed)] = (a - b) / runs[one]["n"]
            interval = paired_t(list(differences.values())) if tests else NOT_KNOWN
            found = {"task": task, "model": model, "first": first, "second": second, "differences": differences}
            pairs.append({**found, "interval": interval, "mcnemar": tests})
    raw = [pair["interval"]["p_value"] for pair in pairs]
    for pair, p, adjusted in zip(pairs, raw, holm([1.0 if p is None else p for p in raw]), strict=True):
        pair["holm_p"] = None if p is None else adjusted
    return pairs


def read_folder(folder: Path) -> dict[str, Any]:
    """`read_comparison` of the run directories in a folder, wherever they were made. UserError if there is none."""
    if not (found := sorted(facts.parent for facts in folder.glob("*/run.json"))):
        raise UserError(f"{folder} holds no run directories")
    with checked(folder):
        cells = {_cell_of(path): reader.read_run(path) for path in found}
        for (one, a), (other, b) in combinations(cells.items(), 2):
            why = []
            if (one.task, one.model) == (other.task, other.model):
                about = [run.facts["inputs"] for run in (a, b)]
                why = [f"{name} differ" for name in ("task rows", "base model") if about[0][name] != about[1][name]]
            if (one.task, one.model, one.sampler) == (other.task, other.model, other.sampler):
                keys = [{**run.config, "run": {**run.config["run"], "seed": 0, "out": None}} for run in (a, b)]
                why += difference(*keys) or ["they have one seed"] * (one.seed == other.seed)
            if why:
                raise UserError(f"{one.folder} and {other.folder} are no runs to compare: {'; '.join(why)}")
        return read_comparison(list(cells), "none")


def _cell_of(folder: Path) -> Cell:
    """The cell that a run directory is. An arm is known by its folder's name, as `minem.compare` gives it."""
    config = reader.read_run(folder).config
    task, seed, section = config["task"]["name"], config["run"]["seed"], config["sampler"]
    model, sampler = model_name(config["model"]["id"]), f"{section['name']}:{section['budget']}"
    arm = re.fullmatch(rf".*?\.([^.]+)\.{re.escape(folder_name(model))}\.s{seed}", folder.name)
    label = sampler if arm is None or arm[1] == sampler.replace(":", "") else arm[1]
    return Cell(task, model, label, seed, folder, config["run"]["iterations"])


def read_comparison(cells: Sequence[Cell], match: Match) -> dict[str, Any]:
    """All numbers of the comparison and its tables, from the runs that are finished: what comparison.json holds."""
    groups = {cell: [other for other in cells if GROUP(other) == GROUP(cell)] for cell in cells}
    finished = {cell for cell in cells if f"iter-{cell.iterations:02d}/eval.test" in read_journal(cell.folder)}
    # The shares of a matched group need all of its runs.
    complete = [c for c in cells if c in finished and (match == "none" or finished.issuperset(groups[c]))]
    runs = {cell: read_run(cell, groups[cell], match) for cell in complete}
    same: dict[Any, list[Any]] = {}
    for run in runs.values():
        same.setdefault(tuple(run[name] for name in NAMES), []).append(run)
    comparison = {
        "match": match,
        "unfinished": [cell.folder.name for cell in cells if cell not in runs],
        "samplers": [_summary(own) for own in same.values()],
        "pairs": compare_pairs(cells, runs),
        "runs": list(runs.values()),
    }
    return {**comparison, "tables": tables(comparison)}


def _summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of one row: means over the seeds, and the standard deviation of the accuracy; None if unknown."""
    about = {**{name: runs[0][name] for name in NAMES}, "seeds": [run["seed"] for run in runs]}
    means = {key: _mean([run[key] for run in runs]) for key in runs[0] if key not in NOT_AVERAGED}
    return {**about, **means, "spread": standard_deviation([run["accuracy"] for run in runs])}


def _mean(values: Sequence[Any]) -> Any:
    """Of numbers, or of those in the same place of dicts and lists."""
    if None in values:
        return None
    if isinstance(values[0], dict):
        return {key: _mean([value[key] for value in values]) for key in values[0]}
    return list(map(_mean, zip(*values, strict=True))) if isinstance(values[0], list) else mean(values)


def _points(share: float, sign: str = "") -> str:
    return f"{round(100 * share, 1) + 0.0:{sign}.1f}"  # no -0.0


def _p(value: float) -> str:
    return f"{value:.2g}" if value >= 1e-15 else "<1e-15"


_signed = partial(_points, sign="+")
# How a value is shown, by its key; texts stay as they are, and all other numbers are shares, in percent.
SHOWN: dict[str, Callable[[Any], str]] = {
    **dict.fromkeys((*SUMMED, "iteration", "trained", "steps", "counted_tokens", "seconds"), "{:,.0f}".format),
    **dict.fromkeys(("length", "kept_length"), "{:.1f}".format),
    **dict.fromkeys(("gain", "reasoning", "format", "mean"), _signed),
    **{"seeds": lambda seeds: str(len(seeds)), "p_value": _p, "holm_p": _p},
}
ACCURACY = ("sampler", "seeds", "accuracy", "spread", "flexible", "gain", "reasoning", "format")
ANSWERS = ("sampler", "unparsed", "truncated", "length", "sampled")
ITERATIONS = ("sampler", "iteration", "accuracy", "flexible", "unparsed", "kept", "kept_length", "valid", "tokens")
TRAINING = ("sampler", "attempts", "accepted_share", "kept", "kept_length", "trained", "steps")
COST = ("sampler", "tokens", "counted_tokens", "cancelled_tokens", "prefill_tokens", "seconds")
PAIRS = ("pair", "per seed", "mean", "95 % interval", "p_value", "holm_p")
NOTES = tomllib.loads((Path(__file__).parent / "notes.toml").read_text(encoding="utf-8"))


def tables(comparison: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tables for people, each {title, note, columns, rows of texts}; one task alone moves into the titles."""
    match, samplers, missing = (comparison[key] for key in ("match", "samplers", "unfinished"))
    left_out = f" NOT IN ANY TABLE, for they did not finish: {', '.join(missing)}." if missing else ""
    steps = [{**{name: one[name] for name in NAMES}, **step} for one in samplers for step in one["iterations"]]
    passed = [key for one in samplers for key in one if key.startswith("pass_at_")][-1:]  # the largest k
    fewest = min((pair["interval"]["n"] for pair in comparison["pairs"]), default=0)
    claims = f"{NOTES['descriptive'].format(needed=ENOUGH_SEEDS, fewest=fewest)} " if fewest < ENOUGH_SEEDS else ""
    pairs = list(map(_texts, comparison["pairs"]))
    tests = dict.fromkeys(key for pair in pairs for key in pair if key.startswith("seed "))
    axes = [name for name in ("task", "model") if len({one[name] for one in [*samplers, *pairs]}) > 1]
    about = "" if "task" in axes else "".join(f"{one['task']}: " for one in [*samplers, *pairs][:1])
    made: list[tuple[str, str, Sequence[Mapping[str, Any]], Sequence[str]]] = [
        ("accuracy on the test split, in %", NOTES["accuracy"] + left_out, samplers, ACCURACY),
        ("answers on the test split", NOTES["answers"], samplers, (*ANSWERS, *passed)),
        ("iteration by iteration, greedy on validation", NOTES["iterations"], steps, ITERATIONS),
        ("what was trained on, all iterations together, mean per run", NOTES[match], samplers, TRAINING),
        ("what it cost, all iterations together, mean per run", NOTES["costs"], samplers, COST),
        ("paired differences", claims + NOTES["pairs"].format(count=len(pairs)), pairs, PAIRS),
        ("McNemar's test, seed by seed", NOTES["mcnemar"], pairs, ("pair", *tests)),
    ]
    return [_table(about + title, note, found, (*axes, *keys)) for title, note, found, keys in made if found]


def _texts(pair: Mapping[str, Any]) -> dict[str, Any]:
    """A pair with the columns that its tables have."""
    low, high = (pair["interval"][key] for key in ("low", "high"))
    found: dict[str, Any] = {"pair": f"{pair['first']} - {pair['second']}"}
    for seed, test in pair["mcnemar"].items():
        found[f"seed {seed}"] = f"{test['only_first']} : {test['only_second']} (p {_p(test['p'])})"
    found["per seed"] = " ".join(map(_signed, pair["differences"].values())) or None
    found["95 % interval"] = None if low is None else f"{_signed(low)} to {_signed(high)}"
    return {**pair, **pair["interval"], **found}


def _table(title: str, note: str, found: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> dict[str, Any]:
    """What no row knows has no column."""
    known = [key for key in keys if any(one.get(key) is not None for one in found)]
    columns = [key.replace("_at_", "@").replace("_", " ") for key in known]
    return {"title": title, "note": note, "columns": columns, "rows": [[_cell(one, k) for k in known] for one in found]}


def _cell(found: Mapping[str, Any], key: str) -> str:
    """A value as text, after that of the base model if there is one."""
    values = [found[name] for name in (f"base_{key}", key) if found.get(name) is not None]
    return " -> ".join(one if isinstance(one, str) else SHOWN.get(key, _points)(one) for one in values) or "-"


def markdown(comparison: Mapping[str, Any]) -> str:
    """The tables as Markdown."""
    parts = []
    for table in comparison["tables"]:
        parts.append(f"### {clean(table['title'])}\n\n{clean(table['note'])}\n")
        for line in (table["columns"], ["---"] * len(table["columns"]), *table["rows"]):
            parts.append("| " + " | ".join(clean(cell).replace("|", "\\|") for cell in line) + " |")
        parts.append("")
    return "\n".join(parts).replace("<", "&lt;")
