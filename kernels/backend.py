"""Which implementation of an operation runs: eager PyTorch or the Triton kernel.

python -m pytest tests/kernels/test_backend.py
"""

import os
from collections.abc import Callable
from typing import Any

import torch

jit: Callable[..., Any]
constexpr: Callable[[Any], Any]  # of a module's numbers that kernels read
try:
    import triton
    import triton.language as tl

    jit, constexpr = triton.jit, tl.constexpr
except ImportError:  # triton is for Linux; elsewhere the kernels stay unused Python functions
    triton = tl = None

    def jit(function: Any, **options: Any) -> Any:
        return function

    def constexpr(number: Any) -> Any:
        return number


def pick(backend: str | None, tensor: torch.Tensor) -> str:
    """Return "eager" or "triton" for an operation on `tensor`; None: by its device. ValueError if that cannot run."""
    if backend not in ("eager", "triton", None):
        raise ValueError(f'backend must be "eager", "triton" or None (by device), not {backend!r}')
    if backend is None:
        return "triton" if triton is not None and tensor.is_cuda and tensor.dtype != torch.float64 else "eager"
    if backend == "triton":
        if triton is None:
            raise ValueError('backend "triton" needs the triton package; pass backend="eager" or None')
        if tensor.dtype == torch.float64:
            raise ValueError('backend "triton" does not compute in float64; pass backend="eager" or None')
        if tensor.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError('backend "triton" needs a CUDA tensor (or TRITON_INTERPRET=1, which is for tests)')
    return backend
