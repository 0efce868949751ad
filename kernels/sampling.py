"""Draw one token per row of logits, and say how likely it was.

One draw costs one uniform number u: the token is where the cumulative probability first passes u (inverse CDF). u comes
from Philox4x32-10, a counter-based generator: key = the row's seed, counter = its position. So a draw depends on (seed,
position) and its own logits, never on its batch; every reduction runs along one row in a fixed order.

The kept set does not depend on the order of equal logits. With x = logits / temperature (stop tokens that are not yet
allowed at -inf), all filters together, as transformers applies them:
    top-k   keeps x_i if fewer than k logits are larger: ties with the k-th are all kept
    top-p   keeps x_i if the more probable tokens of the top-k set have less than p of its mass: the token that
            crosses p is kept, ties with it too
    min-p   keeps x_i if its probability is at least min_p times the largest one

The eager reference sorts. The Triton kernel, one program a row, searches the ordered bit patterns of the logits nine
parts at a time. Bytes moved: a plain draw reads the row once from memory (2 V in bf16: 18 us at B=256, V=151,936 and
4.3 TB/s) and half of it again from the L2 cache; truncation reads it six (bf16) to twelve (fp32) times more from there.

    python -m pytest tests/kernels/test_sampling.py
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minem.kernels.backend import constexpr, jit, pick, tl

TILE = 64  # of the eager reference
BLOCK, BLOCKS = constexpr(512), constexpr(16)  # logits of a block, and blocks of a program
PART = constexpr(8)  # blocks that a program holds in registers
BINS = constexpr(1 << 16)  # of a row's histogram
UNIT = constexpr(38)  # masses are counted in whole numbers, of 2^-UNIT: these sum to the same in any order
LOG2_E = constexpr(1.4426950408889634)
# What is known of a row, int64: what is searched for next (0: nothing, 1: top-k, 2: top-p), the upper half of the
# threshold's key (-1: not found yet), how many logits or how much mass the kept set needs (0: top_p of what is found),
# and counters of the programs that are done.
GOAL, UPPER, NEEDED, COUNTERS, STATE = map(constexpr, (0, 1, 2, 3, 9))
# And fp32: the largest logit and the mass, raw and as drawn from; no logit below `LOW` can be the threshold.
PEAK, TOTAL, Q_PEAK, Q_TOTAL, LOW, THRESHOLD, LOG_MIN_P, NUMBERS = map(constexpr, range(8))
Rows = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # temperature, top_k, top_p, min_p, seeds, positions
Draws = tuple[Tensor, Tensor, Tensor]  # tokens, logprobs, proposal_logprobs


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    *,
    stop_ids: Tensor | None = None,
    min_tokens: Tensor | None = None,
    backend: str | None = None,
) -> Draws:
    """Draw a token for each row of logits [B, V].

    All [B]: temperature float (0: greedy, the lowest index among equals), top_k int64 (0: off), top_p float
    (1: off), min_p float (0: off), seeds int64, positions int64 (tokens drawn so far). stop_ids [K] int64, within
    [0, V), cannot be drawn while positions < min_tokens [B] int64; pass both or neither.

    Returns (tokens [B] int64, logprobs [B], proposal_logprobs [B]), the latter two in float32 (float64 for float64
    logits), in nats: the raw logits' log-softmax at the token (temperature 1, nothing masked), and the log-probability
    with which it was drawn, after temperature, truncation and stop mask (0 for greedy). A row with all logits -inf or
    masked gives token 0 with a log-probability of -inf; one with NaN or +inf a raw log-probability of NaN.
    """
    arguments = (logits.detach(), (temperature, top_k, top_p, min_p, seeds, positions), stop_ids, min_tokens)
    _check(*arguments)
    return (_sample_triton if pick(backend, logits) == "triton" else _sample_eager)(*arguments)


def _check(logits: Tensor, rows: Rows, stop_ids: Tensor | None, min_tokens: Tensor | None) -> None:
    if logits.ndim != 2 or logits.shape[1] == 0 or not logits.is_floating_point():
        raise ValueError(f"logits must be floating [B, V] with V > 0; got {logits.dtype} {list(logits.shape)}")
    if (stop_ids is None) != (min_tokens is None):
        raise ValueError("stop_ids and min_tokens belong together: pass both or neither")
    if stop_ids is not None and (stop_ids.ndim != 1 or stop_ids.dtype != torch.int64):
        raise ValueError(f"stop_ids must be int64 [K]; got {stop_ids.dtype} {list(stop_ids.shape)}")
    names = ("temperature", "top_k", "top_p", "min_p", "seeds", "positions", "min_tokens")
    for name, row in zip(names, (*rows, min_tokens), strict=True):
        if row is not None and row.shape != logits.shape[:1]:
            raise ValueError(f"{name} must be [{logits.shape[0]}], one per row of logits; got {list(row.shape)}")


def uniforms(seeds: Tensor, positions: Tensor) -> Tensor:
    """One uniform number in (0, 1) per row, float64 [B] on the CPU: (x + 1/2) / 2^32, x the first word of Philox4x32-10
    with key `seeds` [B] int64 and counter `positions` [B] int64 (Salmon et al., "Parallel random numbers: as easy as
    1, 2, 3", 2011). In numpy, whose calls cost a fifth of PyTorch's on few numbers.
    """
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    multipliers = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=np.uint64)
    weyl = np.array([[0x9E3779B9], [0xBB67AE85]], dtype=np.uint64)
    key = seeds.cpu().numpy().astype(np.int64).view(np.uint64)
    counter = positions.cpu().numpy().astype(np.int64).view(np.uint64)
    # the key of each of the ten rounds: [10, 2, B]
    keys = (np.stack([key & low, key >> shift]) + np.arange(10, dtype=np.uint64)[:, None, None] * weyl) & low
    # the counter's four words: `even` holds words 0 and 2, `odd` words 1 and 3
    even = np.stack([counter & low, np.zeros_like(counter)])
    odd = np.stack([counter >> shift, np.zeros_like(counter)])
    for round_key in keys:
        product = even * multipliers
        even = (product >> shift)[::-1] ^ odd ^ round_key
        odd = (product & low)[::-1]
    return torch.from_numpy((even[0].astype(np.float64) + 0.5) * 2.0**-32)


def _sample_eager(logits: Tensor, rows: Rows, stop_ids: Tensor | None, min_tokens: Tensor | None) -> Draws:
    temperature, top_k, top_p, min_p, seeds, positions = rows
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    peak = _peak(logits)
    exps, running = _masses(logits, peak)
    log_total = running[:, -1].log()
    early = None if stop_ids is None or min_tokens is None else positions < min_tokens
    plain = (temperature == 1) & (top_k <= 0) & (top_p >= 1) & (min_p <= 0)
    if plain.all() and not (early is not None and early.any()):  # what is drawn from is the raw distribution
        tokens = _inverse_cdf(exps, running, uniforms(seeds, positions))
        logprobs = _logprobs(logits, tokens, peak, log_total)
        return tokens, logprobs, logprobs.clone()

    allowed = logits
    if early is not None:
        allowed = logits.clone()
        allowed[:, stop_ids] = allowed[:, stop_ids].masked_fill(early.unsqueeze(1), -torch.inf)
    greedy = temperature == 0
    # numpy finds the first largest twenty times faster than PyTorch does on a CPU
    first = torch.from_numpy(allowed.detach().cpu().numpy().argmax(axis=-1)).to(logits.device)
    if greedy.all():
        tokens, proposal = first, torch.zeros_like(peak)
    else:
        divisor = temperature.to(logits.dtype).masked_fill(greedy, 1.0)
        q_peak = _peak(allowed)
        truncates = ((top_k > 0) | (top_p < 1) | (min_p > 0)).any()
        threshold = _threshold(allowed, q_peak, divisor, top_k, top_p, min_p) if truncates else None
        exps, running = _masses(allowed, q_peak, divisor, threshold)
        tokens = torch.where(greedy, first, _inverse_cdf(exps, running, uniforms(seeds, positions)))
        proposal = _logprobs(allowed, tokens, q_peak, running[:, -1].log(), divisor).masked_fill_(greedy, 0.0)
    nothing = _at(allowed, tokens) == -torch.inf
    logprobs = _logprobs(logits, tokens, peak, log_total)
    return tokens, logprobs.masked_fill_(nothing, -torch.inf), proposal.masked_fill_(nothing, -torch.inf)


def _peak(logits: Tensor) -> Tensor:
    """The largest logit of each row [B]; finite for rows of -inf alone, so that subtracting it leaves them -inf."""
    return logits.amax(dim=-1).clamp_(min=torch.finfo(logits.dtype).min)


def _logprobs(logits: Tensor, tokens: Tensor, peak: Tensor, log_total: Tensor, divisor: Tensor | float = 1.0) -> Tensor:
    """Log-probability of each row's token, [B] in the dtype of logits; -inf in a row without mass."""
    x = (_at(logits, tokens) - peak) / divisor
    return (x - log_total).masked_fill_(log_total == -torch.inf, -torch.inf).to(logits.dtype)


def _at(values: Tensor, tokens: Tensor) -> Tensor:
    """values [B, V] at tokens [B]: [B]."""
    return values.gather(1, tokens.unsqueeze(1)).squeeze(1)


def _masses(
    logits: Tensor, peak: Tensor, divisor: Tensor | None = None, threshold: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """exp((logits - peak) / divisor) in tiles [B, tiles, TILE], 0 for logits below the row's threshold, and the
    running sum over tiles [B, tiles] in float64."""
    rows, vocabulary = logits.shape
    tiles = -(-vocabulary // TILE)
    x = logits.new_empty(rows, tiles * TILE)
    torch.sub(logits, peak.unsqueeze(1), out=x[:, :vocabulary])
    x[:, vocabulary:] = -torch.inf
    if divisor is not None:
        x /= divisor.unsqueeze(1)
    if threshold is not None:
        x[:, :vocabulary].masked_fill_(logits < threshold.unsqueeze(1), -torch.inf)
    exps = x.exp_().view(rows, tiles, TILE)
    return exps, exps.sum(dim=-1).cumsum(dim=-1, dtype=torch.float64)


def _inverse_cdf(exps: Tensor, running: Tensor, u: Tensor) -> Tensor:
    """The token [B] at which the cumulative mass first exceeds u [B] times the row's mass; never one without mass."""
    rows, tiles = running.shape
    target = (u.to(running.device) * running[:, -1]).unsqueeze(1)
    tile = (running <= target).sum(dim=-1, keepdim=True)
    before = F.pad(running, (1, 0)).gather(1, tile)  # a row without mass has tile = tiles: any tile is as good
    tile = tile.clamp_(max=tiles - 1)
    inside = exps.gather(1, tile.unsqueeze(2).expand(rows, 1, TILE)).squeeze(1).cumsum(dim=-1, dtype=torch.float64)
    # The tile's sum was rounded, so what is left may reach past its end: then its last token with mass is meant.
    left = torch.minimum(target - before, inside[:, -1:] * (1 - 2.0**-50))
    offset = (inside <= left).sum(dim=-1, keepdim=True)
    # only a row without any mass runs off the end of its tile
    return (tile * TILE + offset).masked_fill_(offset == TILE, 0).squeeze(1)


def _threshold(logits: Tensor, peak: Tensor, divisor: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """The smallest kept logit of each row [B] under top-k, then top-p, then min-p; -inf where all are off."""
    vocabulary = logits.shape[1]
    ordered = logits.sort(dim=-1, descending=True).values
    x = ((ordered - peak.unsqueeze(1)) / divisor.unsqueeze(1)).double()
    k = top_k.masked_fill(top_k <= 0, vocabulary).clamp(max=vocabulary)
    by_k = _at(ordered, k - 1)
    mass = x.exp().masked_fill_(ordered < by_k.unsqueeze(1), 0.0).cumsum_(dim=-1)
    needed = (top_p.double() * mass[:, -1]).masked_fill(top_p >= 1, torch.inf)
    crossing = (mass < needed.unsqueeze(1)).sum(dim=-1).clamp_(max=vocabulary - 1)
    probable = (x >= min_p.double().log().clamp_(max=0.0).unsqueeze(1)).sum(dim=-1).clamp_(min=1) - 1
    return torch.maximum(by_k, _at(ordered, torch.minimum(crossing, probable)))


def _sample_triton(logits: Tensor, rows: Rows, stop_ids: Tensor | None, min_tokens: Tensor | None) -> Draws:
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
    state = torch.zeros(count, STATE.value, dtype=torch.int64, device=logits.device)
    scratch = (
        state,
        new(4, count, tiles * BLOCKS.value),
        new(count, NUMBERS.value),
        new(count, 1 << 16, dtype=torch.int64),
    )
    temperature, top_k, top_p, min_p, seeds, positions = (x.contiguous() for x in rows)
    row = (logits, logits.stride(0), vocabulary, temperature, top_k, top_p, min_p, positions, *stops, stop_count)
    options = {
        "TILES": tiles,
        "PLACES": 1 << (tiles * BLOCKS.value - 1).bit_length(),
        "WIDE": wide,
        "num_warps": 4,
        "CHUNK": 4096 if wide else 512,
    }
    _statistics_kernel[(tiles, count)](*row, *scratch, **options)
    for number in range(4 if wide else 2):  # top-k, then top-p, each in two parts if keys are wide
        _histogram_kernel[(tiles, count)](*row, *scratch, number, **options)
    _draw_kernel[(tiles, count)](*row, *scratch, seeds, tokens, logprobs, proposal_logprobs, **options)
    return tokens, logprobs, proposal_logprobs


# The kernels' common arguments: a number or a pointer that differs between batches must not compile another variant.
KEPT = [*"temperature_ptr top_k_ptr top_p_ptr min_p_ptr positions_ptr stop_ids_ptr min_tokens_ptr seeds_ptr".split()]
KEPT += [*"state_ptr blocks_ptr numbers_ptr bins_ptr tokens_ptr logprobs_ptr proposal_ptr".split()]
compiled_once = partial(jit, do_not_specialize=["stop_count", "number"], do_not_specialize_on_alignment=KEPT)


@compiled_once
def _statistics_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, row_stride, vocabulary, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, positions_ptr, stop_ids_ptr,
    min_tokens_ptr, stop_count, state_ptr, blocks_ptr, numbers_ptr, bins_ptr,
    TILES: tl.constexpr, PLACES: tl.constexpr, WIDE: tl.constexpr, CHUNK: tl.constexpr,
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
    for part in range(0, BLOCKS, PART):
        block, column = _columns(part)
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
        inside = place < TILES * BLOCKS
        peak, total, _ = _row_statistics(blocks_ptr, of_kind, 1.0, place, inside)
        q_peak, q_total, q_peaks = _row_statistics(blocks_ptr + 2 * of_kind, of_kind, divisor, place, inside)
        k = tl.load(top_k_ptr + row)
        p = tl.load(top_p_ptr + row).to(tl.float32)
        goal = 0
        low = -float("inf")
        needed = k
        if (k > 0) & (k < vocabulary) & (greedy == 0):
            goal = 1
            if k <= tl.cdiv(vocabulary, BLOCK):  # k blocks have a logit of at least the k-th largest of their peaks
                low = _kth_largest(q_peaks, k)
        elif (p < 1.0) & (greedy == 0):
            goal = 2
            # All logits that weigh less than (1 - p) total / V weigh too little together to reach into the kept set.
            low = q_peak + divisor * tl.log(0.999 * (1.0 - p) * q_total / vocabulary)
            needed = tl.maximum((p * q_total * 2.0**UNIT).to(tl.int64), 1)
        goal = tl.where(q_total > 0, goal, 0)  # not for NaN, nor where nothing can be drawn
        if goal > 0:
            first, last = _range(low, q_peak, logits_ptr.dtype.element_ty)
            _clear(bins_ptr + row * BINS, first, last, CHUNK)
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


# Its loads are of one logit a thread, as its atomic additions are: the two need no exchange through shared memory.
@partial(jit, do_not_specialize=["stop_count", "number", "row_stride"], do_not_specialize_on_alignment=KEPT)
def _histogram_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, row_stride, vocabulary, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, positions_ptr, stop_ids_ptr,
    min_tokens_ptr, stop_count, state_ptr, blocks_ptr, numbers_ptr, bins_ptr, number,
    TILES: tl.constexpr, PLACES: tl.constexpr, WIDE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Count or weigh the logits by their keys. A row's last program finds the threshold, and what is next."""
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
        ones = tl.full((PART // 2 * BLOCK,), 1, tl.int64)
        stops = _stops(positions_ptr + row, min_tokens_ptr + row, stop_count)
        peaks_ptr = blocks_ptr + (2 * tl.num_programs(1) + row) * TILES * BLOCKS
        for part in range(0, BLOCKS, PART // 2):
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
                    counted = counted & ((upper < 0) | (((bits >> 16) & 0xFFFF) == _bits(upper, -1)))
                    bits = tl.where(upper < 0, bits >> 16, bits) & 0xFFFF
                else:
                    bits = z.to(tl.uint16, bitcast=True).to(tl.int32)
                if goal == 1:
                    tl.atomic_add(bins_ptr + bits, ones, mask=counted, sem="relaxed")
                else:
                    masses = tl.exp2((z.to(tl.float32) - q_peak) * scale + UNIT)
                    tl.atomic_add(bins_ptr + bits, masses.to(tl.int64), mask=counted, sem="relaxed")

        if _is_last(state_ptr + COUNTERS + 1 + number, TILES):
            p = tl.load(top_p_ptr + row).to(tl.float64)
            first, last = _range(low, q_peak, logits_ptr.dtype.element_ty)
            needed = tl.load(state_ptr + NEEDED)
            if needed == 0:
                needed = tl.maximum((p * _sum(bins_ptr, first, last, CHUNK)).to(tl.int64), 1)
            if upper >= 0:
                first = 0
                last = BINS - 1
            found, above = _crossing(bins_ptr, upper, first, last, needed, CHUNK)
            if WIDE & (upper < 0):
                tl.store(state_ptr + UPPER, found)
                tl.store(state_ptr + NEEDED, needed - above)
                _clear(bins_ptr, 0 * first, BINS - 1, CHUNK)
            else:
                threshold = _number(found, upper, logits_ptr.dtype.element_ty)
                tl.store(numbers_ptr + THRESHOLD, threshold)
                again = (goal == 1) & (p < 1.0)
                tl.store(state_ptr + GOAL, tl.where(again, 2, 0))
                if again:  # of the mass of those that top-k keeps
                    tl.store(numbers_ptr + LOW, threshold)
                    tl.store(state_ptr + UPPER, -1)
                    tl.store(state_ptr + NEEDED, 0)
                    first, last = _range(threshold, q_peak, logits_ptr.dtype.element_ty)
                    _clear(bins_ptr, first, last, CHUNK)


@compiled_once
def _draw_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, row_stride, vocabulary, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, positions_ptr, stop_ids_ptr,
    min_tokens_ptr, stop_count, state_ptr, blocks_ptr, numbers_ptr, bins_ptr, seeds_ptr, tokens_ptr, logprobs_ptr,
    proposal_ptr, TILES: tl.constexpr, PLACES: tl.constexpr, WIDE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Weigh what is kept of each block, if not all is. One program of a row draws: the block, then the token in it."""
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
        for part in range(0, BLOCKS, PART):
            block, column = _columns(part)
            largest = tl.load(blocks_ptr + 2 * of_kind + block)
            read = _kept(largest, q_peak, divisor, threshold, log_min_p) > 0.0  # blocks that have something to keep
            tile = tl.load(row_ptr + column, mask=read[:, None] & (column < vocabulary), other=-float("inf"))
            tile = _stopped(tile, column, stop_ids_ptr, stops)
            sums = tl.sum(_kept(tile, q_peak, divisor, threshold, log_min_p), 1)
            tl.store(blocks_ptr + of_kind + block, sums)  # in place of the raw ones, which are in the total by now
        draws = _is_last(state_ptr + COUNTERS + 5, TILES)
    if draws:
        place = tl.arange(0, PLACES)
        inside = place < TILES * BLOCKS
        peaks = tl.load(blocks_ptr + 2 * of_kind + place, mask=inside, other=-float("inf"))
        if filtered:
            masses = tl.load(blocks_ptr + of_kind + place, mask=inside, other=0.0)
        else:
            masses = tl.load(blocks_ptr + 3 * of_kind + place, mask=inside, other=0.0)
            masses *= tl.exp((peaks - q_peak) / divisor)
        running = tl.cumsum(masses.to(tl.float64), 0)
        q_total = tl.max(running, 0)
        # Inverse CDF: the first block whose running mass passes u, then the first token in it.
        position = tl.load(positions_ptr + row)
        word, _, _, _ = tl.philox(
            tl.load(seeds_ptr + row), position.to(tl.uint32), (position >> 32).to(tl.uint32), 0 * row.to(tl.uint32), 0
        )
        target = (word.to(tl.float64) + 0.5) * 2.3283064365386963e-10 * q_total  # 2^-32
        index = tl.sum((running <= target).to(tl.int32), 0)
        index = tl.where(greedy, tl.min(tl.where(peaks == q_peak, place, PLACES), 0), index)
        index = tl.minimum(index, TILES * BLOCKS - 1)
        left = (target - tl.max(tl.where(place < index, running, 0.0), 0)).to(tl.float32)
        inner = index * BLOCK + tl.arange(0, BLOCK)
        z = tl.load(row_ptr + inner, mask=inner < vocabulary, other=-float("inf"))
        z = _stopped(z, inner, stop_ids_ptr, stops)
        kept = _kept(z, q_peak, divisor, threshold, log_min_p)
        hit = tl.min(tl.where((tl.cumsum(kept, 0) > left) & (kept > 0.0), inner, vocabulary), 0)
        last = tl.max(tl.where(kept > 0.0, inner, 0), 0)  # where rounding left no hit
        first = tl.min(tl.where(z.to(tl.float32) == q_peak, inner, vocabulary - 1), 0)
        token = tl.where(nothing, 0, tl.where(greedy, first, tl.minimum(hit, last)))

        z_token = tl.load(row_ptr + token).to(tl.float32)
        total = tl.where(nothing, 1.0, tl.load(numbers_ptr + TOTAL))
        q_total = tl.where(greedy | nothing, 1.0, q_total)
        proposal = tl.where(greedy, 0.0, (z_token - q_peak) / divisor - tl.log(q_total.to(tl.float32)))
        tl.store(tokens_ptr + row, token)
        tl.store(
            logprobs_ptr + row, tl.where(nothing, -float("inf"), z_token - tl.load(numbers_ptr + PEAK) - tl.log(total))
        )
        tl.store(proposal_ptr + row, tl.where(nothing, -float("inf"), proposal))


@jit
def _columns(part):  # type: ignore[no-untyped-def]
    """The PART blocks of this program from its block `part`, and their columns."""
    block = tl.program_id(0) * BLOCKS + part + tl.arange(0, PART)
    return block, block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]


@jit
def _divisor(temperature_ptr):  # type: ignore[no-untyped-def]
    """What logits are divided by, and whether the row is greedy."""
    temperature = tl.load(temperature_ptr).to(tl.float32)
    return tl.where(temperature == 0.0, 1.0, temperature), temperature == 0.0


@jit
def _stops(position_ptr, min_tokens_ptr, stop_count):  # type: ignore[no-untyped-def]
    """How many stop tokens may not be drawn yet."""
    least = tl.load(min_tokens_ptr, mask=stop_count > 0, other=0)
    return tl.where(tl.load(position_ptr) < least, stop_count, 0)


@jit
def _stopped(z, column, stop_ids_ptr, stops):  # type: ignore[no-untyped-def]
    for i in range(0, stops):
        z = tl.where(column == tl.load(stop_ids_ptr + i), -float("inf"), z)
    return z


@jit
def _log_min_p(min_p_ptr):  # type: ignore[no-untyped-def]
    """The smallest fp32 number not below log(min_p), -inf if that is 0: comparing with it is exact at the boundary."""
    min_p = tl.load(min_p_ptr).to(tl.float32)
    exact = tl.minimum(tl.log(tl.maximum(min_p, 1e-37).to(tl.float64)), 0.0)
    rounded = exact.to(tl.float32)
    next_up = (rounded.to(tl.int32, bitcast=True) - 1).to(tl.float32, bitcast=True)  # towards 0: it is negative
    return tl.where(min_p > 0.0, tl.where(rounded.to(tl.float64) < exact, next_up, rounded), -float("inf"))


@jit
def _bits(place, upper):  # type: ignore[no-untyped-def]
    """Bins are numbered by the bits of a logit, places by the order of the numbers: the bin of a place, int64.

    The two differ by the sign, and the magnitude of negative numbers is complemented. upper: the place of the upper half
    of a wide number, if this is about its lower half; else -1.
    """
    whole = tl.where(place < BINS // 2, BINS - 1 - place, place - BINS // 2)
    return tl.where(upper < 0, whole, tl.where(upper < BINS // 2, BINS - 1 - place, place)).to(tl.int64)


@jit
def _place_of(x, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The place of a number rounded to DTYPE, or of its upper half if that is wide."""
    if DTYPE == tl.float32:
        bits = (x.to(tl.int32, bitcast=True) >> 16) & 0xFFFF
    else:
        bits = x.to(DTYPE).to(tl.uint16, bitcast=True).to(tl.int32)
    return tl.where(bits < BINS // 2, bits + BINS // 2, BINS - 1 - bits)


@jit
def _range(low, high, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The places from that of `low`, or one below however it is rounded, to that of `high`."""
    lowest = _place_of(tl.minimum(high, -float("inf")), DTYPE)
    return tl.maximum(_place_of(low, DTYPE) - 1, lowest), _place_of(high, DTYPE)


@jit
def _number(place, upper, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The number at a place, in fp32."""
    if DTYPE == tl.float32:
        return ((_bits(upper, -1) << 16) | _bits(place, upper)).to(tl.int32).to(tl.float32, bitcast=True)
    else:
        return _bits(place, -1).to(tl.uint16).to(DTYPE, bitcast=True).to(tl.float32)


@jit
def _kept(z, q_peak, divisor, threshold, log_min_p):  # type: ignore[no-untyped-def]
    """exp((z - q_peak) / divisor) of the kept logits, 0 for the others."""
    shifted = z.to(tl.float32) - q_peak
    masses = tl.where(z.to(tl.float32) >= threshold, tl.exp2(shifted * (LOG2_E / divisor)), 0.0)
    if log_min_p > -float("inf"):
        masses = tl.where(shifted / divisor >= log_min_p, masses, 0.0)
    return masses


@jit
def _shifted(z):  # type: ignore[no-untyped-def]
    """Of each row of z [BLOCKS, BLOCK] the largest logit in fp32, and the logits minus it."""
    peaks = tl.max(z.to(tl.float32), 1)
    return peaks, z.to(tl.float32) - tl.where(peaks == -float("inf"), 0.0, peaks)[:, None]


@jit
def _row_statistics(peaks_ptr, of_kind, divisor, place, inside):  # type: ignore[no-untyped-def]
    """The row's largest logit (0 if all are -inf), its sum of exp((z - largest) / divisor), and its blocks' largest."""
    peaks = tl.load(peaks_ptr + place, mask=inside, other=-float("inf"))
    peak = tl.max(peaks, 0)
    peak = tl.where(peak == -float("inf"), 0.0, peak)
    sums = tl.load(peaks_ptr + of_kind + place, mask=inside, other=0.0)
    return peak, tl.sum(sums * tl.exp((peaks - peak) / divisor), 0), peaks


@jit
def _kth_largest(x, k):  # type: ignore[no-untyped-def]
    """The k-th largest of the numbers x, fp32, cut off to 16 bits: as large or smaller."""
    low = 127  # the place of -inf
    high = 65409  # and one above that of inf
    while high - low > 1:
        middle = (low + high) // 2
        enough = tl.sum((x >= _number(0, middle, tl.float32)).to(tl.int32), 0) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return _number(0, low, tl.float32)


@jit
def _is_last(counter_ptr, count):  # type: ignore[no-untyped-def]
    """Whether this program is the last of `count` to come here; it sees what all the others wrote before."""
    tl.debug_barrier()
    return tl.atomic_add(counter_ptr, 1) == count - 1


@jit
def _clear(bins_ptr, first, last, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    while first <= last:
        place = first + tl.arange(0, CHUNK)
        tl.store(bins_ptr + _bits(place, -1), tl.zeros((CHUNK,), tl.int64), mask=place <= last)
        first += CHUNK


@jit
def _sum(bins_ptr, first, last, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    total = tl.zeros((CHUNK,), tl.int64)
    while first <= last:
        place = first + tl.arange(0, CHUNK)
        total += tl.load(bins_ptr + _bits(place, -1), mask=place <= last, other=0)
        first += CHUNK
    return tl.sum(total, 0)


@jit
def _crossing(bins_ptr, upper, first, last, needed, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The largest place t such that t to `last` hold at least `needed`, or else `first`; and what those above t hold."""
    found = first
    above = needed * 0
    while last >= first:
        place = last - tl.arange(0, CHUNK)
        amounts = tl.load(bins_ptr + _bits(place, upper), mask=place >= first, other=0)
        enough = (above + tl.cumsum(amounts, 0) >= needed) & (place >= first)
        best = tl.max(tl.where(enough, place, -1), 0)
        above += tl.sum(tl.where(place > best, amounts, 0), 0)
        found = tl.where(best >= 0, best, first)
        last = tl.where(best >= 0, first - 1, last - CHUNK)
    return found, above
