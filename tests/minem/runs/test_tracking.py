"""Live tracking with a package that is not there, one that works, and one that fails."""

from __future__ import annotations

import json
import sys
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner

from minem.cli import main
from minem.runs.tracking import flatten

TINY = ["train", "--limit", "8", "--iterations", "1", "--budget", "2", "--set", "eval.samples=0"]


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


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_run_is_tracked_by_the_calls_that_both_packages_take(name, tmp_path, monkeypatch):
    tracker = Recorder(name)
    monkeypatch.setitem(sys.modules, name, tracker)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    out = tmp_path / "tracked"
    done = CliRunner().invoke(main, [*TINY, "--out", str(out), "--track", name])
    assert done.exit_code == 0, done.output
    assert [call for call, _ in tracker.calls[:1]] == ["init"]
    begun = tracker.calls[0][1]
    assert (begun["project"], begun["name"]) == ("minem", "tracked")
    assert begun["config"]["sampler"]["budget"] == 2
    assert tracker.calls[-1] == ("finish", None)
    logged = [values for call, values in tracker.calls if call == "log"]
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert len(logged) == len(lines)
    assert logged[0]["eval.validation/accuracy"] == json.loads(lines[0])["accuracy"]
    assert any("mstep/loss" in values and values["iteration"] == 1 for values in logged)
    assert all(type(value) in (int, float) for values in logged for value in values.values())
    assert "secret" not in repr(tracker.calls)
    again = CliRunner().invoke(main, [*TINY, "--out", str(out)])  # tracking is no part of the experiment
    assert again.exit_code == 0, again.output


@pytest.mark.parametrize("fail", ["init", "log", "finish"])
def test_a_tracker_that_fails_does_not_stop_the_run(fail, tmp_path, monkeypatch):
    tracker = Recorder("trackio", fail)
    monkeypatch.setitem(sys.modules, "trackio", tracker)
    done = CliRunner().invoke(main, [*TINY, "--out", str(tmp_path / "run"), "--track", "trackio"])
    assert done.exit_code == 0, done.output
    assert done.stderr.count("trackio failed") == 1
    assert [call for call, _ in tracker.calls].count(fail) == 1  # it is left alone from then on


def test_a_package_that_is_not_installed_is_named_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # so an import fails, whatever is installed here
    out = tmp_path / "run"
    result = CliRunner().invoke(main, [*TINY, "--out", str(out), "--track", "wandb"])
    assert result.exit_code == 2
    assert "pip install wandb" in result.stderr
    assert not out.exists()
    result = CliRunner().invoke(main, [*TINY, "--out", str(out), "--track", "wanbd"])
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
