"""Which of the two implementations of an operation runs: the eager PyTorch one or the Triton kernel."""

from __future__ import annotations

import importlib.util
import os

import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None


def pick(backend: str | None, tensor: torch.Tensor) -> str:
    """Return "eager" or "triton" for an operation on `tensor`; `backend` None means: by its device.

    Raises ValueError for a name that is neither, and for "triton" where it cannot run.
    """
    if backend is None:
        return "triton" if tensor.is_cuda and HAS_TRITON else "eager"
    if backend not in ("eager", "triton"):
        raise ValueError(f'backend must be "eager", "triton" or None (by device), not {backend!r}')
    if backend == "triton":
        if not HAS_TRITON:
            raise ValueError('backend "triton" needs the triton package; pass backend="eager" or None')
        if tensor.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError('backend "triton" needs a CUDA tensor (or TRITON_INTERPRET=1, which is for tests)')
    return backend
