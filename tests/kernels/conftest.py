"""Where the kernels' tests run: natively on a GPU, or where there is none in Triton's interpreter.

Two things that the interpreter does otherwise than any GPU are put right here: it truncates when it narrows fp32 to
bf16, where the hardware rounds to nearest even, and it multiplies bf16 matrices as if their bit patterns were integers.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    import triton.language as tl
    from triton.runtime import interpreter

    _convert = interpreter._convert_float

    def _convert_rounding(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if source == tl.float32 and target == tl.bfloat16:
            narrow = torch.from_numpy(data.copy()).to(torch.bfloat16)
            return narrow.view(torch.int16).numpy().view("uint16")
        return _convert(data, source, target, mode)

    interpreter._convert_float = _convert_rounding
    _dot = interpreter.InterpreterBuilder.create_dot

    def _dot_widened(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return _dot(
            self, *(self.create_fp_ext(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)), *rest
        )

    interpreter.InterpreterBuilder.create_dot = _dot_widened


@pytest.fixture(scope="session")
def device() -> str:
    """The device on which Triton kernels can be called here."""
    return "cuda" if torch.cuda.is_available() else "cpu"
