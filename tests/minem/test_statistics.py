"""Intervals and tests against scipy, corrections and estimators against their definitions, by exact enumeration."""

import math
import re
from itertools import combinations, permutations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.stats import binomtest

from minem.statistics import (
    holm,
    importance,
    mcnemar,
    paired_t,
    pass_at_k,
    standard_deviation,
    t_quantile,
    t_within,
    wilson,
)
from tests.minem.test_identities import World, accepted


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (1, 1), (0, 300), (300, 300), (7, 20), (150, 300), (701, 1172)])
def test_wilson_equals_scipy(successes, n):
    expected = binomtest(successes, n).proportion_ci(0.95, method="wilson")
    assert wilson(successes, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_of_no_questions():
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (5, 5), (2, 9), (9, 2), (0, 40), (61, 33), (900, 1040)])
def test_mcnemar_equals_the_exact_binomial_test(b, c):
    expected = binomtest(b, b + c, 0.5).pvalue if b + c else 1.0
    assert mcnemar(b, c) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_far_out():
    assert mcnemar(14042, 0) == 0.0  # 2 ** -14041 is below the smallest float
    assert mcnemar(7000, 7042) == pytest.approx(0.729, abs=0.001)  # the normal approximation: 2 * (1 - Phi(0.346))


@pytest.mark.parametrize("df", [1, 2, 3, 4, 5, 6, 7, 9, 10, 29, 30, 101])
def test_students_t_equals_scipy(df):
    for t in (0.0, 0.01, 0.3, 1.0, 2.776, 12.7, 300.0):
        assert t_within(t, df) == pytest.approx(1 - 2 * stats.t.sf(t, df), abs=1e-13)
    for level in (0.0, 0.5, 0.9, 0.95, 0.999):
        assert t_quantile(level, df) == pytest.approx(stats.t.ppf((1 + level) / 2, df), rel=1e-10, abs=1e-300)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=2, max_size=12).filter(lambda v: max(v) - min(v) > 1e-3))
def test_paired_differences_equal_scipy(differences):
    expected = stats.ttest_1samp(differences, 0.0)
    interval = expected.confidence_interval(0.95)
    found = paired_t(differences)
    assert found["n"] == len(differences)
    assert found["mean"] == pytest.approx(sum(differences) / len(differences), abs=1e-12)
    assert (found["low"], found["high"]) == pytest.approx((interval.low, interval.high), abs=1e-9)
    assert found["p_value"] == pytest.approx(expected.pvalue, abs=1e-9)
    assert standard_deviation(differences) == pytest.approx(stats.tstd(differences), rel=1e-9)


def test_without_a_spread_there_is_no_interval():
    for differences in ([0.1], [0.1, 0.1], [0.1] * 3, [0.0] * 5):
        found = paired_t(differences)
        assert found["mean"] == pytest.approx(differences[0])
        assert (found["low"], found["high"], found["p_value"]) == (None, None, None)
    assert standard_deviation([0.1]) is None


def test_the_interval_covers_as_often_as_it_claims():
    """4,000 comparisons of samplers that do not differ, five seeds each."""
    noise = iter(stats.norm.rvs(size=20_000, random_state=0))
    inside = rejected = 0
    for _ in range(4_000):
        found = paired_t([next(noise) for _ in range(5)])
        inside += found["low"] <= 0 <= found["high"]
        rejected += found["p_value"] < 0.05
    assert inside + rejected == 4_000  # interval and test are two views of one thing
    assert stats.binomtest(rejected, 4_000, 0.05).pvalue > 1e-3


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=5), st.floats(0.001, 0.999))
def test_holm_rejects_what_stepping_down_rejects(p_values, alpha):
    """By definition: take p-values from the smallest on, while each is at most alpha / (tests that are left)."""
    rejected, left = set(), sorted(range(len(p_values)), key=lambda i: p_values[i])
    while left and p_values[left[0]] * len(left) <= alpha:
        rejected.add(left.pop(0))
    adjusted = holm(p_values)
    assert {i for i, p in enumerate(adjusted) if p <= alpha} == rejected
    assert all(p <= q <= 1 for p, q in zip(p_values, adjusted, strict=True))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.01, 0.02, 0.2, 1.0]), max_size=4))
