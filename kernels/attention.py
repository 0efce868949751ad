"""Attention of one new token per sequence over a two-segment cache: a shared prefix, then the sequence's own suffix.

    python -m pytest tests/kernels/test_attention.py

Sequences drawn from one prompt are *siblings*: they share the prompt's keys and values (the prefix, stored once) and
own only their new tokens (the suffix). The segments are attended separately and merged by their log-sum-exp, so the
prefix is read once for several siblings. `prefix_rows` and `suffix_rows` give the places in the cache, so that one
fixed launch (a CUDA graph) serves any slots.

Bytes moved: each prefix once, each suffix once, 2 S H C values in and out. Bandwidth is the floor: at S=256 and 512
bf16 positions, 2 heads of 128 channels are 134 MB, 31 us at 4.3 TB/s. Triton: one launch with a program for each (tile
of queries, key/value head, split of 256 positions) of either segment; a second kernel merges a sequence's splits.

Shape suffixes: S sequences, H query heads, K key/value heads, G = H / K queries a group, C channels, L positions,
R prefixes, T groups of at most n siblings.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minem.kernels.backend import jit, pick, tl

# Added to masked scores. Finite, so that an empty segment gives weight 0 in the merge instead of NaN.
MASKED = -1e30

Segment = tuple[Tensor, Tensor, Tensor]  # keys, values, lengths
SPLIT = 256  # positions of the cache that one program of the Triton kernel reads
ROWS = 16  # queries that one program answers: the smallest side of a tensor-core product, and more spill in fp32


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
    prefix_rows: Tensor | None = None,
    suffix_rows: Tensor | None = None,
    alike: tuple[int, int] = (0, 0),
    backend: str | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(C)) v over the prefix and the suffix of each sequence; grouped-query.

    q [S, H, C], prefix_k and prefix_v [R, K, Lp, C], suffix_k and suffix_v [S, K, Ls, C] (any number of rows with
    suffix_rows) have one floating dtype, and no NaN anywhere. backend: "eager", "triton" or None (by device).
    The other tensors are int64. prefix_lengths [R], suffix_lengths [S]: the positions that count; the suffix holds the
    new token itself. siblings [T, n]: groups of sequences that share a prefix; unused places may name any sequence.
    sibling_index [S]: the place of each sequence in `siblings.flatten()`. prefix_rows [T]: the prefix of each group,
    None: the t-th. suffix_rows [S]: the row of each sequence's suffix, None: the s-th. alike: a row of the prefixes
    and how many of its positions are the same in all that are read, as with worked examples; eager reads these once.

    Returns [S, H, C] in the dtype of q; scores and sums in float32 or wider. No gradients: this is for decoding.
    """
    heads = [x.shape[1] for x in (q, prefix_k, suffix_k)]
    if heads[0] % heads[1] or heads[1] != heads[2]:
        raise ValueError(f"heads of q must be a multiple of the key heads, equal in both segments; got {heads}")
    prefix, suffix = (prefix_k, prefix_v, prefix_lengths), (suffix_k, suffix_v, suffix_lengths)
    about = (siblings, sibling_index), (prefix_rows, suffix_rows)
    if pick(backend, q) == "triton":
        return _decode_attention_triton(q, prefix, suffix, *about)
    return _decode_attention_eager(q, prefix, suffix, *about, *alike)


