"""Exact tests and intervals for differences of two rates: of two groups, and of one group before and after.

The gate asks whether a difference is larger than its tolerance, not whether there is one, and it asks so for many pairs
at levels of 1e-3 to 1e-6. Normal approximations fail there for small groups, so the P values are exact unconditional
ones: the largest chance, over all rates that the null hypothesis allows and the data do not exclude (Berger and Boos,
1994), of a score statistic (Farrington and Manning, 1990; Tango, 1998) at least as large as the observed one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import bdtr, bdtrc, betainccinv, betaincinv, gammaln, xlog1py, xlogy
from scipy.stats import norm

from groundwire_bias_audit.audit.rates import Floats

#: Of a P value, the share of the level that is spent on leaving out rates which the data exclude.
EXCLUDED = 1e-3


def difference_z(k1: ArrayLike, n1: ArrayLike, k2: ArrayLike, n2: ArrayLike, margin: ArrayLike) -> Floats:
    """Score statistic of "rate 1 exceeds rate 2 by at most ``margin``"; large values speak against it.

    (k1 / n1 - k2 / n2 - margin) over its standard deviation at the most likely rates that differ by ``margin``.

    Args:
        k1: Successes of the first group.
        n1: Rows of the first group.
        k2: Successes of the second group.
        n2: Rows of the second group.
        margin: In (-1, 1).

    Example:
        >>> round(float(difference_z(80, 100, 50, 100, 0.1)), 3)
        2.996
    """
    a, n, b, m, d = (np.asarray(v, dtype=float) for v in (k1, n1, k2, n2, margin))
    total, found = n + m, a + b
    # The likelihood's derivative is a cubic in the second rate; this is its root between 0 and 1.
    l3, l2 = total, (n + 2 * m) * d - total - found
    l1, l0 = (m * d - total - 2 * b) * d + found, b * d * (1 - d)
    with np.errstate(divide="ignore", invalid="ignore"):
        v = (l2 / (3 * l3)) ** 3 - l1 * l2 / (6 * l3**2) + l0 / (2 * l3)
        u = np.where(v < 0, -1.0, 1.0) * np.sqrt(np.maximum((l2 / (3 * l3)) ** 2 - l1 / (3 * l3), 0.0))
        w = (np.pi + np.arccos(np.clip(np.where(u == 0, 0.0, v / u**3), -1, 1))) / 3
    q = np.clip(2 * u * np.cos(w) - l2 / (3 * l3), np.maximum(0.0, -d), np.minimum(1.0, 1.0 - d))
    p = q + d
    return _ratio(a / n - b / m - d, p * (1 - p) / n + q * (1 - q) / m)


def paired_z(worse: ArrayLike, better: ArrayLike, n: ArrayLike, margin: ArrayLike) -> Floats:
    """Score statistic of "at most ``margin`` more of the rows get worse than get better".

    Args:
        worse: Rows that got worse.
        better: Rows that got better.
        n: All rows.
        margin: In (-1, 1).

    Example:
        >>> round(float(paired_z(30, 5, 100, 0.1)), 3)
        2.709
    """
    b, c, rows, d = (np.asarray(v, dtype=float) for v in (worse, better, n, margin))
    half = b + c - d * (2 * rows - b + c)
    q = (half + np.sqrt(np.maximum(half**2 + 8 * rows * c * d * (1 - d), 0.0))) / (4 * rows)
    q = np.clip(q, np.maximum(0.0, -d), (1 - d) / 2)
    return _ratio((b - c) / rows - d, (2 * q + d - d**2) / rows)


def _ratio(difference: Floats, variance: Floats) -> Floats:
    """``difference`` in standard deviations; without any variance, infinite where there is a difference."""
    with np.errstate(divide="ignore", invalid="ignore"):
        z = difference / np.sqrt(np.maximum(variance, 0.0))
    return np.where(np.abs(difference) < 1e-12, 0.0, z)


def difference_p_value(k1: int, n1: int, k2: int, n2: int, margin: float, level: float = 0.05) -> float:
    """Exact P value of "rate 1 exceeds rate 2 by at most ``margin``".

    Args:
        k1: Successes of the first group.
        n1: Rows of the first group.
        k2: Successes of the second group.
        n2: Rows of the second group.
        margin: In (-1, 1).
        level: At which the P value will be used; none below a thousandth of it is given.

    Example:
        >>> 0.0013 < difference_p_value(80, 100, 50, 100, 0.1) < 0.0016
        True
    """
    spent = EXCLUDED * level
    (low1, high1), (low2, high2) = (clopper_pearson(k, n, spent / 8) for k, n in ((k1, n1), (k2, n2)))
    if low1 - high2 > margin:
        return spent
    if high1 - low2 <= margin:
        return 1.0
    z = float(difference_z(k1, n1, k2, n2, margin)) - 1e-9
    rates = _grid(max(low2, low1 - margin), min(high2, high1 - margin), max(n1, n2))
    first = rates + margin
    a = _counts(first, n1, spent / 4)
    # For each count of the first group, the largest one of the second that is as extreme as what was seen.
    most = _last(lambda b: difference_z(a, n1, b, n2, margin) >= z, np.full(len(a), -1), np.full(len(a), n2))
    most = np.maximum.accumulate(most)
    below = np.where(most[:, None] < 0, 0.0, bdtr(np.maximum(most, 0)[:, None].astype(float), n2, rates))
    tail = (_chances(a, n1, first) * below).sum(axis=0)
    return float(min(1.0, tail.max() + spent))


def paired_p_value(worse: int, better: int, n: int, margin: float, level: float = 0.05) -> float:
    """Exact P value of "at most ``margin`` more of the rows get worse than get better".

    Args:
        worse: Rows that got worse.
        better: Rows that got better.
        n: All rows.
        margin: In (-1, 1).
        level: At which the P value will be used; none below a thousandth of it is given.

    Example:
        >>> 0.0035 < paired_p_value(30, 5, 100, 0.1) < 0.0045
        True
    """
    spent = EXCLUDED * level
    low, high = clopper_pearson(worse + better, n, spent / 4)
    z = float(paired_z(worse, better, n, margin)) - 1e-9
    least = max(low, abs(margin))
    if least > high:  # with so few changed rows the shares cannot differ by ``margin``
        return 1.0 if margin > 0 else spent
    changed = _grid(least, high, n)
    f = _counts(changed, n, spent / 4)
    down = (1 + margin / np.maximum(changed, abs(margin) or 1.0)) / 2  # of the changed rows
    # For each number of changed rows, the smallest number of worse ones that is as extreme as what was seen.
    fewer = _last(lambda b: paired_z(b, f - b, n, margin) < z, np.full(len(f), -1), f)
    tail = (_chances(f, n, changed) * _above(fewer, f, down)).sum(axis=0)
    return float(min(1.0, tail.max() + spent))


def _counts(rates: Floats, n: int, tail: float) -> NDArray[np.int64]:
    """Successes that occur at some of the ``rates``, but for a chance of ``tail`` on a side (Bernstein's bound)."""
    nats, variance = -np.log(tail), n * (rates * (1 - rates)).max()
    reach = nats / 3 + np.sqrt(nats**2 / 9 + 2 * variance * nats)
    low, high = max(0.0, n * rates.min() - reach), min(float(n), n * rates.max() + reach)
    return np.arange(int(low), int(np.ceil(high)) + 1)


def _chances(k: NDArray[np.int64], n: int, rates: Floats) -> Floats:
    """Binomial probabilities, by count and rate."""
    ways = gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)
    found: Floats = np.exp(ways[:, None] + xlogy(k[:, None], rates) + xlog1py((n - k)[:, None], -rates))
    return found