def test_holm_is_the_closed_bonferroni_test_in_any_order(p_values):
    """A hypothesis' adjusted p-value is the largest Bonferroni p-value of all the sets of hypotheses it belongs to."""
    indices = range(len(p_values))
    sets = [s for size in range(1, len(p_values) + 1) for s in combinations(indices, size)]
    expected = [max(min(1.0, len(s) * min(p_values[j] for j in s)) for s in sets if i in s) for i in indices]
    for order in permutations(indices):
        found = holm([p_values[i] for i in order])
        assert found == pytest.approx([expected[i] for i in order], abs=1e-15)


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_choices_with_a_right_draw(n):
    for correct in range(n + 1):
        draws = [i < correct for i in range(n)]
        for k in range(1, n + 1):
            chosen = list(combinations(draws, k))
            assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, chosen)) / len(chosen), abs=1e-15)


def test_pass_at_k_is_unbiased():
    """Its mean over the number of right draws, each right with probability p, is 1 - (1 - p)^k."""
    for p, n, k in ((0.3, 6, 2), (0.05, 10, 10), (0.9, 4, 3)):
        mean = sum(stats.binom.pmf(c, n, p) * pass_at_k(n, c, k) for c in range(n + 1))
        assert mean == pytest.approx(1 - (1 - p) ** k, rel=1e-12)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_importance_estimates_p_without_bias(k):
    """Identity 5 over every outcome of k hinted draws of a policy that can be listed whole."""
    world = World(seed=3)
    p_hat = rejected = 0.0
    for chance, history in world.histories("pps", k, "all"):
        outcomes = [outcome for _, outcome in history]
        estimate, ess = importance(
            [math.log(world.hinted[o]) for o in outcomes],
            [math.log(world.plain[o]) for o in outcomes],
            [accepted(o) for o in outcomes],
        )
        p_hat += chance * estimate
        rejected += chance * (ess == 0)
        weights = [world.plain[o] / world.hinted[o] * accepted(o) for o in outcomes]
        assert estimate == pytest.approx(sum(weights) / k)
        assert ess == pytest.approx(sum(weights) ** 2 / sum(w * w for w in weights) if any(weights) else 0.0)
        assert ess <= sum(map(accepted, outcomes)) * (1 + 1e-12)
    assert p_hat == pytest.approx(world.p, rel=1e-12)
    assert rejected == pytest.approx((1 - world.a) ** k, rel=1e-12)


def test_importance_of_a_proposal_that_always_accepts_bounds_log_p():
    world = World(seed=3)
    right = {o: chance / world.a for o, chance in world.hinted.items() if accepted(o)}
    estimates = [(q, importance([math.log(q)], [math.log(world.plain[o])], [True])[0]) for o, q in right.items()]
    bound = sum(q * math.log(p_hat) for q, p_hat in estimates)
    assert bound < math.log(world.p)
    posterior = {o: world.plain[o] / world.p for o in right}  # the best proposal: every draw gives p exactly
    for o, q in posterior.items():
        assert importance([math.log(q)], [math.log(world.plain[o])], [True])[0] == pytest.approx(world.p, rel=1e-12)


def test_importance_of_long_rationales():
    p_hat, ess = importance([-2000.0, -2010.0], [-2700.0, -2710.0], [True, True])  # each weight is e^-700
    assert math.log(p_hat) == pytest.approx(-700.0)
    assert ess == pytest.approx(2.0)
    assert importance([-1.0], [-1.0], [False]) == importance([-9.0], [-2.0], [False]) == (0.0, 0.0)


def test_no_module_of_minem_imports_the_standard_librarys_statistics():
    folder = Path(__file__).parents[2] / "minem"
    wrong = re.compile(r"^\s*(import statistics|from statistics import)", re.MULTILINE)
    assert [str(path) for path in folder.rglob("*.py") if wrong.search(path.read_text())] == []