def _decode_attention_eager(
    q: Tensor, prefix: Segment, suffix: Segment, members: tuple[Tensor, Tensor], rows: Sequence[Tensor | None],
    row: int, alike: int,
) -> Tensor:  # fmt: skip
    of_prefix, of_suffix = (slice(None) if x is None else x for x in rows)
    suffix_k, suffix_v, suffix_lengths = suffix
    grouped = q.unflatten(1, (suffix_k.shape[1], -1))  # [S, K, G, C]

    def shared(siblings: Tensor, sibling_index: Tensor, *segment: Tensor) -> tuple[Tensor, ...]:
        """The segment as all siblings see it, their queries side by side: [T, K, nG, C] and back to [S, K, G, *]."""
        queries = grouped[siblings].transpose(1, 2).flatten(2, 3)
        apart = (x.unflatten(2, (siblings.shape[1], -1)).transpose(1, 2) for x in _segment(queries, *segment))
        return tuple(x.flatten(0, 1)[sibling_index] for x in apart)

    alike = max(0, min(alike, prefix[0].shape[2] - 1))  # one is left to attend to apart
    apart = (*(x[:, :, alike:] for x in prefix[:2]), prefix[2] - alike)
    first = shared(*members, *(x[of_prefix] for x in apart))
    attended = _merge(first, _segment(grouped, suffix_k[of_suffix], suffix_v[of_suffix], suffix_lengths[: len(q)]))
    if alike:
        every = torch.arange(len(q), device=q.device)
        k, v = (x[row : row + 1, :, :alike] for x in prefix[:2])
        attended = _merge(shared(every[None], every, k, v, prefix[2].new_full((1,), alike)), attended)
    return attended[0].to(q.dtype).reshape(q.shape)


def _merge(one: Sequence[Tensor], other: Sequence[Tensor]) -> Sequence[Tensor]:
    """Attention over both of two segments, and the log-sum-exp of its scores."""
    share = torch.sigmoid(one[1] - other[1])  # of the first in the sum of both
    return torch.lerp(other[0], one[0], share), torch.logaddexp(one[1], other[1])


