"""Intervals and tests for accuracies, in plain Python: what the tables and plots of a run rest on.

    python -c "from minem.statistics import wilson; print(wilson(150, 300))"

No scipy at run time: both are a few lines, and the tests hold them against scipy's.
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
class ImportanceEstimate:
    """What K draws from a proposal say of one question.

    p_hat: the mean importance weight. ess: the effective sample size, (sum w)^2 / sum w^2; 0 where all weights are 0.
    """

    p_hat: float
    ess: float
    any_accepted: bool


def importance(log_q: Sequence[float], log_p: Sequence[float], accepted: Sequence[bool]) -> ImportanceEstimate:
    """Estimate p(y*|x) from draws of q with weights w = accepted * p / q; the number of draws was fixed in advance."""
    logs = [p - q for q, p, kept in zip(log_q, log_p, accepted, strict=True) if kept]
    if not logs:
        return ImportanceEstimate(0.0, 0.0, False)
    top = max(logs)
    scaled = [math.exp(value - top) for value in logs]
    ess = math.fsum(scaled) ** 2 / math.fsum(value * value for value in scaled)
    return ImportanceEstimate(math.exp(top) * math.fsum(scaled) / len(log_q), ess, True)
