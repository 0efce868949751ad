"""The warnings: each rule from both of its sides, and what a run does with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from minem.cli import main
from minem.em import warnings as health
from minem.files import read_rows
from minem.runs.directory import read_journal


def counted(accepted: int, attempts: int, solved: int, *, prompts: str = "plain", **rejected: int) -> dict[str, Any]:
    """What Counts.summary says of an E-step on 100 questions; rejected draws are wrong unless said otherwise."""
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
    ("estep", "told"),
    [
        (counted(99, 100, 99), "train on harder ones"),
        (counted(100, 100, 100), "train on harder ones"),
        (counted(98, 100, 98), None),
        (counted(396, 400, 99, prompts="hinted"), "repeat the answer that they were shown"),
        (counted(99, 100, 99, prompts="hinted plain"), "train on harder ones"),
    ],
)
def test_everything_accepted(estep, told):
    said = health.everything_accepted(estep)
    assert said is None if told is None else said is not None and told in said
    assert health.of_draws(estep) == ([] if told is None else [said])


@pytest.mark.parametrize(
    ("estep", "told"),
    [
        (counted(4, 800, 4), "raise sampler.budget, or let star or pps"),
        (counted(5, 800, 5), None),
        (counted(0, 800, 0), None),  # a guard says it
        (counted(4, 800, 4, truncated=700, wrong=96), "raise sampler.max_new_tokens"),
        (counted(4, 800, 4, unparsed=700, wrong=96), "--verdict"),
        (counted(4, 800, 4, prompts="hinted plain"), "although the answer was shown"),
    ],
)
def test_almost_nothing_accepted(estep, told):
    said = health.almost_nothing_accepted(estep)
    assert said is None if told is None else said is not None and told in said
    assert said is None or "only 4 of 100 questions" in said


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
    said = health.loss_not_falling(losses)
    assert (said is not None) == warned
    assert said is None or "lower mstep.lr" in said
    assert health.loss_not_falling(losses[:3] + losses[4:7]) is None  # six steps say nothing


def test_a_loss_that_jumps_about_says_nothing():
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
    said = health.entropy_collapsing(entropies, solved)
    assert (said is not None) == warned
    assert health.of_training([], entropies, solved) == ([said] if warned else [])


# -------------------------------------------------------------------------------------------------------------- runs


def train(out: Path, *more: object):
    small = ["--limit", 32, "--iterations", 1, "--set", "eval.samples=0", "--set", "eval.diagnostics=0"]
    arguments = [str(a) for a in ("train", *small, "--set", "mstep.batch_size=4", "--out", out, *more)]
    return CliRunner().invoke(main, arguments)


def wrong(text, question):
    return "no such label"


def test_a_run_warns_once_keeps_it_and_reports_it(tmp_path):
    """pps on the toy: every draw is shown the answer, and hits it. At this rate the model is ruined."""
    much = ["--sampler", "pps", "--set", "mstep.lr=0.03", "--set", "mstep.warmup=0.9"]
    result = train(tmp_path / "run", *much)
    assert result.exit_code == 0, result.output
    journal = read_journal(tmp_path / "run")
    warnings = {stage: found for stage, kept in journal.items() if (found := kept.get("warnings"))}
    assert {stage.partition("/")[2] for stage in warnings} == {"estep", "mstep"}
    lines = [line for line in result.stderr.splitlines() if line.startswith("warning ")]
    assert [line.removeprefix("warning ") for line in lines] == [s for found in warnings.values() for s in found]
    assert any("minem show" in line for line in lines)
    assert any("the loss did not fall" in line for line in lines)
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("the loss did not fall") == sum("did not fall" in line for line in lines)
    again = train(tmp_path / "run", *much)
    assert "warning" not in again.stderr


def test_nothing_accepted_says_what_to_do(tmp_path):
    result = train(tmp_path / "run", "--verdict", f"{__name__}:wrong", "--budget", 1)
    assert result.exit_code == 4
    assert "raise sampler.budget, or let star or pps show the answer" in result.stderr


def test_each_step_has_its_metrics_and_all_are_finite(tmp_path):
    result = train(tmp_path / "run", "--json")
    assert result.exit_code == 0, result.output
    steps = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if row["stage"] == "iter-01/mstep"]
    kept = json.loads(result.stdout)["iterations"][1]["mstep"]
    assert len(steps) == kept["steps"] >= 6
    for row in [*steps, kept]:
        numbers = {k: row[k] for k in ("loss", "entropy", "grad_norm", "tokens_per_second", "peak_process_memory")}
        assert all(isinstance(n, int | float) and 0 < n < 1e12 for n in numbers.values())
        assert row["mfu"] is None  # nobody knows the peak of a CPU
        assert 10e6 < row["peak_process_memory"] < 100e9
    assert all(0 < row["lr"] <= 1e-3 for row in steps)
    assert max(row["peak_process_memory"] for row in steps) == kept["peak_process_memory"]
    shown = next(line for line in result.stderr.splitlines() if "M-step" in line and "done" in line)
    for fact in ("loss", "grad norm", "lr", "tokens/s", "peak memory"):
        assert f"  {fact} " in shown
