"""Linear layer and cross-entropy in one, without ever holding the [N, V] logits.

    loss = -sum_n weight_n * log softmax(hidden_n @ W.T)[target_n]

The per-token weights are known in the forward pass, and with them the gradient of a chunk of logits, weight_n *
(softmax - onehot): three products of 2 N V D operations, where a backward pass would compute the logits again.

    one chunk of rows:  logits [C, V] = hidden @ W.T                                  product 1
                        row pass: log-probability, entropy, gradient in place
                        grad_hidden [C, D] = grad_logits @ W                          product 2
                        grad_W [V, D] (fp32) += grad_logits.T @ hidden                product 3

The first chunk writes grad_W, and the weights carry every factor of the loss: no pass over [V, D] beside the products.

Triton: a program of the row pass reads a row twice (statistics, then gradient) and writes it once. There is one program
a multiprocessor, for row after row, so that all rows in work (132 of 304 kB at V=151,936) stay in the L2 cache until
their second reading. For bf16 that moves 4 N V bytes: at N=8192, V=151,936 5 GB, an estimated 1.16 ms at 4.3 TB/s, and
0.29 ms for reading grad_W before the second chunk of 4,096 rows: 7.5 % of the products' 19.4 ms (cuBLAS).

    python -m pytest tests/kernels/test_cross_entropy.py
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minem.kernels.backend import jit, pick, tl

# Rows of logits in a chunk; whether hidden and weight get gradients; the function for a chunk's rows.
Options = tuple[int, tuple[bool, bool], Callable[..., Tensor]]
# Bytes of one chunk of logits. Every chunk reads and writes the whole gradient of W once more, so it is large.
CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 1280 << 20}
CHUNK_ROWS = 4096  # on a GPU a chunk has at most a multiple of this, and this even if it has more bytes


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor | None = None,
    *,
    ignore_index: int = -100,
    chunk_rows: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted negative log-likelihood of `targets` under softmax(hidden @ weight.T).

    hidden [N, D] and weight [V, D] of one floating dtype; targets [N] int64; token_weights [N] (constants; None: all
    1). Rows with the target `ignore_index` or the weight 0 give 0 everywhere, if their hidden states are finite.
    chunk_rows: rows of logits held at once (None: by `CHUNK_BYTES`). backend: "eager", "triton" or None (by device).

    Returns (loss [], token_logprobs [N], token_entropy [N]) in float32 (float64 for float64 inputs), in nats.
    loss = -sum(token_weights * token_logprobs), undivided; the other two are detached. Gradients flow to hidden and
    weight, and only once: no second derivatives, and by the Triton kernel no second backward pass through one call. The
    weight's is accumulated in fp32 over chunks and returned in `weight.grad_dtype`. Without gradients (no_grad, or
    nothing requires them) only the first product is computed.

    Raises ValueError for shapes or dtypes that do not fit. A target outside [0, V) is a RuntimeError in eager mode; the
    Triton kernel, which cannot raise, makes its log-probability and the loss NaN.
    """
    _check(hidden, weight, targets, token_weights, chunk_rows)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    active = targets != ignore_index
    if token_weights is not None:
        active &= token_weights != 0
    weights = active.to(wide) if token_weights is None else token_weights.to(wide).masked_fill(~active, 0.0)
    targets = targets.masked_fill(~active, 0)
    if chunk_rows is None:
        chunk_rows = chunk_rows_of(len(hidden), weight.shape[0] * weight.element_size(), hidden.device.type)
    grads = torch.is_grad_enabled()
    needs = (grads and hidden.requires_grad, grads and weight.requires_grad)
    row_pass = _row_pass_triton if pick(backend, hidden) == "triton" else _row_pass_eager
    # The inputs alone say which dtype is used, not autocast (which meta tensors, that only compile, do not know).
    with nullcontext() if hidden.is_meta else torch.autocast(hidden.device.type, enabled=False):
        return _LinearCrossEntropy.apply(hidden, weight, targets, weights, (chunk_rows, needs, row_pass))


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor | None, chunk_rows: int | None) -> None:
    if hidden.ndim != 2 or weight.shape != (len(weight), hidden.shape[1]) or len(weight) == 0:
        shapes = f"{list(hidden.shape)} and {list(weight.shape)}"
        raise ValueError(f"hidden [N, D] and weight [V, D] must share D, and V is at least 1; got {shapes}")
    if not hidden.is_floating_point() or hidden.dtype != weight.dtype:
        raise ValueError(f"hidden and weight must have one floating dtype; got {hidden.dtype} and {weight.dtype}")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64 [{hidden.shape[0]}]; got {targets.dtype} {list(targets.shape)}")
    if weights is not None and weights.shape != targets.shape:
        raise ValueError(f"token_weights must be [{hidden.shape[0]}]; got {list(weights.shape)}")
    if weights is not None and weights.requires_grad:
        raise ValueError("token_weights are constants of the loss; pass them detached")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1; got {chunk_rows}")


