"""Draw one token per row of logits, and say how likely it was.

One draw costs one uniform number: the token is where the cumulative probability first passes u (inverse CDF). Noise
per logit (the Gumbel trick) would cost more instructions than reading the logits. The row is cut into tiles: sum each
tile, find the tile in which u falls, then the token inside it, so only one tile is summed element by element.

u comes from Philox4x32-10, a counter-based generator: key = the row's seed, counter = its position. So a draw depends
on (seed, position) and its own logits, never on the batch it happens to be in. Every reduction below runs along one
row in a fixed order for the same reason.

The kept set, defined so that no order among equal logits matters. With x = logits / temperature (stop tokens that are
not yet allowed at -inf), all filters together, as transformers applies them:
    top-k   keeps x_i if fewer than k logits are larger: ties with the k-th are all kept
    top-p   keeps x_i if the more probable tokens of the top-k set have less than p of its mass: the token that
            crosses p is kept, ties with it too
    min-p   keeps x_i if its probability is at least min_p times the largest one

    python -m pytest tests/kernels/test_sampling.py
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from minem.kernels.backend import pick

TILE = 128


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw a token for each row of logits [B, V].

    Per row, all [B]: temperature float (0: greedy, the lowest index among equals), top_k int64 (0: off), top_p float
    (1: off), min_p float (0: off), seeds int64, positions int64 (tokens drawn so far). stop_ids [K] int64 cannot be
    drawn while positions < min_tokens [B] int64; pass both or neither.

    Returns (tokens [B] int64, logprobs [B], proposal_logprobs [B]), the latter two in float32 (float64 for float64
    logits), in nats: the raw logits' log-softmax at the token (temperature 1, nothing masked), and the log-probability
    with which it was drawn, after temperature, truncation and stop mask (0 for greedy). A row in which nothing can be
    drawn, all its logits being -inf or masked, gives token 0 with a log-probability of -inf; one with NaN or +inf gives
    log-probabilities of NaN. A row's result does not depend on the other rows.

    Raises ValueError for shapes that do not fit.
    """
    _check(logits, temperature, top_k, top_p, min_p, seeds, positions, stop_ids, min_tokens)
    pick(backend, logits)
    return _sample_eager(logits, temperature, top_k, top_p, min_p, seeds, positions, stop_ids, min_tokens)


def _check(logits: Tensor, *rows_and_stops: Tensor | None) -> None:
    if logits.ndim != 2 or logits.shape[1] == 0 or not logits.is_floating_point():
        raise ValueError(f"logits must be floating [B, V] with V > 0; got {logits.dtype} {list(logits.shape)}")
    *rows, stop_ids, min_tokens = rows_and_stops
    if (stop_ids is None) != (min_tokens is None):
        raise ValueError("stop_ids and min_tokens belong together: pass both or neither")
    names = ("temperature", "top_k", "top_p", "min_p", "seeds", "positions", "min_tokens")
    for name, row in zip(names, (*rows, min_tokens), strict=True):
        if row is not None and row.shape != logits.shape[:1]:
            raise ValueError(f"{name} must be [{logits.shape[0]}], one per row of logits; got {list(row.shape)}")


def uniforms(seeds: Tensor, positions: Tensor) -> Tensor:
    """One uniform number in (0, 1) per row, float64 [B] on the CPU: Philox4x32-10 with key `seeds` [B] int64 and
    counter `positions` [B] int64 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011); the first
    of its four words x gives (x + 1/2) / 2^32.

    In numpy, whose calls cost a fifth of PyTorch's on the few numbers that these are.
    """
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    multipliers = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=np.uint64)
    weyl = np.array([[0x9E3779B9], [0xBB67AE85]], dtype=np.uint64)
    key = seeds.cpu().numpy().astype(np.int64).view(np.uint64)
    counter = positions.cpu().numpy().astype(np.int64).view(np.uint64)
    keys = np.stack([key & low, key >> shift])
    # the counter's four words: `even` holds words 0 and 2, `odd` words 1 and 3
    even = np.stack([counter & low, np.zeros_like(counter)])
    odd = np.stack([counter >> shift, np.zeros_like(counter)])
    for _ in range(10):
        product = even * multipliers
        even = (product >> shift)[::-1] ^ odd ^ keys
        odd = (product & low)[::-1]
        keys = (keys + weyl) & low
    return torch.from_numpy((even[0].astype(np.float64) + 0.5) * 2.0**-32)


def _sample_eager(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    stop_ids: Tensor | None,
    min_tokens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    peak = _peak(logits)
    exps, running = _masses(logits, peak)
    log_total = running[:, -1].log()

    # The proposal: the same distribution unless some row asks for another, so that plain rows pay for nothing else.
    allowed, q_peak, q_log_total = logits, peak, log_total
    if stop_ids is not None and min_tokens is not None:
        early = positions < min_tokens
        if early.any():
            allowed = logits.clone()
            allowed[:, stop_ids] = allowed[:, stop_ids].masked_fill(early.unsqueeze(1), -torch.inf)
            q_peak = _peak(allowed)
    greedy = temperature == 0
    divisor = temperature.to(logits.dtype).masked_fill(greedy, 1.0)
    truncated = (top_k > 0) | (top_p < 1) | (min_p > 0)
    threshold = _threshold(allowed, q_peak, divisor, top_k, top_p, min_p) if truncated.any() else None
    if allowed is not logits or threshold is not None or (divisor != 1).any():
        exps, running = _masses(allowed, q_peak, divisor, threshold)
        q_log_total = running[:, -1].log()

    tokens = _inverse_cdf(exps, running, uniforms(seeds, positions).to(logits.device))
    if greedy.any():
        tokens = torch.where(greedy, allowed.argmax(dim=-1), tokens)

    logprobs = _at(logits, tokens) - peak - log_total
    proposal = (_at(allowed, tokens) - q_peak) / divisor - q_log_total
    nothing = q_log_total == -torch.inf  # tokens are 0 there already
    logprobs = logprobs.masked_fill(nothing, -torch.inf).to(logits.dtype)
    proposal = proposal.masked_fill(greedy, 0.0).masked_fill(nothing, -torch.inf).to(logits.dtype)
    return tokens, logprobs, proposal


def _peak(logits: Tensor) -> Tensor:
    """The largest logit of each row [B]; 0 for rows of -inf alone, so that subtracting it leaves them -inf."""
    peak = logits.amax(dim=-1)
    return peak.masked_fill(peak == -torch.inf, 0.0)


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
    target = (u * running[:, -1]).unsqueeze(1)
    tile = (running <= target).sum(dim=-1, keepdim=True).clamp_(max=running.shape[1] - 1)
    before = running.gather(1, (tile - 1).clamp_(min=0)).masked_fill_(tile == 0, 0.0)
    inside = exps[torch.arange(len(exps), device=exps.device), tile.squeeze(1)].cumsum(dim=-1, dtype=torch.float64)
    # The tile's sum was rounded, so what is left may reach past its end: then its last token with mass is meant.
    left = torch.minimum(target - before, inside[:, -1:] * (1 - 2.0**-50))
    offset = (inside <= left).sum(dim=-1, keepdim=True)
    # only a row without any mass runs off the end of its tile
    token = (tile * TILE + offset).masked_fill_(offset == TILE, 0)
    return token.squeeze(1)


def _threshold(logits: Tensor, peak: Tensor, divisor: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """The smallest kept logit of each row [B] under top-k, then top-p, then min-p; -inf where all are off.

    A threshold, not a set of indices: equal logits share their fate.
    """
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
