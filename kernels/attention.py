"""Attention of one new token per sequence over a two-segment cache: a shared prefix, then the sequence's own suffix.

    python -m pytest tests/kernels/test_attention.py

Sequences drawn from one prompt are *siblings*: they share the prompt's keys and values (the prefix, stored once) and
have only their own tokens (the suffix) to themselves. Both segments are attended separately and merged by their
log-sum-exp, so the prefix is read once per prompt and not once per sibling, and nothing is ever copied together.

What must move: each prefix once, each suffix once, in and out 2 S H C values; everything else stays on chip. A decode
step does 2 H/K operations for each key or value channel it reads (14 for Qwen2.5-0.5B), far below what a GPU can do in
the time of the reading, so bandwidth is the floor: at S=256 and 512 bf16 positions, 2 heads of 128 channels are 134 MB,
31 us at 4.3 TB/s. Triton: one program for each (sequence or prefix, key/value head, split of 256 positions) reads its
keys and values once for all the queries that share them; a second kernel merges a sequence's splits. What passes
between the two is C fp32 numbers for each split and query, against 2 C bf16 numbers for each of 256 positions.

Shape suffixes: S sequences, H query heads, K key/value heads, G = H / K queries a group, C channels, L positions,
R prefixes, n siblings at most on one prefix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minem.kernels.backend import jit, pick, tl

# Added to masked scores. Finite, so that an empty segment gives weight 0 in the merge instead of NaN.
MASKED = -1e30

SPLIT = 256  # positions of the cache that one program of the Triton kernel reads


def decode_attention(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_lengths: Tensor,
    siblings: Tensor,
    sibling_index: Tensor,
    suffix_k: Tensor,
    suffix_v: Tensor,
    suffix_lengths: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(C)) v over the prefix and the suffix of each sequence; grouped-query.

    Args:
        q: [S, H, C], one query per sequence.
        prefix_k, prefix_v: [R, K, Lp, C]; only the first prefix_lengths[r] positions are read into the result, the
            rest must be finite.
        prefix_lengths: int64 [R]; 0 is allowed.
        siblings: int64 [R, n], the sequences that share each prefix; unused places may name any sequence.
        sibling_index: int64 [S], where each sequence stands in `siblings.flatten()`.
        suffix_k, suffix_v: [S, K, Ls, C].
        suffix_lengths: int64 [S], at least 1 (the new token itself is in the suffix).
        backend: "eager", "triton" or None (by device).
    Returns:
        [S, H, C] in the dtype of q; scores and sums in float32 or wider. No gradients: this is for decoding.
    """
    if q.shape[1] % prefix_k.shape[1] or prefix_k.shape[1] != suffix_k.shape[1]:
        raise ValueError(
            f"the query heads ({q.shape[1]}) must be a multiple of the key heads, the same in both segments "
            f"({prefix_k.shape[1]} and {suffix_k.shape[1]})"
        )
    prefix_lengths, sibling_index, suffix_lengths = (
        x.contiguous() for x in (prefix_lengths, sibling_index, suffix_lengths)
    )
    implementation = _decode_attention_triton if pick(backend, q) == "triton" else _decode_attention_eager
    return implementation(
        q, prefix_k, prefix_v, prefix_lengths, siblings, sibling_index, suffix_k, suffix_v, suffix_lengths
    )


def _decode_attention_eager(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_lengths: Tensor,
    siblings: Tensor,
    sibling_index: Tensor,
    suffix_k: Tensor,
    suffix_v: Tensor,
    suffix_lengths: Tensor,
) -> Tensor:
    sequences, heads, channels = q.shape
    kv_heads = prefix_k.shape[1]
    n = siblings.shape[1]
    grouped = (q.to(torch.promote_types(q.dtype, torch.float32)) * channels**-0.5).view(
        sequences, kv_heads, -1, channels
    )  # [S, K, G, C]
    shared = grouped[siblings].transpose(1, 2).flatten(2, 3)  # [R, K, nG, C]
    prefix = [
        x.unflatten(2, (n, -1)).transpose(1, 2).flatten(0, 1)[sibling_index]  # back to [S, K, G, *]
        for x in _segment(shared, prefix_k, prefix_v, prefix_lengths)
    ]
    own = _segment(grouped, suffix_k, suffix_v, suffix_lengths)
    highest = torch.maximum(prefix[1], own[1])
    scale_prefix, scale_own = (prefix[1] - highest).exp(), (own[1] - highest).exp()
    values = prefix[0] * scale_prefix + own[0] * scale_own
    return (values / (prefix[2] * scale_prefix + own[2] * scale_own)).to(q.dtype).view(sequences, heads, channels)