def _segment(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of q [B, K, M, C] over k, v [B, K, L, C], and the log-sum-exp of its scores [B, K, M, 1]."""
    places = torch.arange(k.shape[2], device=q.device)
    bias = torch.where(places < lengths[:, None], 0.0, MASKED)[:, None, None]  # [B, 1, 1, L] float32
    if q.is_cpu and q.dtype == torch.bfloat16:  # reads the cache as it is: five times as fast as through float32
        mask = bias.to(q.dtype).expand(-1, 1, q.shape[2], -1)
        values, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask)
        return values.float(), sums.unsqueeze(3)
    q = q.to(torch.promote_types(q.dtype, torch.float32)) * q.shape[3] ** -0.5
    scores = torch.matmul(q, k.to(q.dtype).transpose(2, 3)).add_(bias)
    weights = scores.softmax(-1)
    # The largest weight is exp(0) / sum, which saves another pass of exponentials over the scores: on a CPU exp of
    # the masked ones takes thirty times as long as softmax does.
    mass = scores.amax(-1, keepdim=True) - weights.amax(-1, keepdim=True).log()
    return torch.matmul(weights, v.to(q.dtype)), mass


def _decode_attention_triton(
    q: Tensor, prefix: Segment, suffix: Segment, members: tuple[Tensor, Tensor], rows: Sequence[Tensor | None]
) -> Tensor:
    """A program for each SPLIT positions of a segment, then one merge: a sequence has the same sums in any batch."""
    prefix_k, prefix_v, prefix_lengths = prefix
    suffix_k, suffix_v, suffix_lengths = suffix
    cache = (prefix_k, prefix_v, suffix_k, suffix_v)
    same = prefix_k.stride() == prefix_v.stride() and suffix_k.stride() == suffix_v.stride()
    if any(x.stride(3) != 1 for x in cache) or not same:
        raise ValueError("the channels of the cache must lie side by side, keys and values with the same strides")
    vectors = (prefix_lengths, suffix_lengths, *members)
    prefix_lengths, suffix_lengths, siblings, sibling_index = (x.contiguous() for x in vectors)
    tables = [siblings if x is None else x.contiguous() for x in rows]  # not read where None
    q, out = q.contiguous(), torch.empty(q.shape, dtype=q.dtype, device=q.device)
    sequences, heads, channels = q.shape
    kv_heads = prefix_k.shape[1]
    groups, n = siblings.shape
    group = heads // kv_heads
    tiles, own_tiles = -(-n * group // ROWS), -(-group // ROWS)
    prefix_splits, suffix_splits = (max(1, -(-x.shape[2] // SPLIT)) for x in (prefix_k, suffix_k))
    splits = prefix_splits + suffix_splits
    values = torch.empty(sequences, heads, splits, channels, dtype=torch.float32, device=q.device)
    highest, sums = (torch.empty(sequences, heads, splits, dtype=torch.float32, device=q.device) for _ in range(2))
    shape = {"CHANNELS": channels, "CHANNEL_BLOCK": max(16, 1 << (channels - 1).bit_length()), "SPLIT": SPLIT}
    options = {
        "PREFIX_ROWS": rows[0] is not None,
        "SUFFIX_ROWS": rows[1] is not None,
        "GROUP": group,
        "ROWS": ROWS,
        "BLOCK": 64 if q.element_size() == 2 else 16,  # with 32 some fp32 shapes spill on sm_90 under triton 3.7
        "num_warps": 4,
        "num_stages": 3,  # with 2 some shapes spill on sm_80 under triton 3.6
    }
    _segments_kernel[(groups * tiles + sequences * own_tiles, kv_heads, max(prefix_splits, suffix_splits))](
        q, *cache, prefix_lengths, suffix_lengths, *tables, siblings, sibling_index, values, highest, sums,
        *prefix_k.stride()[:3], *suffix_k.stride()[:3], heads, groups, n, tiles, own_tiles, prefix_splits, splits,
        channels**-0.5, **shape, **options,
    )  # fmt: skip
    _merge_kernel[(sequences, heads)](
        out, values, highest, sums, prefix_lengths, suffix_lengths, tables[0], sibling_index, n, heads, prefix_splits,
        splits, PREFIX_ROWS=rows[0] is not None, **shape, num_warps=1,
    )  # fmt: skip
    return out


@jit
def _segments_kernel(  # type: ignore[no-untyped-def]
    q_ptr, prefix_k_ptr, prefix_v_ptr, suffix_k_ptr, suffix_v_ptr, prefix_lengths_ptr, suffix_lengths_ptr,
    prefix_rows_ptr, suffix_rows_ptr, siblings_ptr, sibling_index_ptr, values_ptr, highest_ptr, sums_ptr,
    prefix_row_stride, prefix_head_stride, prefix_stride, suffix_row_stride, suffix_head_stride, suffix_stride,
    heads, groups, n, tiles, own_tiles, prefix_splits, splits, scale,
    PREFIX_ROWS: tl.constexpr, SUFFIX_ROWS: tl.constexpr, GROUP: tl.constexpr, CHANNELS: tl.constexpr,
    CHANNEL_BLOCK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Unnormalised attention of one tile of queries over one split of one segment: values, highest score, sum of exp.

    Row m of a tile is query m % GROUP of the sibling in place m // GROUP.
    """
    program = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    if program < groups * tiles:
        index = (program // tiles).to(tl.int64)
        member = (program % tiles) * ROWS + tl.arange(0, ROWS)
        place = index * n + member // GROUP
        live = member // GROUP < n
        sequence = tl.load(siblings_ptr + place, mask=live, other=0)
        # a place that is not in use names a sequence that stands elsewhere
        live = live & (tl.load(sibling_index_ptr + sequence, mask=live, other=-1) == place)
        row = index
        if PREFIX_ROWS:
            row = tl.load(prefix_rows_ptr + index)
        length = tl.load(prefix_lengths_ptr + row).to(tl.int32)
        k_base = prefix_k_ptr + row * prefix_row_stride + kv_head * prefix_head_stride
        v_base = prefix_v_ptr + row * prefix_row_stride + kv_head * prefix_head_stride
        stride = prefix_stride.to(tl.int64)
        part = split
    else:
        own = program - groups * tiles
        index = (own // own_tiles).to(tl.int64)
        member = (own % own_tiles) * ROWS + tl.arange(0, ROWS)
        live = member < GROUP
        sequence = index + 0 * member.to(tl.int64)
        row = index
        if SUFFIX_ROWS:
            row = tl.load(suffix_rows_ptr + index)
        length = tl.load(suffix_lengths_ptr + index).to(tl.int32)
        k_base = suffix_k_ptr + row * suffix_row_stride + kv_head * suffix_head_stride
        v_base = suffix_v_ptr + row * suffix_row_stride + kv_head * suffix_head_stride
        stride = suffix_stride.to(tl.int64)
        part = prefix_splits + split
    begin = split * SPLIT
    end = tl.minimum(begin + SPLIT, length)
    if begin < end:
        head = sequence * heads + kv_head * GROUP + member % GROUP
        channel = tl.arange(0, CHANNEL_BLOCK)
        real = channel < CHANNELS
        q = tl.load(q_ptr + head[:, None] * CHANNELS + channel[None, :], mask=live[:, None] & real[None, :], other=0.0)
        highest = tl.full((ROWS,), -1e30, tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        values = tl.zeros((ROWS, CHANNEL_BLOCK), tl.float32)
        for start in range(begin, end, BLOCK):
            position = (start + tl.arange(0, BLOCK)).to(tl.int64)
            inside = position < end
            mask = inside[:, None] & real[None, :]
            k = tl.load(k_base + position[:, None] * stride + channel[None, :], mask=mask, other=0.0)
            # (fp32 caches only: three tf32 products, as exact as fp32 and without its spilling)
            scores = tl.dot(q, tl.trans(k), input_precision="tf32x3") * scale
            scores = tl.where(inside[None, :], scores, -1e30)
            new_highest = tl.maximum(highest, tl.max(scores, 1))
            shrink = tl.exp(highest - new_highest)
            weights = tl.exp(scores - new_highest[:, None])
            v = tl.load(v_base + position[:, None] * stride + channel[None, :], mask=mask, other=0.0)
            values = values * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="tf32x3")
            total = total * shrink + tl.sum(weights, 1)
            highest = new_highest

        at = head * splits + part
        tl.store(values_ptr + at[:, None] * CHANNELS + channel[None, :], values, mask=live[:, None] & real[None, :])
        tl.store(highest_ptr + at, highest, mask=live)
        tl.store(sums_ptr + at, total, mask=live)


@jit
def _merge_kernel(  # type: ignore[no-untyped-def]
    out_ptr, values_ptr, highest_ptr, sums_ptr, prefix_lengths_ptr, suffix_lengths_ptr, prefix_rows_ptr,
    sibling_index_ptr, n, heads, prefix_splits, splits,
    PREFIX_ROWS: tl.constexpr, CHANNELS: tl.constexpr, CHANNEL_BLOCK: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    head = sequence * heads + tl.program_id(1)
    channel = tl.arange(0, CHANNEL_BLOCK)
    real = channel < CHANNELS
    row = tl.load(sibling_index_ptr + sequence) // n
    if PREFIX_ROWS:
        row = tl.load(prefix_rows_ptr + row)
    used = tl.cdiv(tl.load(prefix_lengths_ptr + row).to(tl.int32), SPLIT)
    own = tl.cdiv(tl.load(suffix_lengths_ptr + sequence).to(tl.int32), SPLIT)
    highest = -1e30
    total = 0.0
    values = tl.zeros((CHANNEL_BLOCK,), tl.float32)
    for split in range(0, used + own):
        at = head * splits + tl.where(split < used, split, prefix_splits + split - used)
        part = tl.load(highest_ptr + at)
        new_highest = tl.maximum(highest, part)
        shrink, weight = tl.exp(highest - new_highest), tl.exp(part - new_highest)
        values = values * shrink + weight * tl.load(values_ptr + at * CHANNELS + channel, mask=real, other=0.0)
        total = total * shrink + weight * tl.load(sums_ptr + at)
        highest = new_highest
    tl.store(out_ptr + head * CHANNELS + channel, (values / total).to(out_ptr.dtype.element_ty), mask=real)
