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

The eager reference sorts. On a GPU there are three kernels, each with a program for every 8,192 logits of a row:
    statistics   the largest logit and the mass of each block of 512, raw and as drawn from
    histogram    top-k and top-p alone: how often each bit pattern of the logits' dtype occurs among those that may be
                 the threshold. 16 bits have 65,536 patterns, so counts give the masses too, and whole numbers sum to
                 the same in any order. The bits of fp32 are taken in two halves, with masses in place of counts.
    draw         the kept mass of each block, where not all is kept, then the block that u falls into, then its token
The program of a row that finishes last does what needs the whole row.

Bytes moved: a plain draw reads the row once (2 V in bf16: 18 us at B=256, V=151,936 and 4.3 TB/s), truncation reads it
up to two times more, without the blocks that have nothing to count or to keep.

    python -m pytest tests/kernels/test_sampling.py
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minem.kernels.backend import pick
from minem.kernels.sampling_triton import sample_triton

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
    return (sample_triton if pick(backend, logits) == "triton" else _sample_eager)(*arguments)


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
