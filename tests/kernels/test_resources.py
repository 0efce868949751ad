"""Every kernel compiles ahead of time for sm_80 and sm_90, and none spills a register. Needs no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from resources import OTHERS, SHAPES, Resources, main

BENCH = Path(__file__).parents[2] / "bench"
QUICK = f"""
import sys; sys.path.insert(0, {str(BENCH)!r})
from resources import OTHERS, SHAPES, measure
print([tuple(row) for row in measure("sm_90", (SHAPES[0], OTHERS[0]))])
"""


def compile_ahead(*arguments: str) -> str:
    """A child process, because triton is the interpreter in this one."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_no_kernel_spills_at_the_shapes_of_two_models() -> None:
    rows = [Resources(*row) for row in eval(compile_ahead("-c", QUICK))]
    forward = {"row_pass", "attention", "plan", "begin", "end", "norm_forward", "swiglu_forward", "rotary"}
    forward |= {"statistics", "histogram", "draw"}
    assert {row.kernel for row in rows} == forward | {"norm_backward", "swiglu_backward"}
    for row in rows:
        assert row.spills == 0, row
        assert 0 < row.registers <= 255
        assert row.shared_bytes <= 99 * 1024  # what every GPU from sm_80 on has for one program


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_no_kernel_spills(target: str) -> None:
    """The command, at the shapes of all eight models and for both generations of GPU: a minute of compiling."""
    about, header, *rows = compile_ahead(str(BENCH / "resources.py"), "--target", target).splitlines()
    assert about.startswith(f"{target}, triton ")
    assert header.split() == ["kernel", "variant", "registers", "spills", "shared", "bytes"]
    assert {row.split()[1] for row in rows} >= {shape.name for shape in (*SHAPES, *OTHERS)} - {"llama-3.1-8b"}
    assert {row.split()[-2] for row in rows} == {"0"}


def test_bad_calls_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for target, named in (("hopper", "'sm_90'"), ("sm_999", "'sm_80'"), ("sm_90", "unset TRITON_INTERPRET")):
        result = CliRunner().invoke(main, ["--target", target])
        assert result.exit_code == 2
        assert named in result.output
