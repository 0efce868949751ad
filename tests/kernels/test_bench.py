"""The kernels' benchmark scripts run here, GPU or not, and hold what they claim."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench"


def report(script: str, *arguments: str) -> Any:
    """The JSON that a benchmark prints as its last line."""
    command = [sys.executable, BENCH / script, *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_peak_memory_of_the_loss_does_not_grow_with_its_rows() -> None:
    memory = report("memory.py")
    assert memory["holds"]
    assert memory["peak_bytes"]["8192"] < 1e9


@pytest.mark.slow
def test_every_operation_is_checked_and_timed_beside_pytorch() -> None:
    rows = report("kernels.py")["rows"]
    names = {row["operation"].split(",")[0] for row in rows}
    assert names >= {"linear_cross_entropy", "sample", "decode_attention", "rms_norm + residual", "swiglu", "rotary"}
    for row in rows:
        assert row["floor_s"] > 0
        assert {"minem", "PyTorch"} <= set(row["seconds"]), row["failed"]
