"""What importing the kernels costs and needs, and which backend is picked."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import minem.kernels
from minem.kernels.backend import pick


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_loads_neither_torch_nor_triton() -> None:
    loaded = run("import sys, minem.kernels; print(sorted({'torch', 'triton', 'numpy'} & set(sys.modules)))")
    assert loaded == "[]"


def test_no_file_takes_the_place_of_a_function() -> None:
    code = "import minem.kernels as k, minem.kernels.{0}; print(all(callable(getattr(k, n)) for n in k.__all__))"
    for name in ("attention", "cross_entropy", "gating", "norm", "rope", "sampling"):
        assert run(code.format(name)) == "True"


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
    drawn, refused = run(code).splitlines()
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
    with pytest.raises(AttributeError, match="no attribute 'softmax'"):
        minem.kernels.softmax  # noqa: B018
