"""Tests whose null distribution is right: homogeneity of rates, paired flips, and corrections for many tests.

A max - min gap grows with the number of groups even when nothing is wrong, so its bootstrap interval says nothing about
fairness. Here the null is that the group labels are exchangeable among the rows of the denominator; given the
total number of successes the successes by group then follow a multivariate hypergeometric law, whatever the rate is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, chi2, false_discovery_control

#: NumPy draws multivariate hypergeometric variates for fewer rows than this.
_MOST_ROWS = 1_000_000_000
#: See :func:`sequential`.
_FIRST, _ENOUGH, _PART = 2000, 50, 100_000


def pearson(successes: NDArray[np.int64], trials: NDArray[np.int64]) -> NDArray[np.float64]:
    """Pearson's homogeneity statistic, sum of (k - n p)^2 / (n p (1 - p)), p the pooled rate.

    Args:
        successes: Shape (..., G).
        trials: Shape (G,), all positive.

    Returns:
        Shape (...); 0 where the pooled rate is 0 or 1.

    Example:
        >>> round(float(pearson(np.array([8, 5]), np.array([10, 10]))), 6)
        1.978022
    """
    pooled = successes.sum(axis=-1, keepdims=True) / trials.sum()
    variance = trials * pooled * (1 - pooled)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(variance > 0, (successes - trials * pooled) ** 2 / variance, 0.0)
    total: NDArray[np.float64] = terms.sum(axis=-1)
    return total


def homogeneity(
    successes: Sequence[int] | NDArray[np.int64],
    trials: Sequence[int] | NDArray[np.int64],
    *,
    draws: int = 2000,
    rng: np.random.Generator | None = None,
) -> float:
    """P value of "all groups have the same rate", exact given the pooled rate up to Monte-Carlo noise.

    Pearson's statistic against its permutation distribution, ``(1 + #{drawn >= observed}) / (1 + draws)``: never below
    the true level, for any group size (:func:`sequential`). Beyond 1e9 rows the chi-squared limit is used.

    Args:
        successes: Successes k of each group, shape (G,).
        trials: Rows n of each group; groups without rows are left out.
        draws: Most permutations.
        rng: Source of randomness; seeded with 0 when left out, so that equal data give equal verdicts.

    Returns:
        P value in (0, 1]; 1 with fewer than two groups.

    Raises:
        ValueError: A group has more successes than rows, or a negative count.

    Example:
        >>> homogeneity([80, 50], [100, 100]) < 0.001, homogeneity([80, 78], [100, 100]) > 0.5
        (True, True)
    """
    k, n = np.asarray(successes, np.int64), np.asarray(trials, np.int64)
    if (k < 0).any() or (k > n).any():
        raise ValueError(f"successes must lie between 0 and trials, got {k.tolist()} of {n.tolist()}")
    k, n = k[n > 0], n[n > 0]
    if len(n) < 2 or k.sum() in (0, n.sum()):
        return 1.0
    observed = pearson(k, n)
    if n.sum() >= _MOST_ROWS:
        return float(chi2.sf(observed, len(n) - 1))
    source = rng or np.random.default_rng(0)

    def exceeding(count: int) -> int:
        drawn = source.multivariate_hypergeometric(n, int(k.sum()), size=count, method="marginals")
        # Ties with the observed table count, and equal tables may differ in the last bit.
        return int((pearson(drawn, n) >= observed * (1 - 1e-9)).sum())

    return sequential(exceeding, draws)


def sequential(exceeding: Callable[[int], int], draws: int) -> float:
    """Monte-Carlo P value that spends all draws only where the first ones leave it small.

    (1 + exceeding) / (1 + drawn), after the first 2,000 draws if 50 of them exceed, else after all. An audit of many
    outputs needs 100,000 draws or more to resolve the P values that its correction asks for, and most of its tests are
    far from them. It is still below x with a chance of at most x: a value under 51 / 2001 needs all draws, and any
    other one implies that the first draws alone give no more.

    Args:
        exceeding: Draws so many times and returns how often the statistic was at least the observed one.
        draws: Most draws.

    Example:
        >>> sequential(lambda count: count // 2, 100_000)
        0.5002498750624688
    """
    first = min(draws, _FIRST)
    found = exceeding(first)
    if found >= _ENOUGH or first == draws:
        return (1 + found) / (1 + first)
    # In parts, so that memory does not grow with the draws.
    found += sum(exceeding(min(_PART, draws - done)) for done in range(first, draws, _PART))
    return (1 + found) / (1 + draws)


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided P value of McNemar's test.

    Args:
        only_first: Rows that only the first model gets right.
        only_second: Rows that only the second model gets right.

    Returns:
        P value that a flip is as likely in either direction; 1 without flips.

    Example:
        >>> round(mcnemar(10, 1), 6)
        0.011719
    """
    flips = only_first + only_second
    return float(binomtest(only_first, flips, 0.5).pvalue) if flips else 1.0


def adjust(p_values: Sequence[float] | NDArray[np.float64], method: str = "holm") -> NDArray[np.float64]:
    """Adjusted P values: reject those at most alpha.

    Args:
        p_values: Shape (m,); NaN (not tested) stays NaN and does not count.
        method: ``"holm"`` bounds the chance of any false alarm, ``"bh"`` (Benjamini-Hochberg) their share, ``"none"``.

    Raises:
        ValueError: ``method`` is none of these.

    Example:
        >>> adjust([0.01, 0.04, 0.03]).tolist()
        [0.03, 0.06, 0.06]
    """
    p = np.asarray(p_values, dtype=float)
    result = np.full(p.shape, np.nan)
    tested = ~np.isnan(p)
    if method not in CORRECTIONS:
        raise ValueError(f"correction must be one of {', '.join(CORRECTIONS)}, got {method!r}")
    if tested.any():
        result[tested] = CORRECTIONS[method](p[tested])
    return result


def _holm(p: NDArray[np.float64]) -> NDArray[np.float64]:
    order = np.argsort(p)
    steps = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    result = np.empty_like(p)
    result[order] = np.minimum(steps, 1.0)
    return result


CORRECTIONS = {"holm": _holm, "bh": false_discovery_control, "none": lambda p: p}
