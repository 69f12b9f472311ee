"""Exact tests of differences of rates: against enumeration of all tables, and a direct maximum of the likelihood."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import xlogy
from scipy.stats import binom, multinomial

from groundwire_bias_audit.audit.rate_differences import (
    clopper_pearson,
    difference_p_value,
    difference_z,
    gap_at_least,
    gap_at_most,
    loss_at_least,
    loss_at_most,
    paired_p_value,
    paired_z,
)


def most_likely(loglikelihood, low, high):
    found = minimize_scalar(lambda q: -loglikelihood(q), bounds=(low, high), method="bounded", options={"xatol": 1e-11})
    return found.x


@given(st.integers(1, 80), st.integers(1, 80), st.floats(0, 1), st.floats(0, 1), st.floats(-0.6, 0.6))
@settings(max_examples=100, deadline=None)
def test_the_score_statistic_uses_the_most_likely_rates_that_differ_by_the_margin(n1, n2, s1, s2, margin):
    k1, k2 = round(s1 * n1), round(s2 * n2)

    def loglikelihood(q):
        p = q + margin
        return xlogy(k1, p) + xlogy(n1 - k1, 1 - p) + xlogy(k2, q) + xlogy(n2 - k2, 1 - q)

    q = most_likely(loglikelihood, max(0, -margin), min(1, 1 - margin))
    p = q + margin
    variance = p * (1 - p) / n1 + q * (1 - q) / n2
    if variance > 1e-4:
        expected = (k1 / n1 - k2 / n2 - margin) / np.sqrt(variance)
        assert float(difference_z(k1, n1, k2, n2, margin)) == pytest.approx(expected, rel=1e-3, abs=1e-4)


@given(st.integers(2, 80), st.floats(0, 1), st.floats(0, 1), st.floats(-0.5, 0.5))
@settings(max_examples=100, deadline=None)
def test_so_does_that_of_paired_rows(n, share, down, margin):
    changed = round(share * n)
    worse = round(down * changed)
    better = changed - worse

    def loglikelihood(q):
        return xlogy(worse, q + margin) + xlogy(better, q) + xlogy(n - changed, 1 - 2 * q - margin)

    q = most_likely(loglikelihood, max(0, -margin), (1 - margin) / 2)
    variance = (2 * q + margin - margin**2) / n
    if variance > 1e-4:
        expected = ((worse - better) / n - margin) / np.sqrt(variance)
        assert float(paired_z(worse, better, n, margin)) == pytest.approx(expected, rel=1e-3, abs=1e-4)


def tables(n1, n2):
    return [index.ravel() for index in np.indices((n1 + 1, n2 + 1))]


@pytest.mark.parametrize(
    ("n1", "n2", "margin"), [(7, 7, 0.05), (12, 9, 0.0), (5, 25, 0.1), (25, 5, 0.05), (9, 9, -0.2)]
)
@pytest.mark.parametrize("level", [0.2, 0.05, 0.01])
def test_rates_within_the_margin_are_rejected_no_more_often_than_the_level(n1, n2, margin, level):
    a, b = tables(n1, n2)
    p = np.array([difference_p_value(x, n1, y, n2, margin, level) for x, y in zip(a.tolist(), b.tolist(), strict=True)])
    rejected = p <= level
    for q in np.linspace(max(0, -margin), min(1, 1 - margin), 101):
        for first in {q + margin, max(0.0, q + margin - 0.1)}:
            assert (binom.pmf(a, n1, first) * binom.pmf(b, n2, q))[rejected].sum() <= level


@pytest.mark.parametrize(("n", "margin"), [(8, 0.05), (14, 0.0), (14, 0.2), (20, 0.1), (12, -0.1)])
@pytest.mark.parametrize("level", [0.2, 0.05, 0.01])
def test_losses_within_the_margin_are_rejected_no_more_often_than_the_level(n, margin, level):
    cells = [(b, c) for b in range(n + 1) for c in range(n + 1 - b)]
    rejected = np.array([paired_p_value(b, c, n, margin, level) <= level for b, c in cells])
    counts = np.array([(b, c, n - b - c) for b, c in cells])
    for q in np.linspace(max(0, -margin), (1 - margin) / 2, 41):
        rates = [q + margin, q, max(0.0, 1 - 2 * q - margin)]
        assert multinomial.pmf(counts, n, np.array(rates) / sum(rates))[rejected].sum() <= level


@pytest.mark.parametrize(
    ("k1", "n1", "k2", "n2", "margin"),
    [(37, 40, 20, 35, 0.07), (22, 30, 21, 40, -0.07), (36, 38, 11, 20, 0.16), (8, 9, 23, 41, -0.1)],
)
def test_the_p_value_is_the_largest_chance_of_as_extreme_tables(k1, n1, k2, n2, margin):
    a, b = tables(n1, n2)
    extreme = difference_z(a, n1, b, n2, margin) >= float(difference_z(k1, n1, k2, n2, margin)) - 1e-9
    chances = [
        (binom.pmf(a, n1, q + margin) * binom.pmf(b, n2, q))[extreme].sum()
        for q in np.linspace(max(0, -margin), min(1, 1 - margin), 1001)
    ]
    found = difference_p_value(k1, n1, k2, n2, margin, 0.05)
    assert found == pytest.approx(max(chances), rel=0.03, abs=6e-5)


def test_limits_are_where_the_exact_test_turns():
    k, n, level = np.array([80, 50]), np.array([100, 100]), 0.01
    low, high = gap_at_least(k, n, level), gap_at_most(k, n, level)
    assert (
        difference_p_value(80, 100, 50, 100, low, level / 2)
        <= level / 2
        < difference_p_value(80, 100, 50, 100, low + 0.02)
    )
    assert difference_p_value(50, 100, 80, 100, -high, level / 2) <= level / 2
    worse, better, rows = np.array([30, 2]), np.array([5, 1]), np.array([100, 100])
    assert paired_p_value(30, 5, 100, loss_at_least(worse, better, rows, level), level) <= level
    assert paired_p_value(5, 30, 100, -loss_at_most(worse, better, rows, level), level) <= level


@pytest.mark.parametrize("rates", [(0.8, 0.8), (0.95, 0.9, 0.9), (1.0, 0.97, 0.99, 0.98)])
def test_the_interval_of_the_largest_gap_holds_it(rates):
    rng, level, n = np.random.default_rng(0), 0.2, np.array([60, 40, 200, 90])[: len(rates)]
    pairs = len(rates) * (len(rates) - 1) / 2
    missed = 0
    for _ in range(200):
        k = rng.binomial(n, rates)
        missed += not gap_at_least(k, n, level / pairs) <= np.ptp(rates) <= gap_at_most(k, n, level / pairs)
    assert missed <= 200 * level + 3.1 * np.sqrt(200 * level * (1 - level))


@pytest.mark.parametrize(("k", "n"), [([0, 0], [30, 40]), ([30, 40], [30, 40]), ([0, 40], [30, 40]), ([1, 1], [1, 1])])
def test_groups_without_any_error_have_limits_too(k, n):
    k, n = np.array(k), np.array(n)
    low, high = gap_at_least(k, n, 0.01), gap_at_most(k, n, 0.01)
    assert 0 <= low <= np.ptp(k / n) <= high <= 1


def test_clopper_and_pearson_miss_no_more_than_they_say():
    for p in np.linspace(0.01, 0.99, 33):
        ends = np.array([clopper_pearson(k, 30, 0.01) for k in range(31)])
        chance = binom.pmf(np.arange(31), 30, p)
        assert chance[ends[:, 0] > p].sum() <= 0.01
        assert chance[ends[:, 1] < p].sum() <= 0.01
