"""Attention of one new token per sequence over a two-segment cache: a shared prefix, then the sequence's own suffix.

    python -m pytest tests/kernels/test_attention.py

Sequences drawn from one prompt are *siblings*: they share the prompt's keys and values (the prefix, stored once) and
own only their new tokens (the suffix). The segments are attended separately and merged by their log-sum-exp, so the
prefix is read once for several siblings. `prefix_rows` and `suffix_rows` give the places in the cache, so that one
fixed launch (a CUDA graph) serves any slots. The new token arrives as the merged projection: its query and key are
rotated here, and its key and value are written to the suffix, which saves a launch a layer.

Bytes moved: each prefix once, each suffix once, 2 S H C values in and out. Bandwidth is the floor: at S=256 and 512
bf16 positions, 2 heads of 128 channels are 134 MB, 31 us at 4.3 TB/s. Triton: `plan` lists the pieces of work (a tile
of queries and SPLIT positions in use) once per step; a fixed number of programs goes through the list in each layer,
and the program that finishes a query's last piece adds its pieces up, in their order.

Shape suffixes: S sequences, H query heads, K key/value heads, G = H / K queries a group, C channels, L positions,
R prefixes, T groups of at most n siblings.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minem.kernels.backend import jit, pick, tl
from minem.kernels.rope import CacheWrite, rotary

# Added to masked scores. Finite, so that an empty segment gives weight 0 in the merge instead of NaN.
MASKED = -1e30

Segment = tuple[Tensor, Tensor, Tensor]  # keys, values, lengths
SPLIT = 256  # positions of the cache in one piece of work
ROWS = 16  # queries in one piece of work: the smallest side of a tensor-core product, and more spill in fp32
PROGRAMS = 528  # that share the pieces, at most; four for each SM of an H100 or H200


class Work(NamedTuple):
    """The pieces of work of a step, the same in all layers, all int32 on the device (see `plan`)."""

    pieces: Tensor  # [most, 4]: tile, row of the cache, first position, end
    number: Tensor  # [1]: how many pieces there are
    parts: Tensor  # [S, 2]: the pieces of each sequence's prefix, and of both segments
    finished: Tensor  # [S, H]: the pieces that are done, over all layers so far


def decode_attention(
    qkv: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_lengths: Tensor,
    siblings: Tensor,
    sibling_index: Tensor,
    suffix_k: Tensor,
    suffix_v: Tensor,
    held: Tensor,
    *,
    heads: int,
    prefix_rows: Tensor | None = None,
    suffix_rows: Tensor | None = None,
    alike: tuple[int, int] = (0, 0),
    work: Work | None = None,
    backend: str | None = None,
    **turn: Any,
) -> Tensor:
    """softmax(q k^T / sqrt(C)) v over the prefix and the suffix of each sequence; grouped-query.

    qkv [S, H + 2 K, C], prefix_k and prefix_v [R, K, Lp, C], suffix_k and suffix_v [S, K, Ls, C] (any number of rows
    with suffix_rows) have one floating dtype, and no NaN anywhere. heads: H. turn: cos, sin, q_norm, k_norm and eps, as
    in `rotary`; the rotated key and the value are written to the suffix and attended to.
    The other tensors are int64. prefix_lengths [R]: the positions that count. held [S]: the positions that the suffix
    held before, less than Ls. siblings [T, n]: groups of sequences that share a prefix; unused places may name any
    sequence. sibling_index [S]: the place of each sequence in `siblings.flatten()`. prefix_rows [T]: the prefix of each
    group, None: the t-th. suffix_rows [S]: the row of each sequence's suffix, None: the s-th. alike: a row of the
    prefixes and how many of its positions are the same in all that are read, as with worked examples; eager reads
    these once. work: of this step, as `plan` makes it, so that all layers share it. backend: "eager", "triton" or
    None (by device).

    Returns [S, H, C] in the dtype of qkv; scores and sums in float32 or wider. No gradients: this is for decoding.
    """
    kv_heads = [(qkv.shape[1] - heads) // 2, prefix_k.shape[1], suffix_k.shape[1]]
    if heads % kv_heads[1] or len(set(kv_heads)) > 1:
        about = f"qkv has {qkv.shape[1]}, H = {heads}, the segments {kv_heads[1:]}"
        raise ValueError(f"H must be a multiple of the key heads, equal in qkv and both segments; got {about}")
    prefix, suffix = (prefix_k, prefix_v, prefix_lengths), (suffix_k, suffix_v, held)
    members, rows = (siblings, sibling_index), (prefix_rows, suffix_rows)
    if pick(backend, qkv) == "triton":
        work = work or _plan_triton((prefix, suffix), members, rows, heads)
        return _decode_attention_triton(qkv, heads, prefix, suffix, members, work, **turn)
    own = torch.arange(len(qkv), device=qkv.device) if suffix_rows is None else suffix_rows
    q, _, _ = rotary(qkv, heads=heads, **turn, cache=CacheWrite(suffix_k, suffix_v, own, held), backend="eager")
    return _decode_attention_eager(q, prefix, (suffix_k, suffix_v, held + 1), members, rows, *alike)


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


def plan(
    segments: tuple[Segment, Segment], members: tuple[Tensor, Tensor], rows: Sequence[Tensor | None], heads: int,
    backend: str | None = None,
) -> Work | None:  # fmt: skip
    """The pieces of work of a step, from the arguments of `decode_attention`; None for the eager reference."""
    return _plan_triton(segments, members, rows, heads) if pick(backend, segments[0][0]) == "triton" else None


def _plan_triton(
    segments: tuple[Segment, Segment], members: tuple[Tensor, Tensor], rows: Sequence[Tensor | None], heads: int
) -> Work:
    prefix, suffix = segments
    (groups, n), sequences, device = members[0].shape, len(members[1]), prefix[0].device
    tiles = -(-n // _siblings_per_tile(heads // prefix[0].shape[1]))
    most = groups * tiles * _splits(prefix) + sequences * _splits(suffix)
    sizes = {"pieces": (most, 4), "number": (1,), "parts": (sequences, 2), "finished": (sequences, heads)}
    work = Work(**{name: torch.empty(size, dtype=torch.int32, device=device) for name, size in sizes.items()})
    tables = [members[1] if x is None else x.contiguous() for x in rows]  # not read where None
    lengths = (x.contiguous() for x in (prefix[2], suffix[2], members[1]))
    _plan_kernel[(1,)](
        *lengths, *tables, *work, groups, sequences, n, tiles, heads,
        PREFIX_ROWS=rows[0] is not None, SUFFIX_ROWS=rows[1] is not None, SPLIT=SPLIT, BLOCK=512, num_warps=8,
    )  # fmt: skip
    return work


def programs(work: Work, kv_heads: int) -> int:
    """How many programs share the pieces of each key head: no more than there could be pieces."""
    return min(PROGRAMS, len(work.pieces) * kv_heads)


def _siblings_per_tile(group: int) -> int:
    return max(1, ROWS // group)


def _splits(segment: Segment) -> int:
    return max(1, -(-segment[0].shape[2] // SPLIT))


@partial(jit, do_not_specialize=["groups", "sequences"])  # else some batch sizes would compile it again
def _plan_kernel(  # type: ignore[no-untyped-def]
    prefix_lengths_ptr, held_ptr, sibling_index_ptr, prefix_rows_ptr, suffix_rows_ptr, pieces_ptr, number_ptr,
    parts_ptr, finished_ptr, groups, sequences, n, tiles, heads,
    PREFIX_ROWS: tl.constexpr, SUFFIX_ROWS: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program. Tile t >= 0 is a part of a group of siblings; tile -1 - s is sequence s alone."""
    shared, number = groups * tiles, 0
    for begin in range(0, shared + sequences, BLOCK):
        tile = begin + tl.arange(0, BLOCK)
        single = (tile >= shared) & (tile < shared + sequences)
        row, own, own_row = tile // tiles, tile - shared, tile - shared
        if PREFIX_ROWS:
            row = tl.load(prefix_rows_ptr + row, mask=tile < shared, other=0).to(tl.int32)
        if SUFFIX_ROWS:
            own_row = tl.load(suffix_rows_ptr + own, mask=single, other=0).to(tl.int32)
        length = tl.load(prefix_lengths_ptr + row, mask=tile < shared, other=0).to(tl.int32)
        length += tl.load(held_ptr + own, mask=single, other=-1).to(tl.int32) + 1
        count = tl.cdiv(length, SPLIT)
        first = number + tl.cumsum(count, 0) - count
        number += tl.sum(count, 0)
        for split in range(0, tl.max(count, 0)):
            at = pieces_ptr + 4 * (first + split)
            here = split < count
            tl.store(at, tl.where(single, -1 - own, tile), mask=here)
            tl.store(at + 1, tl.where(single, own_row, row), mask=here)
            tl.store(at + 2, 0 * tile + split * SPLIT, mask=here)
            tl.store(at + 3, tl.minimum(length, (split + 1) * SPLIT), mask=here)
    tl.store(number_ptr, number)

    for begin in range(0, sequences, BLOCK):
        sequence = begin + tl.arange(0, BLOCK)
        real = sequence < sequences
        row = (tl.load(sibling_index_ptr + sequence, mask=real, other=0) // n).to(tl.int32)
        if PREFIX_ROWS:
            row = tl.load(prefix_rows_ptr + row, mask=real, other=0).to(tl.int32)
        used = tl.cdiv(tl.load(prefix_lengths_ptr + row, mask=real, other=0).to(tl.int32), SPLIT)
        suffix = tl.cdiv(tl.load(held_ptr + sequence, mask=real, other=0).to(tl.int32) + 1, SPLIT)
        tl.store(parts_ptr + 2 * sequence, used, mask=real)
        tl.store(parts_ptr + 2 * sequence + 1, used + suffix, mask=real)
        for head in range(0, heads):
            tl.store(finished_ptr + sequence * heads + head, 0 * sequence, mask=real)


def _decode_attention_triton(
    qkv: Tensor, heads: int, prefix: Segment, suffix: Segment, members: tuple[Tensor, Tensor], work: Work, *,
    cos: Tensor, sin: Tensor, q_norm: Tensor | None = None, k_norm: Tensor | None = None, eps: float = 1e-6,
) -> Tensor:  # fmt: skip
    """Programs that share the pieces of work. A sequence has the same pieces, and so the same sums, in any batch."""
    (prefix_k, prefix_v, _), (suffix_k, suffix_v, held) = prefix, suffix
    cache = (prefix_k, prefix_v, suffix_k, suffix_v)
    same = prefix_k.stride() == prefix_v.stride() and suffix_k.stride() == suffix_v.stride()
    if any(x.stride(3) != 1 for x in cache) or not same:
        raise ValueError("the channels of the cache must lie side by side, keys and values with the same strides")
    qkv = qkv.contiguous()
    sequences, merged, channels = qkv.shape
    kv_heads = (merged - heads) // 2
    group = heads // kv_heads
    n, siblings = members[0].shape[1], _siblings_per_tile(group)
    tiles, prefix_splits = -(-n // siblings), _splits(prefix)
    splits = prefix_splits + _splits(suffix)
    norms = (qkv if x is None else x.contiguous() for x in (q_norm, k_norm))  # not read where None
    vectors = (x.contiguous() for x in (cos, sin, held, *members))
    out = qkv.new_empty(sequences, heads, channels)
    values = out.new_empty(sequences, heads, splits, channels, dtype=torch.float32)
    highest, sums = (out.new_empty(sequences, heads, splits, dtype=torch.float32) for _ in range(2))
    _attention_kernel[(programs(work, kv_heads),)](
        qkv, *norms, *cache, *vectors, *work, out, values, highest, sums, *prefix_k.stride()[:3],
        *suffix_k.stride()[:3], heads, kv_heads, n, tiles, prefix_splits, splits, channels**-0.5, eps,
        HAS_NORM=q_norm is not None, GROUP=group, SIBLINGS=siblings, HALF=channels // 2, SPLIT=SPLIT,
        ROWS=max(ROWS, 1 << (group - 1).bit_length()), CHANNEL_BLOCK=max(16, 1 << (channels - 1).bit_length()),
        BLOCK=64 if qkv.element_size() == 2 else 16,  # with 32 some fp32 shapes spill on sm_90 under triton 3.7
        num_warps=4, num_stages=3,  # with 2 some shapes spill on sm_80 under triton 3.6
    )  # fmt: skip
    return out


@jit
def _turned(  # type: ignore[no-untyped-def]
    row_ptr, norm_ptr, cos_ptr, sin_ptr, mask, eps, HAS_NORM: tl.constexpr, HALF: tl.constexpr,
    CHANNEL_BLOCK: tl.constexpr,
):  # fmt: skip
    """Heads [M, C] at row_ptr [M, 1], normed and rotated, in float32; cos_ptr and sin_ptr [M, 1]: of their tokens."""
    channel = tl.arange(0, CHANNEL_BLOCK)[None, :]
    other = (channel + HALF) % (2 * HALF)
    x = tl.load(row_ptr + channel, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(row_ptr + other, mask=mask, other=0.0).to(tl.float32)
    if HAS_NORM:
        inverse = tl.rsqrt(tl.sum(x * x, 1) / (2 * HALF) + eps)[:, None]
        real = channel < 2 * HALF
        x = x * inverse * tl.load(norm_ptr + channel, mask=real, other=0.0).to(tl.float32)
        y = y * inverse * tl.load(norm_ptr + other, mask=real, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + channel % HALF, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + channel % HALF, mask=mask, other=0.0).to(tl.float32)
    return x * cos + y * tl.where(channel < HALF, -sin, sin)


@jit
def _attention_kernel(  # type: ignore[no-untyped-def]
    qkv_ptr, q_norm_ptr, k_norm_ptr, prefix_k_ptr, prefix_v_ptr, suffix_k_ptr, suffix_v_ptr, cos_ptr, sin_ptr, held_ptr,
    siblings_ptr, sibling_index_ptr, pieces_ptr, number_ptr, parts_ptr, finished_ptr, out_ptr, values_ptr, highest_ptr,
    sums_ptr, prefix_row_stride, prefix_head_stride, prefix_stride, suffix_row_stride, suffix_head_stride,
    suffix_stride, heads, kv_heads, n, tiles, prefix_splits, splits, scale, eps,
    HAS_NORM: tl.constexpr, GROUP: tl.constexpr, SIBLINGS: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr,
    CHANNEL_BLOCK: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Row m of a tile is query m % GROUP of its sibling m // GROUP."""
    CHANNELS: tl.constexpr = 2 * HALF
    lane = tl.arange(0, ROWS)
    channel = tl.arange(0, CHANNEL_BLOCK)
    real = channel < CHANNELS
    merged = heads + 2 * kv_heads
    for item in range(tl.program_id(0), tl.load(number_ptr) * kv_heads, tl.num_programs(0)):
        piece = pieces_ptr + item // kv_heads * 4
        kv_head = (item % kv_heads).to(tl.int64)
        tile, row = tl.load(piece), tl.load(piece + 1).to(tl.int64)
        begin, end = tl.load(piece + 2), tl.load(piece + 3)
        if tile >= 0:
            sibling = tile % tiles * SIBLINGS + lane // GROUP
            place = (tile // tiles).to(tl.int64) * n + sibling
            live = (lane < SIBLINGS * GROUP) & (sibling < n)
            sequence = tl.load(siblings_ptr + place, mask=live, other=0)
            # a place that is not in use names a sequence that stands elsewhere
            live = live & (tl.load(sibling_index_ptr + sequence, mask=live, other=-1) == place)
            k_base = prefix_k_ptr + row * prefix_row_stride + kv_head * prefix_head_stride
            v_base = prefix_v_ptr + row * prefix_row_stride + kv_head * prefix_head_stride
            stride = prefix_stride.to(tl.int64)
        else:
            own = -1 - tile.to(tl.int64)
            live = lane < GROUP
            sequence = own + 0 * lane.to(tl.int64)
            k_base = suffix_k_ptr + row * suffix_row_stride + kv_head * suffix_head_stride
            v_base = suffix_v_ptr + row * suffix_row_stride + kv_head * suffix_head_stride
            stride = suffix_stride.to(tl.int64)
            new = tl.load(held_ptr + own)
            if new < end:  # the new position is in this piece: it is written here, and read below
                one = tl.zeros((1, 1), tl.int64)
                k_ptr = qkv_ptr + (own * merged + heads + kv_head) * CHANNELS
                angle = own * HALF + one
                k = _turned(
                    k_ptr + one, k_norm_ptr, cos_ptr + angle, sin_ptr + angle, real[None, :], eps, HAS_NORM, HALF,
                    CHANNEL_BLOCK,
                )  # fmt: skip
                v = tl.load(k_ptr + kv_heads * CHANNELS + channel, mask=real, other=0.0)
                tl.store(k_base + new * stride + channel[None, :], k.to(k_base.dtype.element_ty), mask=real[None, :])
                tl.store(v_base + new * stride + channel, v, mask=real)
                tl.debug_barrier()

        query = kv_head * GROUP + lane % GROUP
        mask = live[:, None] & real[None, :]
        angle = (sequence * HALF)[:, None]
        q = _turned(
            qkv_ptr + ((sequence * merged + query) * CHANNELS)[:, None], q_norm_ptr, cos_ptr + angle, sin_ptr + angle,
            mask, eps, HAS_NORM, HALF, CHANNEL_BLOCK,
        ).to(qkv_ptr.dtype.element_ty)  # fmt: skip
        highest = tl.full((ROWS,), -1e30, tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        values = tl.zeros((ROWS, CHANNEL_BLOCK), tl.float32)
        for start in range(begin, end, BLOCK):
            position = (start + tl.arange(0, BLOCK)).to(tl.int64)
            inside = position < end
            kv_mask = inside[:, None] & real[None, :]
            k = tl.load(k_base + position[:, None] * stride + channel[None, :], mask=kv_mask, other=0.0)
            # (fp32 caches only: three tf32 products, as exact as fp32 and without its spilling)
            scores = tl.dot(q, tl.trans(k), input_precision="tf32x3") * scale
            scores = tl.where(inside[None, :], scores, -1e30)
            new_highest = tl.maximum(highest, tl.max(scores, 1))
            shrink = tl.exp(highest - new_highest)
            weights = tl.exp(scores - new_highest[:, None])
            v = tl.load(v_base + position[:, None] * stride + channel[None, :], mask=kv_mask, other=0.0)
            values = values * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="tf32x3")
            total = total * shrink + tl.sum(weights, 1)
            highest = new_highest

        head = sequence * heads + query
        part = begin // SPLIT + tl.where(tile < 0, prefix_splits, 0)
        at = head * splits + part
        tl.store(values_ptr + at[:, None] * CHANNELS + channel[None, :], values, mask=mask)
        tl.store(highest_ptr + at, highest, mask=live)
        tl.store(sums_ptr + at, total, mask=live)
        used = tl.load(parts_ptr + 2 * sequence, mask=live, other=0)
        needed = tl.load(parts_ptr + 2 * sequence + 1, mask=live, other=1)
        tl.debug_barrier()  # the query's other pieces may be added up by another program, once this one is counted
        before = tl.atomic_add(finished_ptr + head, 1, mask=live, sem="acq_rel")
        last = live & ((before + 1) % needed == 0)
        tl.debug_barrier()
        highest = tl.full((ROWS,), -1e30, tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        values = tl.zeros((ROWS, CHANNEL_BLOCK), tl.float32)
        for split in range(0, tl.max(tl.where(last, needed, 0), 0)):
            here = last & (split < needed)
            at = head * splits + tl.where(split < used, split, prefix_splits + split - used)
            part_highest = tl.load(highest_ptr + at, mask=here, other=-1e30)
            new_highest = tl.maximum(highest, part_highest)
            shrink, weight = tl.exp(highest - new_highest), tl.exp(part_highest - new_highest)
            part_values = tl.load(
                values_ptr + at[:, None] * CHANNELS + channel[None, :], mask=here[:, None] & real[None, :], other=0.0
            )
            values = values * shrink[:, None] + weight[:, None] * part_values
            total = total * shrink + weight * tl.load(sums_ptr + at, mask=here, other=0.0)
            highest = new_highest
        done = (values / total[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + head[:, None] * CHANNELS + channel[None, :], done, mask=last[:, None] & real[None, :])
