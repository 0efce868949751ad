"""RMSNorm, with the residual addition before it: sum = x + residual, normed = sum / rms(sum) * weight.

Bytes moved: x and residual in, sum and normed out, 8 D a row in bf16, and 8 D backward. PyTorch writes the sum and
reads it again: 10 D bytes and two launches. The weight's gradient is summed by a fixed number of programs, each into
its own row, and these are added in order: no atomics, so bit-equal from run to run.

    python -m pytest tests/kernels/test_norm.py
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minem.kernels.backend import jit, pick, tl

BACKWARD_PROGRAMS = 256  # at most; about two for each SM of an H100 or H200


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """RMSNorm over the last dimension (Zhang and Sennrich 2019, arXiv 1910.07467) of x, or of x + residual.

    x [..., D], residual of the same shape or None, weight [D], all of one floating dtype; eps is added to the mean
    square. backend: "eager", "triton" or None (by device).

    Returns (normed [..., D], sum [..., D]), sum being x + residual rounded to the dtype, or x itself without one.
    Differentiable. Raises ValueError for shapes or dtypes that do not fit.
    """
    if weight.shape != x.shape[-1:] or (residual is not None and residual.shape != x.shape):
        shapes = [list(t.shape) for t in (x, weight, residual) if t is not None]
        raise ValueError(f"x [..., D], weight [D] and residual [..., D] must fit; got {', '.join(map(str, shapes))}")
    if weight.dtype != x.dtype or (residual is not None and residual.dtype != x.dtype):
        raise ValueError(f"x, weight and residual must have one dtype; x has {x.dtype}, weight {weight.dtype}")
    if pick(backend, x) == "triton":
        return _RMSNorm.apply(x, weight.contiguous(), eps, residual)
    total = x if residual is None else x + residual
    return F.rms_norm(total, weight.shape, weight, eps), total


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        added = rows if residual is None else residual.reshape(rows.shape).contiguous()
        normed, total = torch.empty_like(rows), rows if residual is None else torch.empty_like(rows)
        inverse = torch.empty(len(rows), dtype=torch.float32, device=x.device)
        grid, options = _tiles(rows)
        _norm_forward_kernel[grid](
            rows, added, weight, normed, total, inverse, len(rows), eps, HAS_RESIDUAL=residual is not None, **options
        )
        ctx.save_for_backward(total, weight, inverse)
        ctx.has_residual = residual is not None
        # without a residual: a new output for autograd in the memory of x
        return normed.view(x.shape), x.view_as(x) if residual is None else total.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_normed: Tensor, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        total, weight, inverse = ctx.saved_tensors
        shape = grad_normed.shape
        grad_normed, grad_total = (g.reshape(total.shape).contiguous() for g in (grad_normed, grad_total))
        grad = torch.empty_like(total)
        (tiles,), options = _tiles(total)
        programs = min(tiles, BACKWARD_PROGRAMS)
        partial = torch.empty(programs, total.shape[1], dtype=torch.float32, device=total.device)
        _norm_backward_kernel[(programs,)](
            grad_normed, grad_total, total, weight, inverse, grad, partial, len(total), tiles, **options
        )
        grad = grad.view(shape)
        return grad, partial.sum(0).to(weight.dtype), None, grad if ctx.has_residual else None


def _tiles(rows: Tensor) -> tuple[tuple[int], dict[str, int]]:
    """The grid and launch options for rows [N, D]: several short rows a program, or one long one."""
    n, width = rows.shape
    block = max(16, 1 << (width - 1).bit_length())
    height = max(1, 2048 // block)
    options = {"WIDTH": width, "BLOCK": block, "ROWS": height, "num_warps": min(16, max(4, block // 256))}
    return (-(-n // height),), options


@jit
def _norm_forward_kernel(  # type: ignore[no-untyped-def]
    x_ptr, residual_ptr, weight_ptr, normed_ptr, total_ptr, inverse_ptr, rows, eps,
    HAS_RESIDUAL: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    at = row[:, None] * WIDTH + column[None, :]
    mask = (row[:, None] < rows) & (column[None, :] < WIDTH)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
        rounded = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + at, rounded, mask=mask)
        x = rounded.to(tl.float32)  # the norm sees what the next layer will
    inverse = tl.rsqrt(tl.sum(x * x, 1) / WIDTH + eps)
    tl.store(inverse_ptr + row, inverse, mask=row < rows)
    weight = tl.load(weight_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    normed = x * inverse[:, None] * weight[None, :]
    tl.store(normed_ptr + at, normed.to(normed_ptr.dtype.element_ty), mask=mask)


@jit
def _norm_backward_kernel(  # type: ignore[no-untyped-def]
    grad_normed_ptr, grad_total_ptr, total_ptr, weight_ptr, inverse_ptr, grad_ptr, partial_ptr, rows, tiles,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((BLOCK,), tl.float32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        at = row[:, None] * WIDTH + column[None, :]
        mask = (row[:, None] < rows) & (column[None, :] < WIDTH)
        inverse = tl.load(inverse_ptr + row, mask=row < rows, other=0.0)
        unit = tl.load(total_ptr + at, mask=mask, other=0.0).to(tl.float32) * inverse[:, None]
        grad_normed = tl.load(grad_normed_ptr + at, mask=mask, other=0.0).to(tl.float32)
        grad_weight += tl.sum(grad_normed * unit, 0)
        grad_unit = grad_normed * weight[None, :]
        # moving along `unit` changes the length only, which the norm takes back
        along = tl.sum(grad_unit * unit, 1) / WIDTH
        grad = (grad_unit - unit * along[:, None]) * inverse[:, None]
        grad += tl.load(grad_total_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_ptr + at, grad.to(grad_ptr.dtype.element_ty), mask=mask)
    tl.store(partial_ptr + tl.program_id(0) * WIDTH + column, grad_weight, mask=column < WIDTH)
