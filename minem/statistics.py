"""Intervals and tests for accuracies: the statistics of minem's tables and charts.

    python -c "from minem.statistics import wilson; print(wilson(150, 300))"

Plain Python, tested against scipy or exact enumeration. minem never imports the standard library's `statistics`.
"""

import math
from collections.abc import Sequence
from typing import Any


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95 % score interval of a proportion (Wilson 1927), as fractions; (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    share, z = successes / n, 1.959963984540054  # the 97.5 % quantile of the standard normal
    scale = 1 + z * z / n
    centre = (share + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At the ends the exact bound is 0 or 1, without rounding.
    return centre - half if successes else 0.0, centre + half if successes < n else 1.0


def mcnemar(b: int, c: int) -> float:
    """Exact two-sided p-value of McNemar's test: b questions that only one model got right, c that only the other did.

    Under the null hypothesis b ~ Binomial(b + c, 1/2), which is symmetric: twice the smaller tail, at most 1.
    """
    n = b + c
    tail = sum(math.comb(n, k) for k in range(min(b, c) + 1))  # integers until the last division
    return min(1.0, 2 * tail / 2**n)


def paired_t(differences: Sequence[float]) -> dict[str, Any]:
    """Student's 95 % interval and two-sided t-test for the mean of differences; None without a spread of these."""
    n, centre, spread = len(differences), mean(differences), standard_deviation(differences)
    found: dict[str, Any] = {"n": n, "mean": centre, "low": None, "high": None, "p_value": None}
    if spread:
        error = spread / math.sqrt(n)
        half = t_quantile(0.95, n - 1) * error
        found |= {"low": centre - half, "high": centre + half, "p_value": 1 - t_within(abs(centre) / error, n - 1)}
    return found


def mean(values: Sequence[float]) -> float:
    """The mean of at least one value."""
    return math.fsum(values) / len(values)


def standard_deviation(values: Sequence[float]) -> float | None:
    """Of a sample (n - 1); None for fewer than two values."""
    if len(values) < 2:
        return None
    if max(values) == min(values):  # their mean may differ from them by rounding
        return 0.0
    centre = mean(values)
    return math.sqrt(math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1))


def t_within(t: float, df: int) -> float:
    """P(|T| <= t) for t >= 0 and Student's t with df = 1, 2, ... degrees of freedom, for which it is a finite sum.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
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
    """The t with P(|T| <= t) = level, for 0 <= level < 1, by bisection."""
    low, high = 0.0, 1.0
    while t_within(high, df) < level:
        high *= 2
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if t_within(middle, df) < level else (low, middle)
    return high


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values (1979), in the order given: rejecting those <= alpha keeps its family-wise error."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The chance that one of k <= n draws is right, estimated without bias from n draws of which `correct` are.

    Source: Chen et al. 2021, "Evaluating Large Language Models Trained on Code", equation 1.
    """
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def importance(log_q: Sequence[float], log_p: Sequence[float], accepted: Sequence[bool]) -> tuple[float, float]:
    """Importance sampling of p(y | x), the chance that the model reaches the answer unaided, from K hinted draws.

    log_q: log q(z, y | x, y*) of each draw. log_p: log pi(z, y | x) of the same token ids. accepted: r, per draw.
    Returns p_hat, the mean of w = r exp(log_p - log_q), and the effective sample size (sum w)^2 / sum w^2, or 0, 0.
    """
    logs = [p - q for p, q, right in zip(log_p, log_q, accepted, strict=True) if right]
    if not logs:
        return 0.0, 0.0
    largest = max(logs)  # taken out, so that no weight overflows and the sum does not vanish
    scaled = [math.exp(log - largest) for log in logs]
    total = math.fsum(scaled)
    return math.exp(largest + math.log(total / len(log_q))), total * total / math.fsum(w * w for w in scaled)
