"""SwiGLU's elementwise half: silu(gate) * up, from one merged projection (Shazeer 2020, arXiv 2002.05202).

Bytes moved for each channel in bf16: 6 forward (gate and up in, the product out), 10 backward (gate, up and the
gradient in, two gradients out). PyTorch alone writes silu(gate) and reads it again, 10 bytes forward.

    python -m pytest tests/kernels/test_gating.py
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minem.kernels.backend import jit, pick, tl


def swiglu(gate_up: Tensor, *, backend: str | None = None) -> Tensor:
    """silu(gate) * up, where gate_up [..., 2 I] holds the gate in its first half: [..., I] in the same dtype.

    backend: "eager", "triton" or None (by device). Differentiable. Raises ValueError for an odd last dimension.
    """
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up must have an even last dimension, gate and up; got {list(gate_up.shape)}")
    if pick(backend, gate_up) == "triton":
        return _SwiGLU.apply(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        rows = gate_up.reshape(-1, gate_up.shape[-1]).contiguous()
        out = rows.new_empty(len(rows), rows.shape[1] // 2)
        grid, options = _tiles(out)
        _swiglu_forward_kernel[grid](rows, out, out.shape[1], **options)
        ctx.save_for_backward(rows)
        return out.view(*gate_up.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> Tensor:
        (rows,) = ctx.saved_tensors
        shape = (*grad_out.shape[:-1], rows.shape[1])
        grad_out = grad_out.reshape(len(rows), -1).contiguous()
        grad = torch.empty_like(rows)
        grid, options = _tiles(grad_out)
        _swiglu_backward_kernel[grid](rows, grad_out, grad, grad_out.shape[1], **options)
        return grad.view(shape)


def _tiles(out: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid and launch options for an output [N, I]: 1,024 channels of one row a program."""
    rows, width = out.shape
    block = min(1024, max(16, 1 << (width - 1).bit_length()))
    return (rows, -(-width // block)), {"BLOCK": block, "num_warps": 4}


@jit
def _swiglu_forward_kernel(gate_up_ptr, out_ptr, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    gate = tl.load(gate_up_ptr + row * 2 * width + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * width + width + column, mask=mask, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * width + column, out.to(out_ptr.dtype.element_ty), mask=mask)


@jit
def _swiglu_backward_kernel(  # type: ignore[no-untyped-def]
    gate_up_ptr, grad_out_ptr, grad_ptr, width, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    at = row * 2 * width + column
    gate = tl.load(gate_up_ptr + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + at + width, mask=mask, other=0.0).to(tl.float32)
    grad_out = tl.load(grad_out_ptr + row * width + column, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    # silu'(x) = sigmoid(x) (1 + x (1 - sigmoid(x)))
    grad_gate = grad_out * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    grad_up = grad_out * gate * sigmoid
    tl.store(grad_ptr + at, grad_gate.to(grad_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_ptr + at + width, grad_up.to(grad_ptr.dtype.element_ty), mask=mask)
