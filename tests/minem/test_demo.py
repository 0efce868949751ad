"""The demo at full size: what the README claims of the embedded toy, run as a user would run it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def train(out: Path, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "minem", "train", *arguments, "--out", str(out), "--json"]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> dict[str, Any]:
    return train(tmp_path_factory.mktemp("demo") / "run", "--sampler", "rsm", "--budget", "8")


def gain(result: dict[str, Any]) -> float:
    return result["test"]["last"]["accuracy"] - result["test"]["base"]["accuracy"]


@pytest.mark.slow
def test_the_demo_raises_accuracy(demo):
    test = demo["test"]
    assert test["base"]["n"] >= 300
    assert 0.35 <= test["base"]["accuracy"] <= 0.60
    assert gain(demo) >= 0.25
    assert test["mcnemar_p"] < 0.001


@pytest.mark.slow
def test_without_the_filter_most_of_the_gain_is_gone(demo, tmp_path):
    control = train(tmp_path / "run", "--sampler", "rsm", "--budget", "8", "--set", "sampler.filter=none")
    assert control["test"]["base"] == demo["test"]["base"]
    assert gain(control) < gain(demo) / 2


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["star", "pps"])
def test_the_other_samplers_run_to_the_end(demo, sampler, tmp_path):
    result = train(tmp_path / "run", "--sampler", sampler)
    assert len(result["iterations"]) == 5
    assert result["test"]["base"] == demo["test"]["base"]
    first, rsm = (r["iterations"][1]["estep"] for r in (result, demo))
    assert first["tokens"] < rsm["tokens"]  # what they are for: fewer tokens drawn
    assert first["acceptance"]["hinted"] > rsm["acceptance"]["plain"]
