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

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minem.kernels.backend import jit, pick, tl

TILE = 64  # of the eager reference
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
    tokens = torch.empty(count, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(count, dtype=torch.float32, device=logits.device)
    results = (tokens, logprobs, torch.empty_like(logprobs))
    if stop_ids is None or min_tokens is None:
        stops, stop_count = (tokens, tokens), 0  # not read
    else:
        stops, stop_count = (stop_ids.contiguous(), min_tokens.contiguous()), len(stop_ids)
    block = min(8192, max(512, 1 << (vocabulary - 1).bit_length()))
    warps = max(4, block // 512)
    options = {
        # bits of a logit's fp32 pattern that are 0 in every number of its own dtype need no searching
        "KEY_SHIFT": {torch.bfloat16: 16, torch.float16: 13}.get(logits.dtype, 0),
        "BLOCK": block,
        "SEARCH_BLOCK": 128 * warps,  # 8 pivots for 4 logits a thread: more spill registers
        "num_warps": warps,
    }
    arguments = (*(x.contiguous() for x in rows), *stops, *results, vocabulary, stop_count)
    _sample_kernel[(count,)](logits, logits.stride(0), *arguments, **options)
    return results


@jit
def _load_logits(row_ptr, columns, vocabulary, stop_ids_ptr, stops):  # type: ignore[no-untyped-def]
    """Logits of the row in fp32; -inf past its end and at the first `stops` of the stop ids."""
    z = tl.load(row_ptr + columns, mask=columns < vocabulary, other=-float("inf")).to(tl.float32)
    for i in range(0, stops):
        z = tl.where(columns == tl.load(stop_ids_ptr + i), -float("inf"), z)
    return z


@jit
def _order_keys(z, KEY_SHIFT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Integers in the order of the fp32 numbers z: the bit pattern, its magnitude complemented where negative."""
    z = tl.where(z == 0.0, 0.0, z)  # -0.0 equals 0.0
    bits = z.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> KEY_SHIFT


@jit
def _statistics(row_ptr, vocabulary, stop_ids_ptr, stops, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The row's largest logit, sum of exp(z - largest) and the first place of the largest; online, in one reading."""
    columns = tl.arange(0, BLOCK)
    peak = -float("inf")
    total = 0.0
    best = 0
    for start in range(0, vocabulary, BLOCK):
        z = _load_logits(row_ptr, start + columns, vocabulary, stop_ids_ptr, stops)
        block_peak = tl.max(z, 0)
        first = tl.min(tl.where(z == block_peak, start + columns, vocabulary), 0)
        best = tl.where(block_peak > peak, first, best)
        new_peak = tl.maximum(peak, block_peak)
        finite = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        total = total * tl.exp(peak - finite) + tl.sum(tl.exp(z - finite), 0)
        peak = new_peak
    return peak, total, best


@jit
def _kept_masses(z, q_peak, divisor, threshold, log_min_p, KEY_SHIFT: tl.constexpr):  # type: ignore[no-untyped-def]
    """exp((z - q_peak) / divisor) of the kept logits, 0 for the others."""
    x = (z - q_peak) / divisor
    kept = (_order_keys(z, KEY_SHIFT) >= threshold) & (x >= log_min_p)
    return tl.where(kept, tl.exp(x), 0.0)


@jit
def _search(  # type: ignore[no-untyped-def]
    row_ptr, vocabulary, stop_ids_ptr, stops, q_peak, divisor, low, high, floor, needed,
    COUNT: tl.constexpr, KEY_SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest key t in [low, high) such that the logits with key >= t (and >= floor) number, or weigh, at least
    `needed`. Known: those from low do, those from high do not. Each round tries eight pivots in one reading."""
    columns = tl.arange(0, BLOCK)
    pivot = tl.arange(0, 8)
    while high - low > 1:
        pivots = low + ((high - low) * (pivot + 1)) // 9
        sums = tl.zeros((8, BLOCK), dtype=tl.float32)
        for start in range(0, vocabulary, BLOCK):
            z = _load_logits(row_ptr, start + columns, vocabulary, stop_ids_ptr, stops)
            keys = _order_keys(z, KEY_SHIFT)
            if COUNT:
                masses = tl.where(start + columns < vocabulary, 1.0, 0.0)
            else:
                masses = tl.where(keys >= floor, tl.exp((z - q_peak) / divisor), 0.0)
            sums += tl.where(keys[None, :] >= pivots[:, None], masses[None, :], 0.0)
        enough = tl.sum(sums, 1) >= needed
        new_low = tl.max(tl.where(enough, pivots, low), 0)
        high = tl.min(tl.where(enough, high, pivots), 0)
        low = new_low
    return low


@jit
def _sample_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, row_stride, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, seeds_ptr, positions_ptr, stop_ids_ptr,
    min_tokens_ptr, tokens_ptr, logprobs_ptr, proposal_ptr, vocabulary, stop_count,
    KEY_SHIFT: tl.constexpr, BLOCK: tl.constexpr, SEARCH_BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    temperature = tl.load(temperature_ptr + row).to(tl.float32)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row).to(tl.float32)
    min_p = tl.load(min_p_ptr + row).to(tl.float32)
    position = tl.load(positions_ptr + row)
    columns = tl.arange(0, BLOCK)

    # 1. The raw distribution: where its log-probabilities start from.
    peak, total, best = _statistics(row_ptr, vocabulary, stop_ids_ptr, 0, BLOCK)
    q_peak = peak
    q_sum = total
    stops = 0
    if position < tl.load(min_tokens_ptr + row, mask=stop_count > 0, other=0):
        stops = stop_count
        q_peak, q_sum, best = _statistics(row_ptr, vocabulary, stop_ids_ptr, stops, BLOCK)
    nothing = q_sum == 0.0  # nothing but -inf; not so for NaN, which tl.max passes over
    peak = tl.where(peak == -float("inf"), 0.0, peak)
    q_peak = tl.where(q_peak == -float("inf"), 0.0, q_peak)

    # 2. The threshold: no logit below it is kept.
    greedy = temperature == 0.0
    divisor = tl.where(greedy, 1.0, temperature)
    # The smallest fp32 number not below log(min_p), so that comparing fp32 logits with it is exact at the boundary:
    # rounded to fp32, then one step up (towards 0: it is negative) if that fell below.
    exact = tl.minimum(tl.log(tl.maximum(min_p, 1e-37).to(tl.float64)), 0.0)
    rounded = exact.to(tl.float32)
    next_up = (rounded.to(tl.int32, bitcast=True) - 1).to(tl.float32, bitcast=True)
    log_min_p = tl.where(min_p > 0.0, tl.where(rounded.to(tl.float64) < exact, next_up, rounded), -float("inf"))
    # int64, for the distance between two keys may pass 2^31
    lowest = _order_keys(tl.full((1,), -float("inf"), tl.float32), KEY_SHIFT).to(tl.int64)
    threshold = tl.max(lowest, 0)
    above = tl.max(_order_keys(tl.full((1,), 0.0, tl.float32) + q_peak, KEY_SHIFT).to(tl.int64), 0) + 1
    if (top_k > 0) & (top_k < vocabulary) & (temperature != 0.0):
        threshold = _search(
            row_ptr, vocabulary, stop_ids_ptr, stops, q_peak, divisor, threshold,
            above, threshold, top_k.to(tl.float32), True, KEY_SHIFT, SEARCH_BLOCK,
        )  # fmt: skip
    if (top_p < 1.0) & (temperature != 0.0):
        mass = 0.0
        for start in range(0, vocabulary, BLOCK):
            z = _load_logits(row_ptr, start + columns, vocabulary, stop_ids_ptr, stops)
            mass += tl.sum(_kept_masses(z, q_peak, divisor, threshold, -float("inf"), KEY_SHIFT), 0)
        # What is 30 nats below the peak cannot matter: 600,000 such tokens have less than 2^-24 of the mass.
        bottom = _order_keys(tl.full((1,), -30.0, tl.float32) * divisor + q_peak, KEY_SHIFT).to(tl.int64)
        threshold = _search(
            row_ptr, vocabulary, stop_ids_ptr, stops, q_peak, divisor, tl.maximum(threshold, tl.max(bottom, 0)),
            above, threshold, top_p * mass, False, KEY_SHIFT, SEARCH_BLOCK,
        )  # fmt: skip

    # 3. The mass of what is kept; that of a plain row is known already.
    plain = (temperature == 1.0) & (top_k <= 0) & (top_p >= 1.0) & (min_p <= 0.0) & (stops == 0)
    q_total = tl.where(plain, total, 0.0).to(tl.float64)
    end = tl.where(plain | greedy | nothing, 0, vocabulary)
    for start in range(0, end, BLOCK):
        z = _load_logits(row_ptr, start + columns, vocabulary, stop_ids_ptr, stops)
        q_total += tl.sum(_kept_masses(z, q_peak, divisor, threshold, log_min_p, KEY_SHIFT), 0)

    # 4. Inverse CDF: walk the blocks until the running mass passes u, then find the token inside the block.
    word, _, _, _ = tl.philox(
        tl.load(seeds_ptr + row), position.to(tl.uint32), (position >> 32).to(tl.uint32), 0 * row.to(tl.uint32), 0
    )
    target = (word.to(tl.float64) + 0.5) * 2.3283064365386963e-10 * q_total  # 2^-32
    token = best  # greedy; or, once in 10^7, the sums of steps 1 and 4 round so that the walk runs off the end
    running = q_total * 0.0
    start = tl.where(greedy | nothing, vocabulary, 0)
    while start < vocabulary:
        z = _load_logits(row_ptr, start + columns, vocabulary, stop_ids_ptr, stops)
        e = _kept_masses(z, q_peak, divisor, threshold, log_min_p, KEY_SHIFT)
        passed = running + tl.sum(e, 0)
        if passed > target:
            left = (target - running).to(tl.float32)
            hit = tl.min(tl.where((tl.cumsum(e, 0) > left) & (e > 0.0), start + columns, vocabulary), 0)
            last = tl.max(tl.where(e > 0.0, start + columns, 0), 0)  # where rounding left no hit
            token = tl.minimum(hit, last)
            start = vocabulary
        else:
            running = passed
            start += BLOCK

    # 5. How likely it was.
    z = tl.load(row_ptr + token).to(tl.float32)
    q_total = tl.where(greedy | nothing, 1.0, q_total)
    total = tl.where(nothing, 1.0, total)
    proposal = tl.where(greedy, 0.0, (z - q_peak) / divisor - tl.log(q_total.to(tl.float32)))
    tl.store(tokens_ptr + row, token)
    tl.store(logprobs_ptr + row, tl.where(nothing, -float("inf"), z - peak - tl.log(total)))
    tl.store(proposal_ptr + row, tl.where(nothing, -float("inf"), proposal))
