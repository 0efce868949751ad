"""The benchmarks of prompts and shots run, and their numbers are those of the toolkit."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from minem.cli import main

ROOT = Path(__file__).parents[1]


def run(script: str, *arguments: str) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "bench" / script), "--model", "toy", "--json", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_prompt_set_is_measured_as_an_evaluation_would(tmp_path):
    task = ["--task", "toy", "--limit", "12", "--max-new-tokens", "64"]
    found = run("prompts.py", *task, "--sets", "toy", "--temperatures", "0")
    rows = {(row["set"], row["shots"], row["prompt"]): row for row in found["rows"]}
    assert list(rows) == [("toy", False, prompt) for prompt in ("plain", "forward", "derive", "justify")]
    command = ["eval", *task, "--split", "train", "--out", str(tmp_path / "eval"), "--json"]
    measured = json.loads(CliRunner().invoke(main, command).stdout.splitlines()[-1])
    plain = rows["toy", False, "plain"]
    assert (plain["accepted"], plain["lenient"]) == (measured["accuracy"], measured["flexible"])
    assert (plain["unparsed"], plain["truncated"]) == (measured["unparsed"], measured["truncated"])
    assert rows["toy", False, "forward"]["accepted"] > 0.9  # the toy knows how to use this hint
    assert plain["median_tokens"] > 5
    assert plain["short"] == 0