def _above(k: NDArray[Any], n: NDArray[Any], p: Floats) -> Floats:
    """Chance of more than ``k`` successes, by count and rate."""
    return np.where(k[:, None] < 0, 1.0, bdtrc(np.maximum(k, 0)[:, None].astype(float), n[:, None], p))


def clopper_pearson(k: int, n: int, tail: float) -> tuple[float, float]:
    """Exact interval of a rate that misses it on either side with a chance of at most ``tail``.

    Example:
        >>> [round(end, 3) for end in clopper_pearson(8, 10, 0.025)]
        [0.444, 0.975]
    """
    low = 0.0 if k == 0 else float(betaincinv(k, n - k + 1, tail))
    return low, 1.0 if k == n else float(betainccinv(k + 1, n - k, tail))


def _grid(low: float, high: float, rows: int) -> Floats:
    """Rates to look at: the chance is smooth in them for many rows and jumps for few."""
    points = 64 if rows < 300 else 24 if rows < 2000 else 9
    return np.linspace(low, high, points)


def _last(holds: Callable[[NDArray[Any]], NDArray[np.bool_]], low: NDArray[Any], high: NDArray[Any]) -> NDArray[Any]:
    """Largest integer at which ``holds``, which must be monotone; ``low`` (where it is not asked) if there is none."""
    low, high = low.astype(np.int64), high.astype(np.int64)
    while (low < high).any():
        middle = (low + high + 1) // 2
        good = holds(middle)
        low, high = np.where(good, middle, low), np.where(good, high, middle - 1)
    return low


