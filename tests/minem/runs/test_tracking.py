"""Live tracking with a package that is not there, one that works, and one that fails."""

from __future__ import annotations

import io
import json
import shutil
import sys
from types import ModuleType
from typing import Any

import pytest

from minem.config import load_config
from minem.console import Progress
from minem.runs.directory import RunDirectory
from minem.runs.tracking import flatten, tracked
from tests.minem.tiny_runs import command, cut_journal, flags


class Recorder(ModuleType):
    """What wandb and trackio have in common: init, log and finish."""

    def __init__(self, name: str, fail: str = "") -> None:
        super().__init__(name)
        self.calls: list[tuple[str, Any]] = []
        self.fail = fail

    def _call(self, name: str, value: Any) -> None:
        self.calls.append((name, value))
        if name == self.fail:
            raise ConnectionError("no such server")

    def init(self, **named: Any) -> None:
        self._call("init", named)

    def log(self, values: dict[str, Any]) -> None:
        self._call("log", values)

    def finish(self) -> None:
        self._call("finish", None)


def test_a_run_is_tracked_by_the_calls_that_both_packages_take(finished_run, tmp_path, monkeypatch):
    tracker = Recorder("wandb")
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    out = shutil.copytree(finished_run, tmp_path / "tracked")
    cut_journal(out, "iter-00/eval.test")  # tracking is no part of the experiment: the run can be resumed with it
    done = command("train", *flags(), "--out", out, "--track", "wandb")
    assert done.exit_code == 0, done.output
    assert [call for call, _ in tracker.calls[:1]] == ["init"]
    begun = tracker.calls[0][1]
    assert (begun["project"], begun["name"]) == ("minem", "tracked")
    assert begun["config"]["sampler"]["budget"] == 2
    assert tracker.calls[-1] == ("finish", None)
    logged = [values for call, values in tracker.calls if call == "log"]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(logged) == len(lines) - 2  # those of the base model were measured before
    assert logged[-1]["eval.test/accuracy"] == lines[-1]["accuracy"]
    assert any("mstep/loss" in values and values["iteration"] == 1 for values in logged)
    assert all(type(value) in (int, float) for values in logged for value in values.values())
    assert "secret" not in repr(tracker.calls)


@pytest.mark.parametrize("fail", ["init", "log", "finish"])
def test_a_tracker_that_fails_does_not_stop_the_run(fail, tmp_path):
    tracker, printed = Recorder("trackio", fail), io.StringIO()
    config = load_config(flags={"run.out": str(tmp_path)})
    with RunDirectory.open(config) as run, tracked(run, tracker, Progress(printed)):
        for step in (1, 2):
            run.log_metrics("iter-01/mstep", {"step": step})
    assert printed.getvalue().count("trackio failed") == 1
    assert [call for call, _ in tracker.calls].count(fail) == 1  # it is left alone from then on
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_package_that_is_not_installed_is_named_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # so that an import fails
    out = tmp_path / "run"
    result = command("train", "--out", out, "--track", "wandb")
    assert result.exit_code == 2
    assert "pip install wandb" in result.stderr
    assert not out.exists()
    result = command("train", "--out", out, "--track", "wanbd")
    assert result.exit_code == 2
    assert "--track" in result.stderr
    assert "wandb" in result.stderr


def test_only_numbers_are_sent_under_names_of_their_own():
    values = {"loss": 0.5, "altered": ["x"], "valid": None, "on": True, "statuses": {"wrong": 3, "by": {"hinted": 1}}}
    assert flatten("iter-02/estep", values) == {
        "iteration": 2,
        "estep/loss": 0.5,
        "estep/statuses/wrong": 3,
        "estep/statuses/by/hinted": 1,
    }
