"""The numbers of a comparison, from run directories written by hand: gains, costs, intervals and corrections."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
from rich.console import Console
from scipy import stats

from minem import console
from minem.compare.results import Cell, markdown, read_comparison
from minem.files import write_rows

# Statuses of ten test questions: of the base model, and after training with a sampler from a seed.
BASE = ["unparsed", "truncated", *4 * ["wrong"], *4 * ["accepted"]]
RIGHT = {  # how many of the first questions are right at the end; the last one is always lost
    "toy": {"rsm:8": [5, 6, 7, 8, 9], "star:2": [4, 5, 7, 7, 9], "pps:1": [1, 2, 2, 3, 1]},
    "arc": {"rsm:8": [5, 4, 6, 3, 5], "star:2": [5, 6, 6, 6, 5], "pps:1": [4, 3, 5, 2, 4]},
}


def measured(statuses: Sequence[str], tokens: float, **more: Any) -> dict[str, Any]:
    """What the journal has of an evaluation, as far as the comparison reads it; of two draws as well."""
    shares = {name: statuses.count(name) / len(statuses) for name in ("accepted", "unparsed", "truncated")}
    found = {"n": len(statuses), "accuracy": shares["accepted"], "flexible": shares["accepted"] + shares["unparsed"]}
    found |= {"unparsed": shares["unparsed"], "truncated": shares["truncated"], "tokens": tokens}
    return found | {"sampled": 0.6, "pass_at_k": {"1": 0.6, "2": 0.8}} | more


def write_run(folder: Path, right: int, last: Sequence[str] = (), base: Sequence[str] = BASE) -> None:
    """A finished run of two iterations, as far as the comparison reads it."""
    for iteration in (0, 1, 2):
        (folder / f"iter-{iteration:02d}").mkdir(parents=True)
    last = last or ["accepted"] * right + ["wrong"] * (10 - right)
    for iteration, statuses in ((0, base), (2, last)):
        rows = [{"id": str(i), "status": status} for i, status in enumerate(statuses)]
        write_rows(folder / f"iter-{iteration:02d}" / "eval.test.jsonl", rows)
    estep: dict[str, Any] = {"kept": 4, "kept_length": 10.0, "attempts": 8, "tokens": 1000, "cancelled_tokens": 50}
    estep |= {"statuses": {"accepted": 4, "wrong": 4}, "prefill_tokens": 900, "valid": 0.25}
    second = {**estep, "kept": 6, "kept_length": 20.0, "attempts": 12, "statuses": {"accepted": 6, "wrong": 6}}
    mstep = {"examples": 4, "steps": 1}
    stages = [
        ("iter-00/eval.validation", {"accuracy": 0.25}, 7),
        ("iter-00/eval.test", measured(base, 30.0, sampled=0.3, pass_at_k={"1": 0.3, "2": 0.5}), 7),
        ("iter-01/estep.1", {}, 2),  # a long E-step is done in blocks
        ("iter-01/estep.2", {}, 0.75),
        ("iter-01/estep", estep, 0.25),
        ("iter-01/mstep", mstep, 2),
        ("iter-01/eval.validation", {"accuracy": 0.5, "flexible": 0.625, "unparsed": 0.125}, 7),
        ("iter-02/estep", second, 1),
        ("iter-02/mstep", {"examples": 6, "steps": 2}, 4),
        ("iter-02/eval.validation", {"accuracy": 0.75}, 7),
        ("iter-02/eval.test", measured(last, 20.0), 7),
    ]
    write_rows(folder / "journal.jsonl", [{"stage": s, "result": r, "files": {}, "seconds": t} for s, r, t in stages])


def write_all(
    folder: Path, seeds: int = 5, tasks: tuple[str, ...] = ("toy", "arc"), models: tuple[str, ...] = ("small",)
) -> list[Cell]:
    cells = []
    for task in tasks:
        for model in models:
            for sampler, counts in RIGHT[task].items():
                for seed, right in enumerate(counts[:seeds]):
                    name = f"{task}.{sampler.replace(':', '')}.{model}.s{seed}"
                    cells.append(Cell(task, model, sampler, seed, folder / name, 2))
                    write_run(cells[-1].folder, right)
    return cells


def titled(found: dict[str, Any], word: str) -> dict[str, Any]:
    """The one table with this word in its title."""
    (table,) = [table for table in found["tables"] if word in table["title"]]
    return table


def column(table: dict[str, Any], name: str) -> list[str]:
    return [row[table["columns"].index(name)] for row in table["rows"]]


def test_the_parts_of_a_gain_are_net_and_add_up(tmp_path):
    statuses = {  # of ten questions, before and after, and the questions that each part won net
        "both": (BASE, [*5 * ["accepted"], *5 * ["wrong"]], 3 - 4, 2),
        "format alone": (BASE, [*2 * ["accepted"], *4 * ["wrong"], *4 * ["accepted"]], 0, 2),
        "reasoning alone": (BASE, ["unparsed", "truncated", *8 * ["accepted"]], 4, 0),
        "format lost": (BASE, [*2 * ["unparsed"], *4 * ["wrong"], "unparsed", *2 * ["truncated"], "accepted"], 0, -3),
        "one for the other": (BASE, [*3 * ["accepted"], *3 * ["wrong"], *2 * ["unparsed"], *2 * ["wrong"]], 1 - 2, 0),
        "never right": (BASE, [*2 * ["wrong"], *2 * ["unparsed"], *2 * ["truncated"], *4 * ["accepted"]], 0, 0),
    }
    cells = []
    for name, (base, last, _, _) in statuses.items():
        cells.append(Cell("toy", "small", name, 0, tmp_path / name, 2))
        write_run(cells[-1].folder, 0, last, base)
    found = read_comparison(cells, "none")
    for run, (base, last, reasoning, form) in zip(found["runs"], statuses.values(), strict=True):
        assert (run["reasoning"], run["format"]) == (reasoning / 10, form / 10), run["sampler"]
        assert round(10 * run["gain"]) == last.count("accepted") - base.count("accepted") == reasoning + form
        assert run["gain"] == pytest.approx(run["accuracy"] - run["base_accuracy"])
    assert column(titled(found, "accuracy on the test"), "reasoning")[:3] == ["-10.0", "+0.0", "+40.0"]
    assert column(titled(found, "accuracy on the test"), "format")[:4] == ["+20.0", "+20.0", "+0.0", "-30.0"]


def test_base_and_last_model_stand_beside_each_other(tmp_path):
    found = read_comparison(write_all(tmp_path, tasks=("toy",)), "none")
    accuracy, answers = (titled(found, word) for word in ("accuracy on the test", "answers on the test"))
    assert column(accuracy, "accuracy") == ["40.0 -> 70.0", "40.0 -> 64.0", "40.0 -> 18.0"]  # means over five seeds
    assert column(accuracy, "spread") == ["15.8", "19.5", "8.4"]
    assert column(accuracy, "flexible")[0] == "50.0 -> 70.0"
    assert column(answers, "unparsed") == column(answers, "truncated") == 3 * ["10.0 -> 0.0"]
    assert column(answers, "length") == 3 * ["30.0 -> 20.0"]
    assert column(answers, "sampled") == 3 * ["30.0 -> 60.0"]
    assert column(answers, "pass@2") == 3 * ["50.0 -> 80.0"]
    assert "pass@1" not in answers["columns"]  # that is the mean of the draws
    for one in found["samplers"]:
        assert (one["base_pass_at_2"], one["pass_at_2"], one["length"]) == pytest.approx((0.5, 0.8, 20.0))


def test_what_is_not_measured_has_no_column(tmp_path):
    cells = write_all(tmp_path, seeds=1, tasks=("toy",))
    for cell in cells:
        journal = cell.folder / "journal.jsonl"
        lines = [json.loads(line) for line in journal.read_text().splitlines()]
        for line in lines:
            line["result"].pop("pass_at_k", None)
            line["result"] |= {key: None for key in ("sampled", "valid") if key in line["result"]}
        write_rows(journal, lines)
    found = read_comparison(cells, "none")
    assert titled(found, "answers")["columns"] == ["sampler", "unparsed", "truncated", "length"]
    assert "valid" not in titled(found, "iteration by")["columns"]
    assert "spread" not in titled(found, "accuracy on")["columns"]  # of one seed
    assert titled(found, "paired")["columns"] == ["pair", "per seed", "mean"]
    assert found["runs"][0]["sampled"] is None


def test_each_iteration_has_a_row(tmp_path):
    found = read_comparison(write_all(tmp_path, tasks=("toy",)), "none")
    table = titled(found, "iteration by iteration")
    assert table["rows"][:3] == [
        ["rsm:8", "0", "25.0", "-", "-", "-", "-", "-", "-"],
        ["rsm:8", "1", "50.0", "62.5", "12.5", "4", "10.0", "25.0", "1,000"],
        ["rsm:8", "2", "75.0", "-", "-", "6", "20.0", "25.0", "1,000"],
    ]
    assert len(table["rows"]) == 9
    first = found["samplers"][0]["iterations"][1]
    assert (first["accuracy"], first["kept"], first["kept_length"], first["valid"]) == (0.5, 4, 10.0, 0.25)


def test_samplers_are_paired_within_a_model(tmp_path):
    cells = write_all(tmp_path, tasks=("toy",), models=("small", "large"))
    for cell in cells:  # the large one gets three questions less with every sampler but pps
        if cell.model == "large" and cell.sampler != "pps:1":
            right = RIGHT["toy"][cell.sampler][cell.seed] - 3
            write_rows(
                cell.folder / "iter-02" / "eval.test.jsonl",
                [{"id": str(i), "status": "accepted" if i < right else "wrong"} for i in range(10)],
            )
    found = read_comparison(cells, "none")
    pairs = {(pair["model"], pair["first"], pair["second"]): pair for pair in found["pairs"]}
    assert len(pairs) == 6
    small, large = (pairs[model, "rsm:8", "pps:1"]["interval"] for model in ("small", "large"))
    assert small["n"] == large["n"] == 5
    assert small["mean"] - large["mean"] == pytest.approx(0.3)
    assert pairs["small", "rsm:8", "star:2"]["interval"] == pairs["large", "rsm:8", "star:2"]["interval"]
    assert [one["model"] for one in found["samplers"]] == 3 * ["small"] + 3 * ["large"]
    for table in found["tables"]:
        assert table["columns"][0] == "model"
        assert set(column(table, "model")) == {"small", "large"}
        assert table["title"].startswith("toy: ")
    alone = read_comparison([cell for cell in cells if cell.model == "small"], "none")
    assert all("model" not in table["columns"] for table in alone["tables"])


@pytest.mark.parametrize("models", [("small",), ("SmolLM2-135M-Instruct", "Qwen2.5-0.5B-Instruct")])
def test_a_terminal_of_100_columns_shows_every_number_whole(models, tmp_path, monkeypatch):
    seeds = 5 if len(models) == 1 else 3
    found = read_comparison(write_all(tmp_path, seeds, ("toy",), models), "none")
    for table in found["tables"]:
        made = io.StringIO()
        monkeypatch.setattr(console, "_Console", lambda *_, made=made, **__: Console(file=made, width=100))
        console.table(table["columns"], table["rows"])
        shown = made.getvalue()
        assert max(map(len, shown.splitlines())) <= 100
        words = shown.split()
        for cell in [cell for row in table["rows"] for cell in row[len(models) :]]:  # names may be folded
            assert set(cell.split()) <= set(words), (table["title"], cell)
        assert "…" not in shown


def test_costs_are_sums_over_iterations_and_means_over_seeds(tmp_path):
    cells = write_all(tmp_path, tasks=("toy",))
    found = read_comparison(cells, "none")
    run = found["runs"][0]
    assert {key: run[key] for key in ("attempts", "kept", "trained", "steps", "tokens", "cancelled_tokens")} == {
        "attempts": 20,
        "kept": 10,
        "trained": 10,
        "steps": 3,
        "tokens": 2000,
        "cancelled_tokens": 100,
    }
    assert run["accepted_share"] == 0.5
    assert run["kept_length"] == (4 * 10 + 6 * 20) / 10
    assert run["prefill_tokens"] == 1800
    assert run["seconds"] == 10  # of E- and M-steps
    assert run["curve"] == [[0, 0.25], [1000, 0.5], [2000, 0.75]]
    for summary in found["samplers"]:
        accuracies = [right / 10 for right in RIGHT["toy"][summary["sampler"]]]
        assert summary["accuracy"] == pytest.approx(mean(accuracies))
        assert summary["spread"] == pytest.approx(stdev(accuracies))
        assert summary["sampled"] == pytest.approx(0.6)


def test_pairs_are_compared_within_seeds_and_corrected_over_pairs_and_tasks(tmp_path):
    found = read_comparison(write_all(tmp_path), "none")
    assert len(found["pairs"]) == 6
    raw = []
    for pair in found["pairs"]:
        one, two = ([right / 10 for right in RIGHT[pair["task"]][pair[name]]] for name in ("first", "second"))
        interval = pair["interval"]
        assert list(pair["differences"].values()) == pytest.approx([a - b for a, b in zip(one, two, strict=True)])
        for seed, (a, b) in enumerate(zip(one, two, strict=True)):
            test = pair["mcnemar"][str(seed)]
            only = round(10 * max(0, a - b)), round(10 * max(0, b - a))
            assert (test["only_first"], test["only_second"]) == only
            assert test["p"] == pytest.approx(stats.binomtest(only[0], sum(only), 0.5).pvalue if sum(only) else 1.0)
        if (pair["task"], pair["first"], pair["second"]) == ("arc", "rsm:8", "pps:1"):
            # One question more with every seed: no spread, and so no p-value, least of all a tiny one.
            assert interval == {"n": 5, "mean": pytest.approx(0.1), "low": None, "high": None, "p_value": None}
            assert pair["holm_p"] is None
            continue
        expected = stats.ttest_rel(one, two)
        bounds = expected.confidence_interval(0.95)
        assert (interval["low"], interval["high"]) == pytest.approx((bounds.low, bounds.high), abs=1e-9)
        assert interval["p_value"] == pytest.approx(expected.pvalue, abs=1e-9)
        raw.append(interval["p_value"])
    assert len(raw) == 5
    smallest = min((pair for pair in found["pairs"] if pair["holm_p"] is not None), key=lambda pair: pair["holm_p"])
    assert smallest["holm_p"] == pytest.approx(6 * min(raw))  # over three pairs and two tasks, whichever have a p-value


@pytest.mark.parametrize(("seeds", "descriptive"), [(1, True), (4, True), (5, False)])
def test_few_seeds_are_labelled_descriptive(seeds, descriptive, tmp_path):
    found = read_comparison(write_all(tmp_path, seeds), "none")
    pairs = titled(found, "paired differences")
    assert pairs["note"].startswith("DESCRIPTIVE ONLY") == descriptive
    if seeds == 1:
        assert all(pair["interval"]["low"] is None for pair in found["pairs"])
        assert "95 % interval" not in pairs["columns"]


def test_unfinished_runs_are_named_and_left_out_of_pairs(tmp_path):
    cells = write_all(tmp_path, tasks=("toy",))
    missing = next(cell for cell in cells if (cell.sampler, cell.seed) == ("star:2", 3))
    lines = (missing.folder / "journal.jsonl").read_text().splitlines(keepends=True)
    (missing.folder / "journal.jsonl").write_text("".join(lines[:-1]))
    found = read_comparison(cells, "none")
    assert found["unfinished"] == [missing.folder.name]
    counts = {(pair["first"], pair["second"]): list(pair["differences"]) for pair in found["pairs"]}
    assert counts["rsm:8", "pps:1"] == ["0", "1", "2", "3", "4"]
    assert counts["rsm:8", "star:2"] == counts["star:2", "pps:1"] == ["0", "1", "2", "4"]
    assert titled(found, "paired differences")["note"].startswith("DESCRIPTIVE ONLY")
    matched = read_comparison(cells, "kept")  # what the others trained on hangs on it
    assert {name.rpartition(".")[2] for name in matched["unfinished"]} == {"s3"}
    nothing = read_comparison([Cell("toy", "small", name, 0, tmp_path / name, 2) for name in ("a:1", "b:1")], "none")
    assert (nothing["runs"], nothing["samplers"]) == ([], [])
    assert nothing["pairs"][0]["interval"]["n"] == 0
    assert json.loads(json.dumps(nothing, allow_nan=False)) == nothing


def test_one_task_is_in_the_titles_and_several_are_in_the_rows(tmp_path):
    several = read_comparison(write_all(tmp_path / "several"), "none")["tables"]
    assert all(table["columns"][0] == "task" for table in several)
    assert {row[0] for table in several for row in table["rows"]} == {"toy", "arc"}
    one = read_comparison(write_all(tmp_path / "one", tasks=("toy",)), "none")
    assert all(table["title"].startswith("toy: ") and "task" not in table["columns"] for table in one["tables"])
    pairs = list(combinations(RIGHT["toy"], 2))
    assert column(titled(one, "paired"), "pair") == [f"{a} - {b}" for a, b in pairs]
    lines = markdown(one).splitlines()
    assert "### toy: paired differences" in lines
    assert all(line.count("|") == len(one["tables"][0]["columns"]) + 1 for line in lines[4:9])