def gap_at_most(k: NDArray[np.int64], n: NDArray[np.int64], level: float) -> float:
    """Upper limit of the largest difference of two of several rates, from intervals of all pairs.

    Args:
        k: Successes of each group, shape (G,), G >= 2.
        n: Rows of each group.
        level: Chance of each pair's two-sided interval to miss its difference.

    Returns:
        The true gap is not larger, with a chance of at least 1 - level * G (G - 1) / 2.

    Example:
        >>> round(gap_at_most(np.array([80, 50]), np.array([100, 100]), 0.05), 2)
        0.42
    """
    tail, (a, na, b, nb) = level / 2, _ordered_pairs(k, n)
    upper = _score_limit(lambda d: difference_z(b, nb, a, na, -d), tail, a.shape)
    ends = np.array([clopper_pearson(int(x), int(y), tail / 2) for x, y in zip(k, n, strict=True)])
    widest = np.subtract.outer(ends[:, 1], ends[:, 0])[~np.eye(len(k), dtype=bool)]  # limits beyond doubt
    seen, high, open_ = a / na - b / nb, float(upper.max()), np.ones(len(a), bool)
    while True:
        open_ &= (widest > high) & ~_surely_excluded(b, nb, a, na, -high, tail)
        if not open_.any():
            return min(1.0, high)
        pair = int(np.argmax(np.where(open_, upper, -2)))
        rows = int(b[pair]), int(nb[pair]), int(a[pair]), int(na[pair])
        high = _widened(difference_p_value, rows, -1, high, float(seen[pair]), float(widest[pair]), tail)
        open_[pair] = False


def gap_at_least(k: NDArray[np.int64], n: NDArray[np.int64], level: float) -> float:
    """Lower limit of the largest difference of two of several rates; arguments as for :func:`gap_at_most`.

    Example:
        >>> round(gap_at_least(np.array([80, 50]), np.array([100, 100]), 0.05), 2)
        0.17
    """
    tail, (a, na, b, nb) = level / 2, _ordered_pairs(k, n)
    lower = -_score_limit(lambda d: difference_z(a, na, b, nb, -d), tail, a.shape)
    best = int(np.argmax(lower))
    rows = int(a[best]), int(na[best]), int(b[best]), int(nb[best])
    if lower[best] <= 0:
        return 0.0
    seen = float(a[best] / na[best] - b[best] / nb[best])
    return max(0.0, _widened(difference_p_value, rows, 1, float(lower[best]), seen, 0.0, tail))


