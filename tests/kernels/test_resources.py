"""Every kernel compiles ahead of time for sm_80 and sm_90, and none spills a register. Needs no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest


def resources(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m minem.kernels.resources` in a process of its own: this one's triton may be the interpreter."""
    command = [sys.executable, "-m", "minem.kernels.resources", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize("target", [pytest.param("sm_80", marks=pytest.mark.slow), "sm_90"])
def test_no_kernel_spills(target: str) -> None:
    done = resources("--target", target, "--json")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    report = json.loads(line)
    assert report["target"] == target
    names = {kernel["kernel"] for kernel in report["kernels"]}
    assert {"row_pass", "sample", "segments", "merge"} <= names
    for kernel in report["kernels"]:
        assert set(kernel) == {"kernel", "variant", "registers", "spills", "shared_bytes"}
        assert kernel["spills"] == 0, kernel
        assert 0 < kernel["registers"] <= 255
        assert kernel["shared_bytes"] <= 99 * 1024  # what every GPU from sm_80 on has for one program


def test_an_unknown_target_is_named() -> None:
    done = resources("--target", "hopper")
    assert done.returncode == 2
    assert "must be one of sm_80" in done.stderr
    assert "not 'hopper'" in done.stderr
    assert resources("--target", "sm_999").returncode == 2
    assert "Traceback" not in done.stderr
