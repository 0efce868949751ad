"""What the kernels' package holds, that it needs no triton, and which backend is picked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import minem.kernels
from minem.kernels.backend import pick


def test_no_file_takes_the_place_of_a_function() -> None:
    """Importing minem.kernels.x puts the module x into the package, over a function of that name."""
    assert all(callable(getattr(minem.kernels, name)) for name in minem.kernels.__all__)
    assert not {path.stem for path in Path(minem.kernels.__file__).parent.glob("*.py")} & set(minem.kernels.__all__)


def test_every_operation_imports_and_runs_without_triton() -> None:
    code = """
import sys
sys.modules["triton"] = None  # as where it is not installed
import torch
import minem.kernels as k
assert all(callable(getattr(k, name)) for name in k.__all__)
x, zero = torch.ones(2, 4), torch.zeros(2, dtype=torch.int64)
print(k.sample(x, x[:, 0], zero, x[:, 0], 0 * x[:, 0], zero, zero)[1].exp().tolist())
try:
    k.swiglu(x, backend="triton")
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    drawn, refused = done.stdout.splitlines()
    assert drawn == "[0.25, 0.25]"
    assert "needs the triton package" in refused


def test_pick() -> None:
    x = torch.ones(1)
    assert pick(None, x) == "eager"
    assert pick("eager", x) == "eager"
    with pytest.raises(ValueError, match='"eager", "triton" or None'):
        pick("cuda", x)
    with pytest.raises(ValueError, match="float64"):
        pick("triton", x.double())