def _ordered_pairs(k: NDArray[Any], n: NDArray[Any]) -> tuple[NDArray[Any], ...]:
    """Successes and rows of the first and of the second group of all ordered pairs."""
    first, second = (index[~np.eye(len(k), dtype=bool)] for index in np.indices((len(k), len(k))))
    return k[first], n[first], k[second], n[second]


def loss_at_most(worse: NDArray[np.int64], better: NDArray[np.int64], n: NDArray[np.int64], tail: float) -> float:
    """Upper limit of the largest loss of several groups: the share of rows that got worse minus that that got better.

    Args:
        worse: Rows of each group that got worse, shape (G,).
        better: Rows that got better.
        n: All rows.
        tail: Chance of each group's limit to miss its loss.

    Example:
        >>> round(loss_at_most(np.array([30, 2]), np.array([5, 1]), np.array([100, 100]), 0.025), 2)
        0.36
    """
    upper = _score_limit(lambda d: paired_z(better, worse, n, -d), tail, n.shape)
    high = -1.0
    for b, c, rows, limit in zip(worse.tolist(), better.tolist(), n.tolist(), upper, strict=True):
        if limit > high:
            high = _widened(paired_p_value, (c, b, rows), -1, float(limit), (b - c) / rows, 1.0, tail)
    return high


def loss_at_least(worse: NDArray[np.int64], better: NDArray[np.int64], n: NDArray[np.int64], tail: float) -> float:
    """Lower limit of the largest loss of several groups; arguments as for :func:`loss_at_most`.

    Example:
        >>> round(loss_at_least(np.array([30, 2]), np.array([5, 1]), np.array([100, 100]), 0.025), 2)
        0.14
    """
    lower = -_score_limit(lambda d: paired_z(worse, better, n, -d), tail, n.shape)
    low = -1.0
    for b, c, rows, limit in zip(worse.tolist(), better.tolist(), n.tolist(), lower, strict=True):
        if limit > low:
            low = max(low, _widened(paired_p_value, (b, c, rows), 1, float(limit), (b - c) / rows, -1.0, tail))
    return low


def _widened(
    test: Callable[..., float], rows: tuple[int, ...], sign: int, limit: float, seen: float, end: float, tail: float
) -> float:
    """Move ``limit`` away from what was ``seen`` towards ``end`` until the exact ``test`` of it excludes it."""
    step = 0.01 * (limit - seen) or 0.001 * (end - limit)
    while (end - limit) * step > 0 and test(*rows, sign * limit, tail) > tail:
        limit += step
        step *= 1.6
    return end if (end - limit) * step <= 0 else limit


def _surely_excluded(k1: Any, n1: Any, k2: Any, n2: Any, margin: float, tail: float) -> NDArray[np.bool_]:
    """Pairs whose exact P value is at most ``tail`` by far, as the normal tail and twice its skewness term tell."""
    z = np.clip(difference_z(k1, n1, k2, n2, margin), -40, 40)
    p1, p2 = (k1 + 0.5) / (n1 + 1), (k2 + 0.5) / (n2 + 1)
    rows = np.minimum(n1 * p1 * (1 - p1), n2 * p2 * (1 - p2))
    return np.asarray((rows >= 10) & (norm.logsf(z) + z**3 / (3 * np.sqrt(rows)) <= np.log(tail)) & (z < np.sqrt(rows)))


def _score_limit(z_of: Callable[[Floats], Floats], tail: float, shape: tuple[int, ...]) -> Floats:
    """Upper limits of differences: the least that the score test excludes; ``z_of`` rises with the difference."""
    least, (low, high) = norm.isf(tail), (np.full(shape, -1.0), np.full(shape, 1.0))
    for _ in range(24):
        middle = (low + high) / 2
        outside = z_of(middle) >= least
        low, high = np.where(outside, low, middle), np.where(outside, middle, high)
    return high
