"""The counts of bench/results are ceilings: of no kernel may instructions, bytes, idle CTAs or launches grow.

python -m minem.kernels.counts --json > bench/results/counts.sm_90.json     # where they fell
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from minem.kernels.counts import main

ROOT = Path(__file__).resolve().parents[2]
CEILINGS = json.loads((ROOT / "bench/results/counts.sm_90.json").read_text())
PART = """
import json, sys
sys.path.insert(0, "bench")
from tests.kernels import counting
from tests.kernels.ptx.launch import install
launches = {"qwen2.5-3b": {1: counting.launches_of_a_step(counting.SHAPES[1], 1).total()}}
install("sm_90")
kernels = [counting.count(case) for case in counting._elementwise(counting.SHAPES[0])]
print(json.dumps({"target": "sm_90", "kernels": kernels, "launches_per_step": launches}))
"""


def counted(*arguments: str) -> Any:
    """The last line of a child process, because triton is the interpreter in this one."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def assert_below_the_ceilings(found: Any) -> None:
    ceilings = {(row["kernel"], row["variant"]): row for row in CEILINGS["kernels"]}
    assert found["target"] == CEILINGS["target"]
    assert found["kernels"]
    for row in found["kernels"]:
        for name, number in row.items():
            if name not in ("kernel", "variant", "ctas"):
                assert number <= ceilings[row["kernel"], row["variant"]][name], (row, name)
    for model, steps in found["launches_per_step"].items():
        for batch, number in steps.items():
            assert number <= CEILINGS["launches_per_step"][model][str(batch)], (model, batch)


def test_the_small_kernels_and_the_launches_of_a_step_do_not_grow() -> None:
    assert_below_the_ceilings(counted("-c", PART))


@pytest.mark.slow
def test_no_count_grows() -> None:
    """The whole table, from the command: three minutes of running PTX."""
    found = counted("-m", "minem.kernels.counts", "--target", "sm_90", "--json")
    assert_below_the_ceilings(found)
    assert {(row["kernel"], row["variant"]) for row in found["kernels"]} == {
        (row["kernel"], row["variant"]) for row in CEILINGS["kernels"]
    }
    assert found["launches_per_step"].keys() == CEILINGS["launches_per_step"].keys()


def test_what_it_cannot_do_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for arguments, named in ((["--target", "hopper"], "'sm_90'"), ([], "unset TRITON_INTERPRET")):
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 2
        assert named in result.output
