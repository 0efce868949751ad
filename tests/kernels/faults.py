"""Faults put into the kernels one at a time: which of them do the tests catch on PTX, and which in the interpreter?

    python tests/kernels/faults.py                          # all of them, some ten minutes on two cores
    python tests/kernels/faults.py "a barrier"              # those with this in their description

Each is a replacement of text in a copy of the repository, and is refused unless its text is there exactly once. What
changes nothing is not among them: the barriers before a program is counted, for Triton puts one there by itself.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]


class Fault(NamedTuple):
    """tests: the file in tests/kernels/ and what `pytest -k` selects of it."""

    about: str
    file: str
    old: str
    new: str
    tests: tuple[str, str]


GATING = ("test_gating.py", "equals_the_definition and triton")
NORM = ("test_norm.py", "equals_the_definition and triton and True")
ROPE = ("test_rope.py", "equals_the_definition and triton or places_in_the_cache and triton")
LOSS = ("test_cross_entropy.py", "values_and_gradients and triton and 11-None or 11 and triton and None")
ATTENTION = ("test_attention.py", "equals_the_definition and triton or rotated and triton and True")
STEP = ("test_step.py", "triton")
SAMPLE = ("test_sampling.py", "triton_stop_tokens or 9001 or triton_strided or far_apart or 33")

FAULTS = [
    Fault("gating: no mask at the last load", "gating.py",
          "up = tl.load(gate_up_ptr + row * 2 * width + width + column, mask=mask, other=0.0).to(tl.float32)\n    out",
          "up = tl.load(gate_up_ptr + row * 2 * width + width + column).to(tl.float32)\n    out", GATING),
    Fault("gating: no mask at a store", "gating.py",
          "tl.store(grad_ptr + at + width, grad_up.to(grad_ptr.dtype.element_ty), mask=mask)",
          "tl.store(grad_ptr + at + width, grad_up.to(grad_ptr.dtype.element_ty))", GATING),
    Fault("gating: off by one channel", "gating.py", "    mask = column < width\n    at =",
          "    mask = column < width - 1\n    at =", GATING),
    Fault("norm: no mask at the load of the weight", "norm.py",
          "weight = tl.load(weight_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)\n    normed",
          "weight = tl.load(weight_ptr + column).to(tl.float32)\n    normed", NORM),
    Fault("norm: one row too many is written", "norm.py", "tl.store(inverse_ptr + row, inverse, mask=row < rows)",
          "tl.store(inverse_ptr + row, inverse, mask=row <= rows)", NORM),
    Fault("norm: the mean over the block instead of the width", "norm.py", "tl.sum(x * x, 1) / WIDTH + eps",
          "tl.sum(x * x, 1) / BLOCK + eps", NORM),
    Fault("norm: the last tile of a program is left out", "norm.py", "tl.program_id(0), tiles, tl.num_programs(0)",
          "tl.program_id(0), tiles - 1, tl.num_programs(0)", NORM),
    Fault("norm: a program sums into another's row", "norm.py", "partial_ptr + tl.program_id(0) * WIDTH + column",
          "partial_ptr + 0 * WIDTH + column", NORM),
    Fault("rotary: the sign of the turn", "rope.py",
          "first * cos - second * sin).to", "first * cos + second * sin).to", ROPE),
    Fault("rotary: no mask at the load of the heads", "rope.py",
          "raw_second = tl.load(qkv_ptr + at + HALF, mask=mask, other=0.0)",
          "raw_second = tl.load(qkv_ptr + at + HALF)", ROPE),
    Fault("rotary: every head is a key", "rope.py", "is_k = (head >= heads) & (head < heads + kv_heads)",
          "is_k = (head >= heads)", ROPE),
    Fault("loss: a barrier is missing before the row is overwritten", "cross_entropy.py",
          "            tl.debug_barrier()\n", "", LOSS),
    Fault("loss: no mask at a load", "cross_entropy.py",
          "start + columns, mask=inside, other=-float(\"inf\")).to(tl.float32)",
          "start + columns).to(tl.float32)", LOSS),
    Fault("loss: the target one to the right", "cross_entropy.py", "start + columns == target, grad",
          "start + columns == target + 1, grad", LOSS),
    Fault("attention: no mask at the load of the keys", "attention.py",
          "k = tl.load(k_base + position[:, None] * stride + channel[None, :], mask=kv_mask, other=0.0)",
          "k = tl.load(k_base + position[:, None] * stride + channel[None, :])", ATTENTION),
    Fault("attention: one position too many", "attention.py",
          "inside = position < end", "inside = position <= end", ATTENTION),
    Fault("attention: a barrier is missing before the new token is read", "attention.py",
          "                tl.debug_barrier()\n", "", ATTENTION),
    Fault("attention: the weights of the values in another dtype", "attention.py", "tl.dot(weights.to(v.dtype), v,",
          "tl.dot(weights.to(tl.float8e5).to(v.dtype), v,", ATTENTION),
    Fault("step: one column to the left", "step.py", "position = tl.load(ints_ptr + columns + slot)",
          "position = tl.load(ints_ptr + columns + slot - 1)", STEP),
    Fault("step: log-probabilities in half precision", "step.py",
          "tl.load(logprobs_ptr + sequence).to(tl.float64)",
          "tl.load(logprobs_ptr + sequence).to(tl.float16).to(tl.float64)", STEP),
    Fault("sample: no mask at the logits", "sampling_triton.py",
          "z = tl.load(row_ptr + column, mask=column < vocabulary, other=-float(\"inf\"))\n        peaks",
          "z = tl.load(row_ptr + column)\n        peaks", SAMPLE),
    Fault("sample: the offset of a row in 32 bits", "sampling_triton.py",
          "row * row_stride\n    state_ptr += row * STATE\n    bins_ptr",
          "(row * row_stride).to(tl.int32)\n    state_ptr += row * STATE\n    bins_ptr", SAMPLE),
    Fault("sample: one more than top-k is kept", "histogram.py", ">= needed) & (place", "> needed) & (place", SAMPLE),
    Fault("sample: every program is the last", "sampling_triton.py", "== count - 1", "<= count - 1", SAMPLE),
]  # fmt: skip


def caught(fault: Fault, ptx: bool) -> str:
    """What tests on a copy of the repository with the fault in it do: "caught", "missed", or "crashed"."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "minem"
        shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(".*", "runs", "data"))
        (copy / "data").symlink_to(ROOT / "data")
        path = copy / "kernels" / fault.file
        text = path.read_text()
        assert text.count(fault.old) == 1, f"{fault.about}: the text is there {text.count(fault.old)} times"
        path.write_text(text.replace(fault.old, fault.new))
        name, chosen = fault.tests
        arguments = ["-x", "-q", "-p", "no:cacheprovider", "--assert", "plain", f"tests/kernels/{name}"]
        arguments += ["-m", "not slow and not gpu", "-k", chosen, *(["--ptx", "sm_90"] if ptx else [])]
        child = os.fork()  # of a process that has loaded PyTorch, but not Triton
        if child == 0:
            with open(copy / "log", "w") as log:
                os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
            os.chdir(copy)
            sys.path[:0] = [str(copy)]
            os._exit(int(pytest.main(arguments)))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, 1) or status < 0, (copy / "log").read_text()  # not for want of tests
    return {0: "missed", 1: "caught"}.get(status, "crashed")


def main() -> None:
    chosen = [fault for fault in FAULTS if " ".join(sys.argv[1:]) in fault.about]
    print(f"{'fault':60s}  PTX     interpreter")
    found = []
    for fault in chosen:
        found.append([caught(fault, ptx) for ptx in (True, False)])
        print(f"{fault.about:60s}  {found[-1][0]:6s}  {found[-1][1]}", flush=True)
    ptx, interpreter = (sum(each[i] != "missed" for each in found) for i in (0, 1))
    print(f"caught on PTX: {ptx} of {len(chosen)}; in the interpreter: {interpreter}")


if __name__ == "__main__":
    main()