def chunk_rows_of(rows: int, row_bytes: int, device: str) -> int:
    """Rows of logits in a chunk. On a GPU chunks are equal: a small last one would cost as much for grad_W."""
    if device == "cpu":
        return max(64, CHUNK_BYTES["cpu"] // row_bytes)
    most = max(1, CHUNK_BYTES["cuda"] // row_bytes // CHUNK_ROWS) * CHUNK_ROWS
    equal = -(-rows // max(1, -(-rows // most)))
    return max(128, -(-equal // 128) * 128)  # whole tiles of the products


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients in the forward pass, where the logits are; backward scales them if the loss was scaled."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, options: Options
    ) -> tuple[Tensor, Tensor, Tensor]:
        chunk_rows, needs, row_pass = options
        grad_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs[0] else None
        grad_weight = None
        logprobs, entropy = torch.empty_like(weights), torch.empty_like(weights)
        for start in range(0, hidden.shape[0], chunk_rows):
            rows = slice(start, start + chunk_rows)
            logits = hidden[rows] @ weight.t()
            grad_logits = row_pass(logits, targets[rows], weights[rows], logprobs[rows], entropy[rows], any(needs))
            del logits  # the row pass may have worked in place; the name must not keep a second chunk alive
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[rows])
            if needs[1]:
                grad_weight = _accumulate(grad_weight, grad_logits, hidden[rows], weights.dtype)
            del grad_logits
        if needs[1] and grad_weight is None:  # no rows
            grad_weight = weight.new_zeros(weight.shape, dtype=weights.dtype)
        loss = -(weights * logprobs).sum()
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.in_place, ctx.scaled = row_pass is _row_pass_triton and hidden.is_cuda, False
        # Only a leaf has a `grad_dtype`; asking any other tensor for it raises.
        ctx.weight_grad_dtype = (getattr(weight, "grad_dtype", None) if weight.is_leaf else None) or weight.dtype
        ctx.mark_non_differentiable(logprobs, entropy)
        return loss, logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.scaled:
            raise RuntimeError("on a GPU linear_cross_entropy gives its gradients once; call it again")
        grad_hidden, grad_weight = ctx.saved_tensors
        if ctx.in_place:
            ctx.scaled = True
            for grad in filter(torch.is_tensor, ctx.saved_tensors):
                _scale_kernel[(8 * _multiprocessors(grad),)](grad, grad_loss, grad.numel(), BLOCK=4096)
            return grad_hidden, None if grad_weight is None else grad_weight.to(ctx.weight_grad_dtype), None, None, None
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_loss.to(grad_hidden.dtype)
        if grad_weight is not None:  # scaled and cast in one pass over [V, D]
            scaled = torch.empty_like(grad_weight, dtype=ctx.weight_grad_dtype)
            grad_weight = torch.mul(grad_weight, grad_loss, out=scaled)
        return grad_hidden, grad_weight, None, None, None


def _row_pass_eager(
    logits: Tensor, targets: Tensor, weights: Tensor, logprobs: Tensor, entropy: Tensor, needs_grad: bool
) -> Tensor:
    """Fill logprobs and entropy [C]; return the gradient of the logits [C, V] in their dtype (if needs_grad)."""
    shifted = logits.to(weights.dtype)  # fp32 logits are overwritten: they are this function's to use up
    shifted -= shifted.amax(dim=-1, keepdim=True)
    exps = shifted.exp()
    total = exps.sum(dim=-1)
    log_total = total.log()
    index = targets.unsqueeze(1)
    ignored = weights == 0
    logprobs.copy_(shifted.gather(1, index).squeeze(1) - log_total).masked_fill_(ignored, 0.0)
    entropy.copy_(log_total - shifted.mul_(exps).sum(dim=-1) / total).masked_fill_(ignored, 0.0)
    if not needs_grad:
        return logits
    del shifted
    grad = exps.mul_((weights / total).unsqueeze(1))
    grad.scatter_add_(1, index, -weights.unsqueeze(1))
    return grad.to(logits.dtype)


def _row_pass_triton(
    logits: Tensor, targets: Tensor, weights: Tensor, logprobs: Tensor, entropy: Tensor, needs_grad: bool
) -> Tensor:
    """As `_row_pass_eager`, the gradient in place of the logits [C, V], which must be contiguous."""
    rows, vocabulary = logits.shape
    block = min(16384, max(256, 1 << (vocabulary - 1).bit_length()))
    warps = max(4, block // 512)  # 16 numbers a thread: wide loads
    arguments = (logits, targets, weights, logprobs, entropy, rows, vocabulary)
    grid = (min(rows, _multiprocessors(logits)),)
    _row_pass_kernel[grid](*arguments, NEEDS_GRAD=needs_grad, BLOCK=block, num_warps=warps)
    return logits


def _multiprocessors(x: Tensor) -> int:
    """Of the GPU that holds x; elsewhere an H200's."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 132


@jit
def _row_pass_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, targets_ptr, weights_ptr, logprobs_ptr, entropy_ptr, rows, vocabulary,
    NEEDS_GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK)
    for row in range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        row_ptr = logits_ptr + row * vocabulary  # int64: 14,000 rows of Qwen's vocabulary pass 2^31
        weight = tl.load(weights_ptr + row)
        target = tl.load(targets_ptr + row)
        # A target outside the vocabulary must not be read; NaN makes the loss say so.
        known = (target >= 0) & (target < vocabulary)
        target_logit = tl.load(row_ptr + target, mask=known, other=float("nan")).to(tl.float32)
        end = tl.where(weight != 0, vocabulary, 0)  # rows of weight 0 are not read

        # Pass 1, online: the largest logit so far, and relative to it the sums of e = exp(z - peak) and e (z - peak).
        # When the peak rises by r, every z - peak falls by r and every e shrinks by exp(-r).
        peak = -1e30  # finite, for the first rise must not be infinite
        total = 0.0
        dot = 0.0
        for start in range(0, end, BLOCK):
            inside = start + columns < vocabulary
            z = tl.load(row_ptr + start + columns, mask=inside, other=-float("inf")).to(tl.float32)
            new_peak = tl.maximum(peak, tl.max(z, 0))
            rise = new_peak - peak
            shrink = tl.exp(-rise)
            shifted = tl.where(inside, z - new_peak, 0.0)
            e = tl.where(inside, tl.exp(shifted), 0.0)
            dot = (dot - total * rise) * shrink + tl.sum(e * shifted, 0)
            total = total * shrink + tl.sum(e, 0)
            peak = new_peak

        total = tl.where(weight != 0, total, 1.0)
        log_total = tl.log(total)
        tl.store(logprobs_ptr + row, tl.where(weight != 0, target_logit - peak - log_total, 0.0))
        tl.store(entropy_ptr + row, tl.where(weight != 0, log_total - dot / total, 0.0))

        # Pass 2: weight * (softmax - onehot) over the logits, once all threads have read the target's logit.
        if NEEDS_GRAD:
            tl.debug_barrier()
            scale = weight / total
            for start in range(0, vocabulary, BLOCK):
                inside = start + columns < vocabulary
                read = start + columns < end
                z = tl.load(row_ptr + start + columns, mask=read, other=-float("inf")).to(tl.float32)
                grad = tl.exp(z - peak) * scale
                grad = tl.where(start + columns == target, grad - weight, grad)
                tl.store(row_ptr + start + columns, grad.to(logits_ptr.dtype.element_ty), mask=inside)


def _accumulate(grad_weight: Tensor | None, grad_logits: Tensor, hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """grad_weight [V, D] + grad_logits.T @ hidden, summed over chunks in `dtype` (fp32) for any dtype of the inputs."""
    if hidden.dtype == dtype:
        return grad_logits.t() @ hidden if grad_weight is None else grad_weight.addmm_(grad_logits.t(), hidden)
    if not hidden.is_cuda:
        product = (grad_logits.t() @ hidden).to(dtype)
        return product if grad_weight is None else grad_weight.add_(product)
    if grad_weight is None:
        return torch.mm(grad_logits.t(), hidden, out_dtype=dtype)
    return torch.addmm(grad_weight, grad_logits.t(), hidden, out_dtype=dtype, out=grad_weight)


@jit
def _scale_kernel(x_ptr, scale_ptr, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scale x in place, without reading it if the scale is 1, and without a host that waits to know it."""
    scale = tl.load(scale_ptr).to(tl.float32)
    if scale != 1.0:
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, size, tl.num_programs(0) * BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + at, mask=at < size, other=0.0).to(tl.float32) * scale
            tl.store(x_ptr + at, x.to(x_ptr.dtype.element_ty), mask=at < size)
