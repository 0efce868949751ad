"""The Triton kernels of `sample`: statistics, histogram, draw (minem/kernels/sampling.py says what they do).

python -m pytest --ptx sm_90 tests/kernels/test_sampling.py
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from minem.kernels.backend import constexpr, jit, tl
from minem.kernels.histogram import (
    BINS,
    COUNTERS,
    GOAL,
    LOG_MIN_P,
    LOW,
    NEEDED,
    NUMBERS,
    PEAK,
    Q_PEAK,
    Q_TOTAL,
    STATE,
    THRESHOLD,
    TOTAL,
    UNIT,
    UPPER,
    advance,
    bits_of,
    clear,
    kth_largest,
    mass_of,
    places,
)

BLOCK, BLOCKS = constexpr(512), constexpr(16)  # logits of a block, and blocks of a program
LOG2_E = constexpr(1.4426950408889634)


def sample_triton(
    logits: Tensor, rows: Sequence[Tensor], stop_ids: Tensor | None, min_tokens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `sample`, whose arguments are checked already."""
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    count, vocabulary = logits.shape
    tiles = -(-vocabulary // (BLOCKS.value * BLOCK.value))
    wide = logits.element_size() == 4

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    tokens, logprobs, proposal_logprobs = new(count, dtype=torch.int64), new(count), new(count)
    if stop_ids is None or min_tokens is None:
        stops, stop_count = (tokens, tokens), 0  # not read
    else:
        stops, stop_count = (stop_ids.contiguous(), min_tokens.contiguous()), len(stop_ids)
    scratch = (
        torch.zeros(count, STATE.value, dtype=torch.int64, device=logits.device),
        new(4, count, tiles * BLOCKS.value),
        new(count, NUMBERS.value),
        new(count, 1 << 16, dtype=torch.int64 if wide else torch.int32),
    )
    temperature, top_k, top_p, min_p, seeds, positions = (x.contiguous() for x in rows)
    row = (logits, logits.stride(0), vocabulary, temperature, top_k, top_p, min_p, positions, *stops, stop_count)
    options = {
        "TILES": tiles,
        "PLACES": 1 << (tiles * BLOCKS.value - 1).bit_length(),
        "WIDE": wide,
        "num_warps": 4,
        "CHUNK": 4096 if wide else 512,
        "PART": 4 if wide else 8,  # blocks that a program holds in registers
    }
    _statistics_kernel[(tiles, count)](*row, *scratch, **options)
    for number in range(4 if wide else 1):  # of wide logits top-k, then top-p, each by two halves of their bits
        _histogram_kernel[(tiles, count)](*row, *scratch, number, **options)
    _draw_kernel[(tiles, count)](*row, *scratch, seeds, tokens, logprobs, proposal_logprobs, **options)
    return tokens, logprobs, proposal_logprobs


# The kernels' common arguments: a number or a pointer that differs between batches must not compile another variant.
SCALARS = ["stop_count", "number"]
POINTERS = "temperature top_k top_p min_p positions stop_ids min_tokens seeds state blocks numbers bins tokens logprobs"
ALIGNED = [f"{name}_ptr" for name in (*POINTERS.split(), "proposal")]
compiled_once = partial(jit, do_not_specialize=SCALARS, do_not_specialize_on_alignment=ALIGNED)


@compiled_once
def _statistics_kernel(
    logits_ptr, row_stride, vocabulary, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, positions_ptr, stop_ids_ptr,
    min_tokens_ptr, stop_count, state_ptr, blocks_ptr, numbers_ptr, bins_ptr,
    TILES: tl.constexpr, PLACES: tl.constexpr, WIDE: tl.constexpr, CHUNK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Largest logit and mass of each block, raw and as drawn from. A row's last program begins the search."""
    row = tl.program_id(1).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    state_ptr += row * STATE
    numbers_ptr += row * NUMBERS
    blocks_ptr += row * TILES * BLOCKS
    of_kind = tl.num_programs(1).to(tl.int64) * TILES * BLOCKS
    divisor, greedy = _divisor(temperature_ptr + row)
    stops = _stops(positions_ptr + row, min_tokens_ptr + row, stop_count)
    for part in range(0, _blocks(vocabulary), PART):
        block, column = _columns(part, PART)
        z = tl.load(row_ptr + column, mask=column < vocabulary, other=-float("inf"))
        peaks, shifted = _shifted(z)
        sums = tl.sum(tl.exp(shifted), 1)
        tl.store(blocks_ptr + block, peaks)
        tl.store(blocks_ptr + of_kind + block, sums)
        if stops > 0:
            peaks, shifted = _shifted(_stopped(z, column, stop_ids_ptr, stops))
        if (divisor != 1.0) | (stops > 0):
            sums = tl.sum(tl.exp2(shifted * (LOG2_E / divisor)), 1)
        tl.store(blocks_ptr + 2 * of_kind + block, peaks)
        tl.store(blocks_ptr + 3 * of_kind + block, sums)

    if _is_last(state_ptr + COUNTERS, TILES):
        place = tl.arange(0, PLACES)
        inside = place < tl.cdiv(vocabulary, BLOCK)
        peak, total, _ = _row_statistics(blocks_ptr, of_kind, 1.0, place, inside)
        q_peak, q_total, q_peaks = _row_statistics(blocks_ptr + 2 * of_kind, of_kind, divisor, place, inside)
        goal, low, needed = _begin(
            top_k_ptr + row, top_p_ptr + row, greedy, q_peaks, q_peak, q_total, divisor, vocabulary
        )
        if goal > 0:
            first, last = places(low, q_peak, logits_ptr.dtype.element_ty)
            clear(bins_ptr + row * BINS, first, last, CHUNK)
        tl.store(state_ptr + GOAL, goal)
        tl.store(state_ptr + UPPER, -1)
        tl.store(state_ptr + NEEDED, needed)
        tl.store(numbers_ptr + PEAK, peak)
        tl.store(numbers_ptr + TOTAL, total)
        tl.store(numbers_ptr + Q_PEAK, q_peak)
        tl.store(numbers_ptr + Q_TOTAL, q_total)
        tl.store(numbers_ptr + LOW, low)
        tl.store(numbers_ptr + THRESHOLD, -float("inf"))
        tl.store(numbers_ptr + LOG_MIN_P, _log_min_p(min_p_ptr + row))


@jit
def _begin(
    top_k_ptr, top_p_ptr, greedy, q_peaks, q_peak, q_total, divisor, vocabulary
):  # fmt: skip
    """The first goal of a row's search, a logit that the threshold is not below, and how many or how much is needed."""
    k = tl.load(top_k_ptr)
    p = tl.load(top_p_ptr).to(tl.float32)
    goal = 0
    low = -float("inf")
    needed = k
    if (k > 0) & (k < vocabulary) & (greedy == 0):
        goal = 1
        if k <= tl.cdiv(vocabulary, BLOCK):  # k blocks have a logit of at least the k-th largest of their peaks
            low = kth_largest(q_peaks, k)
    elif (p < 1.0) & (greedy == 0):
        goal = 2
        # All logits that weigh less than (1 - p) total / V weigh too little together to reach into the kept set.
        low = q_peak + divisor * tl.log(0.999 * (1.0 - p) * q_total / vocabulary)
        needed = tl.maximum((p * q_total * 2.0**UNIT).to(tl.int64), 1)
    return tl.where(q_total > 0, goal, 0), low, needed  # none for NaN, nor where nothing can be drawn


# Its loads are of one logit a thread, as its atomic additions are: the two need no exchange through shared memory.
@partial(jit, do_not_specialize=[*SCALARS, "row_stride"], do_not_specialize_on_alignment=ALIGNED)
def _histogram_kernel(
    logits_ptr, row_stride, vocabulary, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, positions_ptr, stop_ids_ptr,
    min_tokens_ptr, stop_count, state_ptr, blocks_ptr, numbers_ptr, bins_ptr, number,
    TILES: tl.constexpr, PLACES: tl.constexpr, WIDE: tl.constexpr, CHUNK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Count the logits by their bits, or weigh them. A row's last program finds the threshold, and what is next."""
    row = tl.program_id(1).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    state_ptr += row * STATE
    bins_ptr += row * BINS
    numbers_ptr += row * NUMBERS
    goal = tl.load(state_ptr + GOAL)
    if goal > 0:
        low = tl.load(numbers_ptr + LOW)
        q_peak = tl.load(numbers_ptr + Q_PEAK)
        upper = tl.load(state_ptr + UPPER)
        divisor, _ = _divisor(temperature_ptr + row)
        scale = LOG2_E / divisor
        ones = tl.full((PART // 2 * BLOCK,), 1, bins_ptr.dtype.element_ty)
        stops = _stops(positions_ptr + row, min_tokens_ptr + row, stop_count)
        peaks_ptr = blocks_ptr + (2 * tl.num_programs(1) + row) * TILES * BLOCKS
        for part in range(0, _blocks(vocabulary), PART // 2):
            block = tl.program_id(0) * BLOCKS + part
            peak = -float("inf")
            for i in tl.static_range(PART // 2):
                peak = tl.maximum(peak, tl.load(peaks_ptr + block + i))
            if peak >= low:  # others are not read
                column = block * BLOCK + tl.arange(0, PART // 2 * BLOCK)
                z = tl.load(row_ptr + column, mask=column < vocabulary, other=float("nan"))
                z = _stopped(z, column, stop_ids_ptr, stops)
                counted = z.to(tl.float32) >= low  # not NaN
                if WIDE:
                    bits = z.to(tl.int32, bitcast=True)
                    counted = counted & ((upper < 0) | (((bits >> 16) & 0xFFFF) == bits_of(upper, -1)))
                    bits = tl.where(upper < 0, bits >> 16, bits) & 0xFFFF
                else:
                    bits = z.to(tl.uint16, bitcast=True).to(tl.int32)
                if WIDE & (goal == 2):
                    masses = mass_of(z.to(tl.float32) - q_peak, scale)
                    tl.atomic_add(bins_ptr + bits, masses, mask=counted, sem="relaxed")
                else:
                    tl.atomic_add(bins_ptr + bits, ones, mask=counted, sem="relaxed")

        if _is_last(state_ptr + COUNTERS + 1 + number, TILES):
            advance(
                state_ptr, numbers_ptr, bins_ptr, top_p_ptr + row, goal, upper, low, q_peak, scale,
                logits_ptr.dtype.element_ty, WIDE, CHUNK,
            )  # fmt: skip


@compiled_once
def _draw_kernel(
    logits_ptr, row_stride, vocabulary, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, positions_ptr, stop_ids_ptr,
    min_tokens_ptr, stop_count, state_ptr, blocks_ptr, numbers_ptr, bins_ptr, seeds_ptr, tokens_ptr, logprobs_ptr,
    proposal_ptr, TILES: tl.constexpr, PLACES: tl.constexpr, WIDE: tl.constexpr, CHUNK: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    """Weigh what is kept of each block over its raw mass, if not all is. One program of a row draws block and token."""
    row = tl.program_id(1).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    state_ptr += row * STATE
    numbers_ptr += row * NUMBERS
    blocks_ptr += row * TILES * BLOCKS
    of_kind = tl.num_programs(1).to(tl.int64) * TILES * BLOCKS
    q_peak = tl.load(numbers_ptr + Q_PEAK)
    threshold = tl.load(numbers_ptr + THRESHOLD)
    log_min_p = tl.load(numbers_ptr + LOG_MIN_P)
    divisor, greedy = _divisor(temperature_ptr + row)
    stops = _stops(positions_ptr + row, min_tokens_ptr + row, stop_count)
    nothing = tl.load(numbers_ptr + Q_TOTAL) == 0.0  # nothing but -inf; not so for NaN, which tl.max passes over
    filtered = ((threshold > -float("inf")) | (log_min_p > -float("inf"))) & (greedy == 0)
    draws = tl.program_id(0) == 0
    if filtered:
        for part in range(0, _blocks(vocabulary), PART):
            block, column = _columns(part, PART)
            largest = tl.load(blocks_ptr + 2 * of_kind + block)
            read = _kept(largest, q_peak, divisor, threshold, log_min_p) > 0.0  # blocks that have something to keep
            tile = tl.load(row_ptr + column, mask=read[:, None] & (column < vocabulary), other=-float("inf"))
            tile = _stopped(tile, column, stop_ids_ptr, stops)
            tl.store(blocks_ptr + of_kind + block, tl.sum(_kept(tile, q_peak, divisor, threshold, log_min_p), 1))
        draws = _is_last(state_ptr + COUNTERS + 5, TILES)
    if draws:
        place = tl.arange(0, PLACES)
        inside = place < tl.cdiv(vocabulary, BLOCK)
        peaks = tl.load(blocks_ptr + 2 * of_kind + place, mask=inside, other=-float("inf"))
        if filtered:
            masses = tl.load(blocks_ptr + of_kind + place, mask=inside, other=0.0)
        else:
            masses = tl.load(blocks_ptr + 3 * of_kind + place, mask=inside, other=0.0)
            masses *= tl.exp((peaks - q_peak) / divisor)
        running = tl.cumsum(masses.to(tl.float64), 0)
        token = _token(
            row_ptr, vocabulary, stop_ids_ptr, stops, seeds_ptr + row, positions_ptr + row, running, peaks == q_peak,
            q_peak, divisor, threshold, log_min_p, greedy, nothing,
        )  # fmt: skip
        z_token = tl.load(row_ptr + token).to(tl.float32)
        total = tl.where(nothing, 1.0, tl.load(numbers_ptr + TOTAL))
        q_total = tl.where(greedy | nothing, 1.0, tl.max(running, 0)).to(tl.float32)
        proposal = tl.where(greedy, 0.0, (z_token - q_peak) / divisor - tl.log(q_total))
        tl.store(tokens_ptr + row, token)
        logprob = z_token - tl.load(numbers_ptr + PEAK) - tl.log(total)
        tl.store(logprobs_ptr + row, tl.where(nothing, -float("inf"), logprob))
        tl.store(proposal_ptr + row, tl.where(nothing, -float("inf"), proposal))


@jit
def _token(
    row_ptr, vocabulary, stop_ids_ptr, stops, seed_ptr, position_ptr, running, largest, q_peak, divisor, threshold,
    log_min_p, greedy, nothing,
):  # fmt: skip
    """The token that u falls on, given the running mass of the blocks; or the first of the largest, if greedy."""
    # Inverse CDF: the first block whose running mass passes u, then the first token in it.
    position = tl.load(position_ptr)
    zero = 0 * position.to(tl.uint32)
    word, _, _, _ = tl.philox(tl.load(seed_ptr), position.to(tl.uint32), (position >> 32).to(tl.uint32), zero, 0)
    target = (word.to(tl.float64) + 0.5) * 2.3283064365386963e-10 * tl.max(running, 0)  # 2^-32
    index = tl.sum((running <= target).to(tl.int32), 0)
    index = tl.where(greedy, tl.argmax(largest.to(tl.int32), 0), index)
    index = tl.minimum(index, tl.cdiv(vocabulary, BLOCK) - 1)
    left = (target - tl.max(tl.where(running <= target, running, 0.0), 0)).to(tl.float32)
    inner = index * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(row_ptr + inner, mask=inner < vocabulary, other=-float("inf"))
    z = _stopped(z, inner, stop_ids_ptr, stops)
    kept = _kept(z, q_peak, divisor, threshold, log_min_p)
    hit = tl.min(tl.where((tl.cumsum(kept, 0) > left) & (kept > 0.0), inner, vocabulary), 0)
    last = tl.max(tl.where(kept > 0.0, inner, 0), 0)  # where rounding left no hit
    first = tl.min(tl.where(z.to(tl.float32) == q_peak, inner, vocabulary - 1), 0)
    return tl.where(nothing, 0, tl.where(greedy, first, tl.minimum(hit, last)))


@jit
def _blocks(vocabulary):
    """How many blocks of the row this program has: fewer at its end."""
    return tl.minimum(tl.cdiv(vocabulary, BLOCK) - tl.program_id(0) * BLOCKS, BLOCKS)


@jit
def _columns(part, PART: tl.constexpr):
    """The PART blocks of this program from its block `part`, and their columns."""
    block = tl.program_id(0) * BLOCKS + part + tl.arange(0, PART)
    return block, block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]


@jit
def _divisor(temperature_ptr):
    """What logits are divided by, and whether the row is greedy."""
    temperature = tl.load(temperature_ptr).to(tl.float32)
    return tl.where(temperature == 0.0, 1.0, temperature), temperature == 0.0


@jit
def _stops(position_ptr, min_tokens_ptr, stop_count):
    """How many stop tokens may not be drawn yet."""
    least = tl.load(min_tokens_ptr, mask=stop_count > 0, other=0)
    return tl.where(tl.load(position_ptr) < least, stop_count, 0)


@jit
def _stopped(z, column, stop_ids_ptr, stops):
    never = (tl.zeros_like(column) - float("inf")).to(z.dtype)
    for i in range(0, stops):
        z = tl.where(column == tl.load(stop_ids_ptr + i), never, z)
    return z


@jit
def _log_min_p(min_p_ptr):
    """The smallest fp32 number not below log(min_p), -inf if that is 0: comparing with it is exact at the boundary."""
    min_p = tl.load(min_p_ptr).to(tl.float32)
    exact = tl.minimum(tl.log(tl.maximum(min_p, 1e-37).to(tl.float64)), 0.0)
    rounded = exact.to(tl.float32)
    next_up = (rounded.to(tl.int32, bitcast=True) - 1).to(tl.float32, bitcast=True)  # towards 0: it is negative
    return tl.where(min_p > 0.0, tl.where(rounded.to(tl.float64) < exact, next_up, rounded), -float("inf"))


@jit
def _kept(z, q_peak, divisor, threshold, log_min_p):
    """exp((z - q_peak) / divisor) of the kept logits, 0 for the others."""
    shifted = z.to(tl.float32) - q_peak
    masses = tl.where(z.to(tl.float32) >= threshold, tl.exp2(shifted * (LOG2_E / divisor)), 0.0)
    if log_min_p > -float("inf"):
        masses = tl.where(shifted / divisor >= log_min_p, masses, 0.0)
    return masses


@jit
def _shifted(z):
    """Of each row of z [BLOCKS, BLOCK] the largest logit in fp32, and the logits minus it."""
    peaks = tl.max(z.to(tl.float32), 1)
    return peaks, z.to(tl.float32) - tl.where(peaks == -float("inf"), 0.0, peaks)[:, None]


@jit
def _row_statistics(peaks_ptr, of_kind, divisor, place, inside):
    """The row's largest logit (0 if all are -inf), its sum of exp((z - largest) / divisor), and its blocks' largest."""
    peaks = tl.load(peaks_ptr + place, mask=inside, other=-float("inf"))
    peak = tl.max(peaks, 0)
    peak = tl.where(peak == -float("inf"), 0.0, peak)
    sums = tl.load(peaks_ptr + of_kind + place, mask=inside, other=0.0)
    return peak, tl.sum(sums * tl.exp((peaks - peak) / divisor), 0), peaks


@jit
def _is_last(counter_ptr, count):
    """Whether this program is the last of `count` to come here; it sees what all the others wrote before."""
    tl.debug_barrier()
    return tl.atomic_add(counter_ptr, 1) == count - 1