def _segment(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Unnormalised attention of q [B, K, M, C] over k, v [B, K, L, C]: values, highest score, sum of exponentials."""
    places = torch.arange(k.shape[2], device=q.device)
    bias = torch.where(places < lengths[:, None], 0.0, MASKED)[:, None, None]  # [B, 1, 1, L] float32
    scores = torch.matmul(q, k.to(q.dtype).transpose(2, 3)).add_(bias)
    highest = scores.amax(-1, keepdim=True)
    weights = scores.sub_(highest).exp_()
    return torch.matmul(weights, v.to(q.dtype)), highest, weights.sum(-1, keepdim=True)


def _decode_attention_triton(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_lengths: Tensor,
    siblings: Tensor,
    sibling_index: Tensor,
    suffix_k: Tensor,
    suffix_v: Tensor,
    suffix_lengths: Tensor,
) -> Tensor:
    """Both segments cut into splits of SPLIT positions, one program each, then one merge over a sequence's splits.

    The split size is fixed, so that a sequence's sums are the same whatever else is in the batch.
    """
    q, out = q.contiguous(), torch.empty(q.shape, dtype=q.dtype, device=q.device)
    sequences, heads, channels = q.shape
    n = siblings.shape[1]
    prefix = _segment_triton(q, prefix_k, prefix_v, prefix_lengths, siblings.contiguous(), sibling_index)
    suffix = _segment_triton(q, suffix_k, suffix_v, suffix_lengths, None, None)
    _merge_kernel[(sequences, heads)](
        out,
        *prefix,
        *suffix,
        prefix_lengths,
        suffix_lengths,
        sibling_index,
        n,
        heads,
        prefix[1].shape[2],
        suffix[1].shape[2],
        CHANNELS=channels,
        CHANNEL_BLOCK=_power_of_two(channels),
        SPLIT=SPLIT,
        num_warps=1,
    )
    return out


def _segment_triton(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, siblings: Tensor | None, sibling_index: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_segment`, for every split on its own: values [S, H, splits, C], highest scores and sums [S, H, splits]."""
    if k.stride(3) != 1 or v.stride(3) != 1:
        raise ValueError("the channels of the key and value caches must lie side by side in memory")
    sequences, heads, channels = q.shape
    batch, kv_heads, positions, _ = k.shape
    n = 1 if siblings is None else siblings.shape[1]
    group = heads // kv_heads
    splits = max(1, -(-positions // SPLIT))
    values = torch.empty(sequences, heads, splits, channels, dtype=torch.float32, device=q.device)
    highest, sums = (torch.empty(sequences, heads, splits, dtype=torch.float32, device=q.device) for _ in range(2))
    # Queries that share keys: at least 16, for the tensor cores; more than this many spill registers (fp32 has none).
    narrow = q.element_size() == 2
    rows = min(32 if narrow else 16, _power_of_two(n * group))
    tiles = -(-n * group // rows)
    _segment_kernel[(batch * tiles, kv_heads, splits)](
        q,
        k,
        v,
        lengths,
        lengths if siblings is None else siblings,
        lengths if sibling_index is None else sibling_index,
        values,
        highest,
        sums,
        *k.stride()[:3],
        *v.stride()[:3],
        heads,
        n,
        tiles,
        splits,
        channels**-0.5,
        SHARED=siblings is not None,
        GROUP=group,
        CHANNELS=channels,
        CHANNEL_BLOCK=_power_of_two(channels),
        ROWS=rows,
        BLOCK=64 if narrow else 32,
        SPLIT=SPLIT,
        num_warps=4,
        num_stages=3,  # with 2 some shapes spill on sm_80 under triton 3.6
    )
    return values, highest, sums


def _power_of_two(number: int) -> int:
    """The next power of two, at least 16: the smallest side of a tensor-core product."""
    return max(16, 1 << (number - 1).bit_length())


@jit
def _segment_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    v_ptr,
    lengths_ptr,
    siblings_ptr,
    sibling_index_ptr,
    values_ptr,
    highest_ptr,
    sums_ptr,
    k_batch,
    k_head,
    k_position,
    v_batch,
    v_head,
    v_position,
    heads,
    n,
    tiles,
    splits,
    scale,
    SHARED: tl.constexpr,
    GROUP: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHANNEL_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
):
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    begin = split * SPLIT
    end = tl.minimum(begin + SPLIT, tl.load(lengths_ptr + batch).to(tl.int32))
    if begin < end:
        # Row m of the tile is query m % GROUP of the sibling in place m // GROUP.
        row = (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)
        place = row // GROUP
        live = place < n
        if SHARED:
            sequence = tl.load(siblings_ptr + batch * n + place, mask=live, other=0)
            # a place that is not in use names a sequence that stands elsewhere
            live = live & (tl.load(sibling_index_ptr + sequence, mask=live, other=-1) == batch * n + place)
        else:
            sequence = batch + place
        head = sequence * heads + kv_head * GROUP + row % GROUP
        channel = tl.arange(0, CHANNEL_BLOCK)
        real = channel < CHANNELS
        q = tl.load(q_ptr + head[:, None] * CHANNELS + channel[None, :], mask=live[:, None] & real[None, :], other=0.0)

        k_base = k_ptr + batch * k_batch + kv_head.to(tl.int64) * k_head
        v_base = v_ptr + batch * v_batch + kv_head.to(tl.int64) * v_head
        highest = tl.full((ROWS,), -1e30, tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        values = tl.zeros((ROWS, CHANNEL_BLOCK), tl.float32)
        for start in range(begin, end, BLOCK):
            position = (start + tl.arange(0, BLOCK)).to(tl.int64)
            inside = position < end
            mask = inside[:, None] & real[None, :]
            k = tl.load(k_base + position[:, None] * k_position + channel[None, :], mask=mask, other=0.0)
            # (fp32 caches only: three tf32 products, as exact as fp32 and without its spilling)
            scores = tl.dot(q, tl.trans(k), input_precision="tf32x3") * scale
            scores = tl.where(inside[None, :], scores, -1e30)
            new_highest = tl.maximum(highest, tl.max(scores, 1))
            shrink = tl.exp(highest - new_highest)
            weights = tl.exp(scores - new_highest[:, None])
            v = tl.load(v_base + position[:, None] * v_position + channel[None, :], mask=mask, other=0.0)
            values = values * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="tf32x3")
            total = total * shrink + tl.sum(weights, 1)
            highest = new_highest

        at = head * splits + split
        tl.store(values_ptr + at[:, None] * CHANNELS + channel[None, :], values, mask=live[:, None] & real[None, :])
        tl.store(highest_ptr + at, highest, mask=live)
        tl.store(sums_ptr + at, total, mask=live)


@jit
def _merge(values_ptr, highest_ptr, sums_ptr, at, channel, real, values, highest, total, CHANNELS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Take one split's part into the running (values, highest, total)."""
    part = tl.load(highest_ptr + at)
    new_highest = tl.maximum(highest, part)
    shrink, weight = tl.exp(highest - new_highest), tl.exp(part - new_highest)
    part_values = tl.load(values_ptr + at * CHANNELS + channel, mask=real, other=0.0)
    return (
        values * shrink + part_values * weight,
        new_highest,
        total * shrink + tl.load(sums_ptr + at) * weight,
    )


@jit
def _merge_kernel(  # type: ignore[no-untyped-def]
    out_ptr,
    prefix_values_ptr,
    prefix_highest_ptr,
    prefix_sums_ptr,
    suffix_values_ptr,
    suffix_highest_ptr,
    suffix_sums_ptr,
    prefix_lengths_ptr,
    suffix_lengths_ptr,
    sibling_index_ptr,
    n,
    heads,
    prefix_splits,
    suffix_splits,
    CHANNELS: tl.constexpr,
    CHANNEL_BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    head = sequence * heads + tl.program_id(1)
    channel = tl.arange(0, CHANNEL_BLOCK)
    real = channel < CHANNELS
    highest = -1e30
    total = 0.0
    values = tl.zeros((CHANNEL_BLOCK,), tl.float32)
    prefix = tl.load(prefix_lengths_ptr + tl.load(sibling_index_ptr + sequence) // n).to(tl.int32)
    for split in range(0, tl.cdiv(prefix, SPLIT)):
        values, highest, total = _merge(
            prefix_values_ptr,
            prefix_highest_ptr,
            prefix_sums_ptr,
            head * prefix_splits + split,
            channel,
            real,
            values,
            highest,
            total,
            CHANNELS,
        )
    suffix = tl.load(suffix_lengths_ptr + sequence).to(tl.int32)
    for split in range(0, tl.cdiv(suffix, SPLIT)):
        values, highest, total = _merge(
            suffix_values_ptr,
            suffix_highest_ptr,
            suffix_sums_ptr,
            head * suffix_splits + split,
            channel,
            real,
            values,
            highest,
            total,
            CHANNELS,
        )
    tl.store(out_ptr + head * CHANNELS + channel, (values / total).to(out_ptr.dtype.element_ty), mask=real)
