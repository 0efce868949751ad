"""The loss's peak memory on the CPU does not grow with its rows: bench/memory.py holds its own bounds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_peak_memory_of_the_loss() -> None:
    script = Path(__file__).parents[2] / "bench" / "memory.py"
    done = subprocess.run([sys.executable, script, "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["holds"]
    assert report["peak_bytes"]["8192"] < 1e9
