"""Intervals and tests for accuracies, in plain Python: what the tables and plots of a run rest on.

    python -c "from minem.statistics import wilson; print(wilson(150, 300))"

    wilson      one model on n questions                  mcnemar   two models on the same questions
    paired_t    two samplers over several seeds           holm      many such comparisons at once
    pass_at_k   n draws for one question                  importance   p(y | x) from hinted draws

No scipy at run time: each is a few lines, and the tests hold them against scipy's or against exact enumeration.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z_95 = 1.959963984540054  # the 97.5 % quantile of the standard normal: a two-sided 95 % interval


def wilson(successes: int, n: int, z: float = Z_95) -> tuple[float, float]:
    """Score interval of a proportion (Wilson 1927), as fractions; sound at 0 and n, where the usual one collapses.

    With n = 0 nothing is known: (0, 1). Raises ValueError unless 0 <= successes <= n.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}: must lie between 0 and n")
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    scale = 1 + z * z / n
    centre = (share + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At the ends the exact bound is 0 or 1; rounding must not leave it a hair inside or outside.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return low, high


def mcnemar(b: int, c: int) -> float:
    """Exact two-sided p-value of McNemar's test for two models on the same questions.

    b and c count the questions that only the first, and only the second, got right; where they agree says nothing.
    Under the null hypothesis b ~ Binomial(b + c, 1/2), which is symmetric: twice the smaller tail, at most 1.
    Integers throughout, so nothing is lost for any number of questions; only the last division rounds.
    """
    if b < 0 or c < 0:
        raise ValueError(f"b = {b}, c = {c}: counts cannot be negative")
    n = b + c
    tail = term = 1
    for k in range(min(b, c)):
        term = term * (n - k) // (k + 1)
        tail += term
    return min(1.0, 2 * tail / 2**n)


@dataclass(frozen=True)
class PairedDifference:
    """Mean of the differences of n pairs with its t-interval; what n or the spread leaves open is None."""

    n: int
    mean: float
    low: float | None
    high: float | None
    p_value: float | None  # two-sided, of the null hypothesis that the mean is 0


def paired_t(differences: Sequence[float], level: float = 0.95) -> PairedDifference:
    """Student's t-interval and t-test for the mean of paired differences, as fractions.

    One pair has no interval. Where all differences are equal there is no spread to judge them by: no interval and no
    p-value either, rather than an interval of no width. Raises ValueError without any difference.
    """
    n = len(differences)
    if n == 0:
        raise ValueError("no differences: at least one pair is needed")
    mean, spread = math.fsum(differences) / n, standard_deviation(differences)
    if not spread:
        return PairedDifference(n, mean, None, None, None)
    error = spread / math.sqrt(n)
    half = t_quantile(level, n - 1) * error
    return PairedDifference(n, mean, mean - half, mean + half, 1 - t_within(abs(mean) / error, n - 1))


def standard_deviation(values: Sequence[float]) -> float | None:
    """Of a sample (n - 1); None for fewer than two values."""
    if len(values) < 2:
        return None
    if max(values) == min(values):  # whose mean need not be exactly their value
        return 0.0
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def t_within(t: float, df: int) -> float:
    """P(|T| <= t) for Student's t with a whole number of degrees of freedom, where it is a finite sum.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    if df < 1 or t < 0:
        raise ValueError(f"t = {t}, df = {df}: t must be 0 or more and df 1 or more")
    angle = math.atan2(t, math.sqrt(df))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = df % 2
    total = term = cosine if odd else 1.0
    if df == 1:
        return 2 * angle / math.pi
    for k in range(3 if odd else 2, df - 1, 2):
        term *= (k - 1) / k * cosine * cosine
        total += term
    return min(1.0, 2 / math.pi * (angle + sine * total) if odd else sine * total)


def t_quantile(level: float, df: int) -> float:
    """The t with P(|T| <= t) = level, by bisection: what a two-sided interval of that level reaches out to."""
    if not 0 <= level < 1:
        raise ValueError(f"level = {level}: must be at least 0 and less than 1")
    low, high = 0.0, 1.0
    while t_within(high, df) < level:
        high *= 2
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if t_within(middle, df) < level else (low, middle)
    return high


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values (1979), in the order given: at most `alpha` of one keeps the family-wise error there.

    The smallest is multiplied by the number of tests, the next by one less, and so on; none falls below the one before.
    """
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The chance that at least one of k draws is right, estimated without bias from n draws of which `correct` are.

    1 - C(n - correct, k) / C(n, k): the share of all choices of k among the n that hold a right one.
    Source: Chen et al. 2021, "Evaluating Large Language Models Trained on Code", equation 1.
    """
    if not (0 <= correct <= n and 1 <= k <= n):
        raise ValueError(f"{correct} right of {n} draws, k = {k}: 0 <= correct <= n and 1 <= k <= n must hold")
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


@dataclass(frozen=True)
class ImportanceEstimate:
    """What K hinted draws say about p(y | x), the chance that the model reaches the answer unaided."""

    p_hat: float  # the mean weight: unbiased where the proposal can draw every right rationale
    ess: float  # effective sample size, between 1 and K; 0 where all were rejected
    any_accepted: bool
    log_p_hat: float | None  # where q always accepts, on average a lower bound of log p(y | x); None: all rejected


def importance(log_q: Sequence[float], log_p: Sequence[float], accepted: Sequence[bool]) -> ImportanceEstimate:
    """Importance sampling of p(y | x) from K draws of the hinted proposal q, K fixed in advance.

    Args:
        log_q: log q(z, y | x, y*) of each draw, from the prompt and policy that it was drawn with.
        log_p: log pi(z, y | x) of the same token ids, from the plain prompt.
        accepted: r, whether the draw reached y*.
    Returns:
        p_hat = mean of w_k = r_k exp(log_p_k - log_q_k), with (sum w)^2 / sum w^2 as the effective sample size. The
        draws of a lazy search must not be used: stopping at the first accepted one makes the mean too large.
    Raises:
        ValueError: no draws, or lists of different lengths.
    """
    if not len(log_q) == len(log_p) == len(accepted) > 0:
        raise ValueError(f"{len(log_q)}, {len(log_p)} and {len(accepted)} values: as many of each, at least one")
    logs = [p - q for p, q, right in zip(log_p, log_q, accepted, strict=True) if right]
    if not logs:
        return ImportanceEstimate(0.0, 0.0, False, None)
    largest = max(logs)  # taken out, so that no weight overflows and the sum does not vanish
    scaled = [math.exp(log - largest) for log in logs]
    total = math.fsum(scaled)
    log_p_hat = largest + math.log(total / len(log_q))
    return ImportanceEstimate(math.exp(log_p_hat), total * total / math.fsum(w * w for w in scaled), True, log_p_hat)
