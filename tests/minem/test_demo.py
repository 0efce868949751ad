"""The demo at full size: what the README claims of the embedded toy, run as a user would run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

RSM = ["--sampler", "rsm", "--budget", "8"]
RUNS = {
    "rsm": RSM,
    "control": [*RSM, "--set", "sampler.filter=none"],
    "star": ["--sampler", "star"],
    "pps": ["--sampler", "pps"],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """What each prints; two at a time, on one thread each."""
    out = tmp_path_factory.mktemp("demo")

    def train(name: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "minem", "train", *RUNS[name], "--out", str(out / name), "--json"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return json.loads(
            subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
        )

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(RUNS, pool.map(train, RUNS), strict=True))


def gain(result: dict[str, Any]) -> float:
    return result["test"]["last"]["accuracy"] - result["test"]["base"]["accuracy"]


@pytest.mark.slow
def test_the_demo_raises_accuracy(runs):
    """Proves the README's figures, which take the whole toy and four iterations."""
    test = runs["rsm"]["test"]
    assert test["base"]["n"] >= 300
    assert 0.35 <= test["base"]["accuracy"] <= 0.60
    assert gain(runs["rsm"]) >= 0.25
    assert test["mcnemar_p"] < 0.001


@pytest.mark.slow
def test_without_the_filter_most_of_the_gain_is_gone(runs):
    """Proves at full size that accuracy rises by the choice of samples, not by training alone."""
    assert runs["control"]["test"]["base"] == runs["rsm"]["test"]["base"]
    assert gain(runs["control"]) < gain(runs["rsm"]) / 2


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["star", "pps"])
def test_the_other_samplers_run_to_the_end(runs, sampler):
    """Proves at full size what they are for: fewer tokens drawn, more of the hinted draws accepted."""
    result = runs[sampler]
    assert len(result["iterations"]) == 5
    assert result["test"]["base"] == runs["rsm"]["test"]["base"]
    first, rsm = (r["iterations"][1]["estep"] for r in (result, runs["rsm"]))
    assert first["tokens"] < rsm["tokens"]
    assert first["acceptance"]["hinted"] > rsm["acceptance"]["plain"]
