"""Effective numbers of weighted rows, for tests that count rows."""

from __future__ import annotations

import numpy as np

from groundwire_bias_audit.audit.rates import Floats


def effective_counts(k: Floats, n: Floats, k_squared: Floats, n_squared: Floats) -> tuple[Floats, Floats]:
    """Effective successes and trials of groups.

    Kish's (sum w)^2 / sum w^2 trials, at the weighted rate. Where weights go along with success (a weight for each
    class), a weighted rate varies more than that; then all trials are divided by the ratio of the two variances at
    the pooled rate p, sum w^2 (success - p)^2 / (p (1 - p) sum w^2).

    Args:
        k: Sum of the weights of successes, shape (G,).
        n: Sum of all weights.
        k_squared: Sum of the squared weights of successes.
        n_squared: Sum of all squared weights.

    Example:
        >>> [part.tolist() for part in effective_counts(*map(np.array, ([6.0], [10.0], [12.0], [20.0])))]
        [[3.0], [5.0]]
    """
    p = k.sum() / max(n.sum(), np.finfo(float).tiny)
    if_alike = p * (1 - p) * n_squared.sum()
    found = (k_squared * (1 - p) ** 2 + (n_squared - k_squared) * p**2).sum()
    ratio = max(found / if_alike, 1.0) if if_alike > 0 else 1.0
    with np.errstate(divide="ignore", invalid="ignore"):
        trials = whole(np.where(n_squared > 0, n**2 / n_squared, 0.0) / ratio)
        return np.where(n > 0, k / n, 0.0) * trials, trials


def whole(rows: Floats) -> Floats:
    """Thirty rows of weight 0.1 are thirty, and not 29.999999: what is an integer up to rounding becomes one."""
    nearest = np.rint(rows)
    return np.where(np.isclose(rows, nearest, rtol=1e-9, atol=0), nearest, rows)


def moments_of(
    n: Floats,
    x: Floats,
    x_squared: Floats,
    w_squared: Floats | None = None,
    wx: Floats | None = None,
    wx_squared: Floats | None = None,
) -> tuple[Floats, Floats, Floats]:
    """Rows, mean and unbiased variance of x by group; with weights, effective rows and the variance to go with them.

    Args:
        n: Sum of weights (rows without), shape (G,).
        x: Sum of w x.
        x_squared: Sum of w x^2.
        w_squared: Sum of w^2; ``n`` when left out.
        wx: Sum of w^2 x.
        wx_squared: Sum of w^2 x^2.

    Returns:
        Such that variance / rows is the variance of the weighted mean, sum w^2 (x - mean)^2 / (sum w)^2.

    Example:
        >>> [float(part[0]) for part in moments_of(*map(np.array, ([2.0], [4.0], [10.0])))]
        [2.0, 2.0, 2.0]
    """
    if w_squared is None or wx is None or wx_squared is None:
        w_squared, wx, wx_squared = n, x, x_squared
    with np.errstate(divide="ignore", invalid="ignore"):
        rows = whole(np.where(w_squared > 0, n**2 / w_squared, 0.0))
        mean = x / n
        spread = np.maximum(wx_squared - 2 * mean * wx + mean**2 * w_squared, 0.0) / w_squared
        return rows, mean, spread * rows / (rows - 1)
