"""The warnings: each rule from both of its sides, and what a run does with them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from minem.cli import main
from minem.em import warnings as health
from minem.files import read_rows
from minem.runs.directory import read_journal


def counted(accepted: int, attempts: int, solved: int, *, prompts: str = "plain", **rejected: int) -> dict[str, Any]:
    """What EStep.summary has of an E-step on 100 questions; rejected draws are wrong by default."""
    statuses = {"accepted": accepted, **(rejected or {"wrong": attempts - accepted})}
    acceptance = dict.fromkeys(prompts.split(), accepted / attempts)
    return {
        "questions": 100,
        "solved": solved,
        "attempts": attempts,
        "statuses": {k: n for k, n in statuses.items() if n},
        "acceptance": acceptance,
    }


@pytest.mark.parametrize(
    ("estep", "expected"),
    [
        (counted(99, 100, 99), "train on harder ones"),
        (counted(100, 100, 100), "train on harder ones"),
        (counted(98, 100, 98), None),
        (counted(396, 400, 99, prompts="hinted"), "repeat the answer that they were shown"),
        (counted(99, 100, 99, prompts="hinted plain"), "train on harder ones"),
    ],
)
def test_everything_accepted(estep, expected):
    found = health.everything_accepted(estep)
    assert found is None if expected is None else found is not None and expected in found
    assert health.of_draws(estep) == ([] if expected is None else [found])


@pytest.mark.parametrize(
    ("estep", "expected"),
    [
        (counted(4, 800, 4), "raise sampler.budget, or let star or pps"),
        (counted(5, 800, 5), None),
        (counted(0, 800, 0), None),  # a guard stops the run
        (counted(4, 800, 4, truncated=700, wrong=96), "raise sampler.max_new_tokens"),
        (counted(4, 800, 4, unparsed=700, wrong=96), "--verdict"),
        (counted(4, 800, 4, prompts="hinted plain"), "although the answer was shown"),
    ],
)
def test_almost_nothing_accepted(estep, expected):
    found = health.almost_nothing_accepted(estep)
    assert found is None if expected is None else found is not None and expected in found
    assert found is None or "only 4 of 100 questions" in found


# Half-means of 1.0 and of what is tested, with a spread of 0.01: the standard error of their difference is 0.0082.
WAVE = torch.tensor([-1.0, 1.0, -1.0, 1.0]) * 0.01


@pytest.mark.parametrize(
    ("after", "warned"),
    [
        (1.0, True),  # 0 + 2 * 0.0082 < 0.02
        (1.2, True),
        (0.997, True),
        (0.996, False),  # 0.004 + 0.0163 is as much as 2 %: it may have fallen
        (0.5, False),
    ],
)
def test_a_loss_that_does_not_fall(after, warned):
    losses = [*(1.0 + WAVE).tolist(), *(after + WAVE).tolist()]
    found = health.loss_not_falling(losses)
    assert (found is not None) == warned
    assert found is None or "lower mstep.lr" in found
    assert health.loss_not_falling(losses[:3] + losses[4:7]) is None  # six steps say nothing


def test_a_loss_that_jumps_about_is_no_sign():
    assert health.loss_not_falling([1.0, 2.0, 1.0, 2.0, 2.0, 1.0, 2.0, 1.2]) is None
    assert health.loss_not_falling([0.0] * 8) is None  # there is nothing left to fall
    assert health.loss_not_falling([0.3] * 9) is not None


@pytest.mark.parametrize(
    ("entropies", "solved", "warned"),
    [
        ([0.4, 0.2, 0.09], 0.5, True),
        ([0.4, 0.2, 0.1], 0.5, False),
        ([0.4, 0.05], 0.89, True),
        ([0.4, 0.05], 0.91, False),  # it found what it looked for: sharpening is what EM is for
        ([0.4, 0.05], None, False),
        ([0.05], 0.5, False),
        ([None, 0.05], 0.5, False),
        ([0.4, None], 0.5, False),
        ([0.0, 0.0], 0.5, False),
    ],
)
def test_an_entropy_that_collapses(entropies, solved, warned):
    found = health.entropy_collapsing(entropies, solved)
    assert (found is not None) == warned
    n = len(entropies)
    results = {f"iter-{i:02d}/mstep": {"entropy": entropy} for i, entropy in enumerate(entropies[:-1], start=1)}
    if solved is not None:
        results[f"iter-{n:02d}/estep"] = {"solved": 100 * solved, "questions": 100}
    assert health.of_training([], {"entropy": entropies[-1]}, n, results) == ([found] if warned else [])


def test_a_fall_of_hinted_acceptance():
    first, now = {"hinted": 0.5, "falling": False}, {"hinted": 0.25, "falling": True}
    assert health.of_diagnostics(first, None) == health.of_diagnostics(first, first) == []
    (found,) = health.of_diagnostics(now, first)
    assert found.startswith("hinted acceptance fell from 50.0 % to 25.0 % since iteration 1: ")


def test_a_run_warns_once_keeps_it_reports_it_and_has_the_metrics_of_each_step(tmp_path, monkeypatch):
    """pps on the toy: every draw is shown the answer, and hits it. At this rate the model is ruined."""
    monkeypatch.setattr("minem.report.figures.draw", lambda *_: "<svg></svg>")
    monkeypatch.setattr("minem.report.charts.plot_accuracy", lambda run, path: path.write_bytes(b""))
    much = ["--sampler", "pps", "--set", "mstep.lr=0.03", "--set", "mstep.warmup=0.9", "--set", "mstep.batch_size=2"]
    much += ["--limit", "16", "--iterations", "1", "--set", "eval.samples=0", "--set", "eval.diagnostics=0"]
    command = ["train", *much, "--out", str(tmp_path / "run"), "--json"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    journal = read_journal(tmp_path / "run")
    warnings = {stage: found for stage, kept in journal.items() if (found := kept.get("warnings"))}
    assert {"iter-01/estep", "iter-01/mstep"} <= warnings.keys()  # and evaluations, if answers fell apart
    lines = [line for line in result.stderr.splitlines() if line.startswith("warning ")]
    assert [line.removeprefix("warning ") for line in lines] == [s for found in warnings.values() for s in found]
    assert any("minem show" in line for line in lines)
    assert any("the loss did not fall" in line for line in lines)
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("the loss did not fall") == sum("did not fall" in line for line in lines)
    assert "warning" not in CliRunner().invoke(main, command).stderr

    steps = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if row["stage"] == "iter-01/mstep"]
    kept = json.loads(result.stdout)["iterations"][1]["mstep"]
    assert len(steps) == kept["steps"] == 8
    for row in [*steps, kept]:
        numbers = {k: row[k] for k in ("loss", "entropy", "grad_norm", "tokens_per_second", "peak_process_memory")}
        assert all(isinstance(n, int | float) and 0 < n < 1e12 for n in numbers.values())
        assert 10e6 < row["peak_process_memory"] < 100e9
    assert all(0 < row["lr"] <= 0.03 for row in steps)
    assert max(row["peak_process_memory"] for row in steps) <= kept["peak_process_memory"]  # it is looked at once more
    shown = next(line for line in result.stderr.splitlines() if "M-step" in line and "done" in line)
    for fact in ("loss", "grad norm", "lr", "tokens/s", "peak memory"):
        assert f"  {fact} " in shown
