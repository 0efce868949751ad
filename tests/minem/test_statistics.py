"""Wilson intervals and McNemar's test against scipy, and at the ends where formulas tend to fail."""

import pytest
from scipy.stats import binomtest

from minem.statistics import mcnemar, wilson


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (1, 1), (0, 300), (300, 300), (7, 20), (150, 300), (701, 1172)])
def test_wilson_equals_scipy(successes, n):
    expected = binomtest(successes, n).proportion_ci(0.95, method="wilson")
    assert wilson(successes, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_takes_other_levels():
    expected = binomtest(12, 40).proportion_ci(0.99, method="wilson")
    assert wilson(12, 40, z=2.5758293035489004) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_of_nothing_and_of_nonsense():
    assert wilson(0, 0) == (0.0, 1.0)
    for successes, n in ((-1, 3), (4, 3)):
        with pytest.raises(ValueError, match="between 0 and n"):
            wilson(successes, n)


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (5, 5), (2, 9), (9, 2), (0, 40), (61, 33), (900, 1040)])
def test_mcnemar_equals_the_exact_binomial_test(b, c):
    expected = binomtest(b, b + c, 0.5).pvalue if b + c else 1.0
    assert mcnemar(b, c) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_far_out_and_of_nonsense():
    assert mcnemar(14042, 0) == 0.0  # 2 ** -14041 is below the smallest float
    assert mcnemar(7000, 7042) == pytest.approx(0.729, abs=0.001)  # the normal approximation: 2 * (1 - Phi(0.346))
    with pytest.raises(ValueError, match="negative"):
        mcnemar(-1, 3)
