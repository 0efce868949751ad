"""The numbers of a comparison, from run directories written by hand: gains, costs, intervals and corrections."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
from scipy import stats

from minem.compare.results import Cell, markdown, read_comparison
from minem.files import write_rows

# Statuses of ten test questions: of the base model, and after training with a sampler from a seed.
BASE = ["unparsed", "truncated", *4 * ["wrong"], *4 * ["accepted"]]
RIGHT = {  # how many of the first questions are right at the end; the last one is always lost
    "toy": {"rsm:8": [5, 6, 7, 8, 9], "star:2": [4, 5, 7, 7, 9], "pps:1": [1, 2, 2, 3, 1]},
    "arc": {"rsm:8": [5, 4, 6, 3, 5], "star:2": [5, 6, 6, 6, 5], "pps:1": [4, 3, 5, 2, 4]},
}


def write_run(folder: Path, right: int) -> None:
    """A finished run of two iterations, as far as the comparison reads it."""
    for iteration in (0, 1, 2):
        (folder / f"iter-{iteration:02d}").mkdir(parents=True)
    last = ["accepted"] * right + ["wrong"] * (10 - right)
    for iteration, statuses in ((0, BASE), (2, last)):
        rows = [{"id": str(i), "status": status} for i, status in enumerate(statuses)]
        write_rows(folder / f"iter-{iteration:02d}" / "eval.test.jsonl", rows)
    estep: dict[str, Any] = {"kept": 4, "kept_length": 10.0, "attempts": 8, "tokens": 1000, "cancelled_tokens": 50}
    estep |= {"statuses": {"accepted": 4, "wrong": 4}, "prefill_tokens": 900}
    second = {**estep, "kept": 6, "kept_length": 20.0, "attempts": 12, "statuses": {"accepted": 6, "wrong": 6}}
    mstep = {"examples": 4, "steps": 1}
    stages = [
        ("iter-00/eval.validation", {"accuracy": 0.25}, 7),
        ("iter-00/eval.test", {"accuracy": 0.4, "n": 10}, 7),
        ("iter-01/estep.1", {}, 2),  # a long E-step is done in blocks
        ("iter-01/estep.2", {}, 0.75),
        ("iter-01/estep", estep, 0.25),
        ("iter-01/mstep", mstep, 2),
        ("iter-01/eval.validation", {"accuracy": 0.5}, 7),
        ("iter-02/estep", second, 1),
        ("iter-02/mstep", {"examples": 6, "steps": 2}, 4),
        ("iter-02/eval.validation", {"accuracy": 0.75}, 7),
        ("iter-02/eval.test", {"accuracy": right / 10, "n": 10, "sampled": 0.6}, 7),
    ]
    write_rows(folder / "journal.jsonl", [{"stage": s, "result": r, "files": {}, "seconds": t} for s, r, t in stages])


def write_all(folder: Path, seeds: int = 5, tasks: tuple[str, ...] = ("toy", "arc")) -> list[Cell]:
    cells = []
    for task in tasks:
        for sampler, counts in RIGHT[task].items():
            for seed, right in enumerate(counts[:seeds]):
                cell = Cell(task, sampler, seed, folder / f"{task}.{sampler.replace(':', '')}.s{seed}", 2)
                write_run(cell.folder, right)
                cells.append(cell)
    return cells


def test_the_parts_of_a_gain_add_up(tmp_path):
    found = read_comparison(write_all(tmp_path), "none")
    by_run = {run["run"]: run for run in found["runs"]}
    run = by_run["toy.rsm8.s0"]  # the first five right: two of them had no readable answer, three a wrong one
    assert (run["format"], run["reasoning"], run["lost"]) == (0.2, 0.3, 0.4)
    assert run["gain"] == pytest.approx(0.1)
    run = by_run["toy.rsm8.s4"]  # nine right: all but the last, which was right before
    assert (run["format"], run["reasoning"], run["lost"]) == (0.2, 0.4, 0.1)
    for run in by_run.values():
        assert run["gain"] == pytest.approx(run["accuracy"] - run["base"])
        assert run["gain"] == pytest.approx(run["format"] + run["reasoning"] - run["lost"])


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
    pairs = found["tables"][2]
    assert pairs["title"] == "paired differences"
    assert pairs["note"].startswith("DESCRIPTIVE ONLY") == descriptive
    if seeds == 1:
        assert all(pair["interval"]["low"] is None for pair in found["pairs"])
        assert {row[4] for row in pairs["rows"]} == {"-"}
        assert all("±" not in row[4] for row in found["tables"][0]["rows"])


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
    assert found["tables"][2]["note"].startswith("DESCRIPTIVE ONLY")
    matched = read_comparison(cells, "kept")  # what the others trained on hangs on it
    assert {name.rpartition(".")[2] for name in matched["unfinished"]} == {"s3"}
    nothing = read_comparison([Cell("toy", name, 0, tmp_path / name, 2) for name in ("a:1", "b:1")], "none")
    assert (nothing["runs"], nothing["samplers"]) == ([], [])
    assert nothing["pairs"][0]["interval"] is None
    assert json.loads(json.dumps(nothing, allow_nan=False)) == nothing


def test_one_task_is_in_the_titles_and_several_are_in_the_rows(tmp_path):
    several = read_comparison(write_all(tmp_path / "several"), "none")["tables"]
    assert all(table["columns"][0] == "task" for table in several)
    assert {row[0] for table in several for row in table["rows"]} == {"toy", "arc"}
    one = read_comparison(write_all(tmp_path / "one", tasks=("toy",)), "none")
    assert all(table["title"].startswith("toy: ") and "task" not in table["columns"] for table in one["tables"])
    pairs = list(combinations(RIGHT["toy"], 2))
    assert [row[0] for row in one["tables"][2]["rows"]] == [f"{a} - {b}" for a, b in pairs]
    lines = markdown(one).splitlines()
    assert "### toy: paired differences" in lines
    assert all(line.count("|") == len(one["tables"][0]["columns"]) + 1 for line in lines[4:9])
