"""Rotary embedding of queries and keys, with their norms before it (Qwen3) and the cache write after it, in one pass.

Bytes moved: the merged projection in, q and k out, k and v into the cache: 2 (2 H + 5 K) C bytes a token in bf16,
2 (2 H + 3 K) C without a cache. It saves about ten launches a layer, which bound a decode step at B=1.

    python -m pytest tests/kernels/test_rope.py
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minem.kernels.backend import jit, pick, tl

Norms = tuple[Tensor | None, Tensor | None]  # weights for queries and for keys


class CacheWrite(NamedTuple):
    """Where new keys and values go: token i to [rows[i], :, positions[i]] of k and v [S, K, L, C]; both int64 [N]."""

    k: Tensor
    v: Tensor
    rows: Tensor
    positions: Tensor


def rotary(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    cache: CacheWrite | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split a merged projection qkv [N, H + 2 K, C] into q [N, H, C], k [N, K, C] and v [N, K, C], q and k rotated.

    cos, sin [N, C/2]; channel i turns with channel i + C/2 (Su et al. 2021, arXiv 2104.09864, in Llama's layout).
    heads: H. q_norm, k_norm [C]: weights of an RMSNorm of each head before the rotation, both or neither; eps is its
    own. cache: also write k and v there. backend: "eager", "triton" or None: by device.

    Returns (q, k, v); v is a view of qkv. Differentiable; with gradients the norms are PyTorch's operations.
    Raises ValueError for shapes that do not fit.
    """
    n, merged, channels = qkv.shape
    kv_heads = (merged - heads) // 2
    if channels % 2 or kv_heads < 1 or heads + 2 * kv_heads != merged:
        raise ValueError(f"qkv must be [N, H + 2 K, C] with C even and H = {heads}; got {list(qkv.shape)}")
    if cos.shape != (n, channels // 2) or sin.shape != cos.shape:
        raise ValueError(f"cos and sin must be [{n}, {channels // 2}]; got {list(cos.shape)} and {list(sin.shape)}")
    if (q_norm is None) != (k_norm is None):
        raise ValueError("q_norm and k_norm belong together: pass both or neither")
    wanted = any(x is not None and x.requires_grad for x in (qkv, q_norm, k_norm))
    differentiable = torch.is_grad_enabled() and wanted
    triton = pick(backend, qkv) == "triton"
    if triton and not differentiable:
        return _rotary_triton(qkv, cos, sin, heads, (q_norm, k_norm), eps, cache)
    qk, v = qkv.split((heads + kv_heads, kv_heads), dim=1)
    if q_norm is not None and k_norm is not None:
        q, k = qk.split((heads, kv_heads), dim=1)
        qk = torch.cat((F.rms_norm(q, (channels,), q_norm, eps), F.rms_norm(k, (channels,), k_norm, eps)), dim=1)
    if triton:
        q, k, v = _Rotary.apply(qkv if q_norm is None else torch.cat((qk, v), dim=1), cos, sin, heads)
    else:
        first, second = qk.chunk(2, dim=-1)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        q, k = turned.split((heads, kv_heads), dim=1)
    if cache is not None:
        cache.k[cache.rows, :, cache.positions] = k
        cache.v[cache.rows, :, cache.positions] = v
    return q, k, v


class _Rotary(torch.autograd.Function):
    """Without norms and cache. The gradient turns back by the same angle."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _rotary_triton(qkv, cos, sin, heads, (None, None), 0.0, None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        qkv = torch.cat(grads, dim=1)
        return (
            torch.cat(_rotary_triton(qkv, cos, -sin, grads[0].shape[1], (None, None), 0.0, None), dim=1),
            None,
            None,
            None,
        )


def _rotary_triton(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, norms: Norms, eps: float, cache: CacheWrite | None
) -> tuple[Tensor, Tensor, Tensor]:
    if cache is not None and (cache.k.stride() != cache.v.stride() or cache.k.stride(3) != 1):
        raise ValueError("the key and value caches must have the same strides, channels side by side")
    qkv = qkv.contiguous()
    n, merged, channels = qkv.shape
    kv_heads, half = (merged - heads) // 2, channels // 2
    q, k = qkv.new_empty(n, heads, channels), qkv.new_empty(n, kv_heads, channels)
    k_cache, v_cache, rows, positions = cache or (k, k, k, k)  # not touched without a cache
    weights = (q if x is None else x.contiguous() for x in norms)  # not read where None
    _rotary_kernel[(n, -(-merged // 8))](
        qkv, cos.contiguous(), sin.contiguous(), *weights, q, k, k_cache, v_cache, rows.contiguous(),
        positions.contiguous(), *(cache.k.stride()[:3] if cache is not None else (0, 0, 0)), heads, kv_heads, eps,
        HAS_NORM=norms[0] is not None, HAS_CACHE=cache is not None,
        HALF=half, HALF_BLOCK=max(16, 1 << (half - 1).bit_length()), HEAD_BLOCK=8, num_warps=4,
    )  # fmt: skip
    return q, k, qkv[:, heads + kv_heads :]


@jit
def _rotary_kernel(  # type: ignore[no-untyped-def]
    qkv_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, q_ptr, k_ptr, k_cache_ptr, v_cache_ptr, rows_ptr,
    positions_ptr, cache_row, cache_head, cache_position, heads, kv_heads, eps,
    HAS_NORM: tl.constexpr, HAS_CACHE: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEAD_BLOCK + tl.arange(0, HEAD_BLOCK)
    channel = tl.arange(0, HALF_BLOCK)
    real = channel < HALF
    merged = heads + 2 * kv_heads
    mask = (head < merged)[:, None] & real[None, :]
    is_q = head < heads
    is_k = (head >= heads) & (head < heads + kv_heads)
    is_v = (head >= heads + kv_heads) & (head < merged)

    at = (token * merged + head)[:, None] * (2 * HALF) + channel[None, :]
    raw_first = tl.load(qkv_ptr + at, mask=mask, other=0.0)
    raw_second = tl.load(qkv_ptr + at + HALF, mask=mask, other=0.0)
    first, second = raw_first.to(tl.float32), raw_second.to(tl.float32)
    if HAS_NORM:
        square = tl.sum(first * first, 1) + tl.sum(second * second, 1)
        inverse = tl.rsqrt(square / (2 * HALF) + eps)[:, None]
        q_first = tl.load(q_norm_ptr + channel, mask=real, other=0.0).to(tl.float32)
        q_second = tl.load(q_norm_ptr + HALF + channel, mask=real, other=0.0).to(tl.float32)
        k_first = tl.load(k_norm_ptr + channel, mask=real, other=0.0).to(tl.float32)
        k_second = tl.load(k_norm_ptr + HALF + channel, mask=real, other=0.0).to(tl.float32)
        first = first * inverse * tl.where(is_q[:, None], q_first[None, :], k_first[None, :])
        second = second * inverse * tl.where(is_q[:, None], q_second[None, :], k_second[None, :])
    cos = tl.load(cos_ptr + token * HALF + channel, mask=real, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + token * HALF + channel, mask=real, other=0.0).to(tl.float32)[None, :]
    turned_first = (first * cos - second * sin).to(q_ptr.dtype.element_ty)
    turned_second = (second * cos + first * sin).to(q_ptr.dtype.element_ty)

    q_at = (token * heads + head)[:, None] * (2 * HALF) + channel[None, :]
    tl.store(q_ptr + q_at, turned_first, mask=mask & is_q[:, None])
    tl.store(q_ptr + q_at + HALF, turned_second, mask=mask & is_q[:, None])
    kv_head = ((head - heads) % kv_heads).to(tl.int64)  # of k and of v alike
    k_at = (token * kv_heads + kv_head)[:, None] * (2 * HALF) + channel[None, :]
    tl.store(k_ptr + k_at, turned_first, mask=mask & is_k[:, None])
    tl.store(k_ptr + k_at + HALF, turned_second, mask=mask & is_k[:, None])
    if HAS_CACHE:
        row, position = tl.load(rows_ptr + token), tl.load(positions_ptr + token)
        cached = (row * cache_row + kv_head * cache_head + position * cache_position)[:, None] + channel[None, :]
        tl.store(k_cache_ptr + cached, turned_first, mask=mask & is_k[:, None])
        tl.store(k_cache_ptr + cached + HALF, turned_second, mask=mask & is_k[:, None])
        tl.store(v_cache_ptr + cached, raw_first, mask=mask & is_v[:, None])
        tl.store(v_cache_ptr + cached + HALF, raw_second, mask=mask & is_v[:, None])
