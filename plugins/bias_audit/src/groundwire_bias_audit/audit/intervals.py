"""Bootstrap intervals by resampling counts: drawing rows with replacement draws cells from a multinomial law.

The two have the same distribution for every metric that is a function of counts, and one costs a few cells a draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from groundwire_bias_audit.audit.rates import Counts, Floats, rate, ratio, spread
from groundwire_bias_audit.audit.score_metrics import Histogram, auc


def resample(counts: Counts, n_boot: int, rng: np.random.Generator) -> Counts:
    """``n_boot`` draws of ``counts.sum()`` rows with replacement.

    Args:
        counts: Integers of any shape; all cells of one data set.
        n_boot: Number of draws B.
        rng: Source of randomness.

    Returns:
        int64, shape (B, *counts.shape); every draw has the same total.

    Example:
        >>> resample(np.array([[5, 0], [3, 2]]), 2, np.random.default_rng(0)).sum(axis=(1, 2)).tolist()
        [10, 10]
    """
    flat, total = counts.reshape(-1), int(counts.sum())
    held = np.flatnonzero(flat)  # an empty cell stays empty
    draws = np.zeros((n_boot, flat.size), np.int64)
    if total:
        draws[:, held] = rng.multinomial(total, flat[held] / total, size=n_boot)
    return draws.reshape(n_boot, *counts.shape)


def quantiles(draws: NDArray[Any], q: Sequence[float]) -> Floats:
    """Quantiles over the first axis; draws in which a metric is undefined do not count. Shape (len(q), ...)."""
    undefined = np.isnan(draws)
    if not undefined.any():
        return np.asarray(np.quantile(draws, q, axis=0))
    result = np.full((len(q), *draws.shape[1:]), np.nan)
    some = ~undefined.all(axis=0)
    if some.any():
        result[:, some] = np.nanquantile(draws[:, some], q, axis=0)
    return result


def bootstrap(
    counts: Counts,
    metrics: Sequence[str],
    *,
    n_boot: int = 1000,
    ci_quantiles: Sequence[float] = (0.025, 0.975),
    random_state: int = 0,
) -> dict[str, dict[str, Floats]]:
    """Percentile intervals of every aggregate of every metric, as fairlearn's ``MetricFrame(n_boot=...)`` gives them.

    Args:
        counts: Confusion counts, shape (G, 2, 2).
        metrics: Names in :data:`groundwire_bias_audit.audit.rates.RATES`.
        n_boot: Draws.
        ci_quantiles: Which quantiles.
        random_state: Seed.

    Returns:
        By metric and aggregate (``by_group``, ``overall``, ``difference``, ...): the quantiles, along the first axis.

    Example:
        >>> counts = np.array([[[40, 10], [10, 40]], [[30, 20], [20, 30]]])
        >>> low, high = bootstrap(counts, ["accuracy"], random_state=1)["accuracy"]["by_group"][:, 0]
        >>> bool(0.7 < low < 0.8 < high < 0.9)
        True
    """
    draws = resample(counts, n_boot, np.random.default_rng(random_state))
    total, result = draws.sum(axis=1), {}
    for metric in metrics:
        by_group, overall = rate(draws, metric), rate(total, metric)
        aggregates = {"by_group": by_group, "overall": overall, **spread(by_group, overall, axis=1)}
        names, flat = list(aggregates), [value.reshape(n_boot, -1) for value in aggregates.values()]
        found = np.split(
            quantiles(np.concatenate(flat, axis=1), ci_quantiles), np.cumsum([f.shape[1] for f in flat])[:-1], axis=1
        )
        result[metric] = {
            name: part.reshape(len(ci_quantiles), *aggregates[name].shape[1:])
            for name, part in zip(names, found, strict=True)
        }
    return result


def bootstrap_scores(
    histogram: Histogram, *, n_boot: int = 200, ci_quantiles: Sequence[float] = (0.025, 0.975), random_state: int = 0
) -> dict[str, Floats]:
    """Intervals of AUC and uncertainty of each group and target, shape (len(q), G, T).

    Groups are resampled one by one, at their own size. The calibration error is biased under resampling and has none.
    """
    rng = np.random.default_rng(random_state)
    groups, targets = histogram.counts.shape[:2]
    inside = np.zeros(histogram.counts.shape[-1], bool)
    inside[histogram.bins.uncertain] = True
    found: dict[str, list[Any]] = {"roc_auc": [], "uncertainty": []}
    for group in range(groups):
        for target in range(targets):
            counts = histogram.counts[group, target]
            held = counts.any(axis=0)  # empty bins change neither
            draws = resample(counts[:, held], n_boot, rng)
            unsure = ratio(draws[..., inside[held]].sum(axis=(-2, -1)), draws.sum(axis=(-2, -1)))
            found["roc_auc"].append(quantiles(auc(draws), ci_quantiles))
            found["uncertainty"].append(quantiles(unsure, ci_quantiles))
    return {
        name: np.stack(values, axis=-1).reshape(len(ci_quantiles), groups, targets) for name, values in found.items()
    }


def bootstrap_rows(
    cells: NDArray[np.int64],
    weights: Floats,
    size: int,
    metrics: Sequence[str],
    *,
    n_boot: int,
    ci_quantiles: Sequence[float],
    random_state: int,
) -> dict[str, Floats]:
    """Intervals by group with sample weights, where rows of a cell differ and must be drawn one by one.

    Args:
        cells: ``group * 4 + label * 2 + prediction`` of each row.
        weights: Of each row.
        size: Number of groups.
        metrics: As for :func:`bootstrap`.
        n_boot: Draws.
        ci_quantiles: Which quantiles.
        random_state: Seed.
    """
    rng, draws = np.random.default_rng(random_state), np.empty((n_boot, size, 2, 2))
    for i in range(n_boot):
        rows = rng.integers(len(cells), size=len(cells))
        draws[i] = np.bincount(cells[rows], weights[rows], minlength=4 * size).reshape(size, 2, 2)
    return {metric: quantiles(rate(draws, metric), ci_quantiles) for metric in metrics}
