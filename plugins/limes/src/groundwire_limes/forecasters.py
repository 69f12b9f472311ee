"""Forecasters of the class prior, alone or as the experts of "auto": each is ``forecaster(past, step) -> prior``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from groundwire_limes.functional import Array
from groundwire_limes.history import horizon
from groundwire_limes.kalman import KalmanFilter

#: Weight of a row of the same slot, one season older than another.
FADING = 0.6
#: How many past rows, and how many similar places, the analogue forecaster looks at.
CONTEXT, ANALOGUES = 3, 5


@dataclass(frozen=True)
class Past:
    """The rows before a step, as forecasters see them.

    Attributes:
        steps: Of the rows, ascending.
        gap: How far apart they usually are.
        priors: Their smoothed class frequencies, shape (T, K), T >= 1.
        pooled: Smoothed frequencies of all labels together, shape (K,).
        filter: The Kalman filter after the last row.
        period: Steps of a season, or None.
        distances: L1 distances of the row with this index from all rows before it.
    """

    steps: list[int]
    gap: int
    priors: Array
    pooled: Array
    filter: KalmanFilter
    period: int | None
    distances: Callable[[int], Array]

    def ahead(self, step: int) -> int:
        """Return how many observed steps ``step`` is after the last row."""
        return horizon(self.steps[-1], step, self.gap)


def persistence(past: Past, step: int) -> Array:
    """Return the last row."""
    return np.asarray(past.priors[-1])


def long_run(past: Past, step: int) -> Array:
    """Return the frequencies of all labels together."""
    return past.pooled


def nearest_successor(past: Past, step: int) -> Array:
    """Return what followed the past row that is most like the last one: the published rule."""
    ahead, last = past.ahead(step), len(past.priors) - 1
    if last < ahead:
        return np.asarray(past.priors[-1])
    return np.asarray(past.priors[past.distances(last)[: last + 1 - ahead].argmin() + ahead])


def seasonal(past: Past, step: int) -> Array:
    """Return the mean of the same slot in earlier seasons, newer ones counting more; all labels while there is none."""
    assert past.period is not None
    same = np.flatnonzero((np.asarray(past.steps) - step) % past.period == 0)[::-1][:8]
    if not len(same):
        return past.pooled
    weights = FADING ** np.arange(len(same))
    mean: Array = weights @ past.priors[same] / weights.sum()
    return mean


def kalman_filter(past: Past, step: int) -> Array:
    """Return what the Kalman filter expects."""
    return past.filter.forecast(step)


def analogue(past: Past, step: int) -> Array:
    """Return the mean of what followed the places in the past whose last few rows are most like those of now."""
    ahead, rows = past.ahead(step), past.priors
    context = min(CONTEXT, len(rows) - ahead)
    if context < 1:
        return np.asarray(rows[-1])
    ends = np.arange(context - 1, len(rows) - ahead)
    distances = sum(past.distances(len(rows) - 1 - back)[ends - back] for back in range(context))
    closest = np.argsort(distances, kind="stable")[: min(ANALOGUES, max(1, len(ends) // 4))]
    mean: Array = rows[ends[closest] + ahead].mean(axis=0)
    return mean


Forecaster = Callable[[Past, int], Array]
FORECASTERS: dict[str, Forecaster] = {
    "nearest": nearest_successor,
    "persistence": persistence,
    "seasonal": seasonal,
    "kalman": kalman_filter,
    "long_run": long_run,
    "analogue": analogue,
}


def experts(period: int | None) -> dict[str, Forecaster]:
    """Return the forecasters that "auto" mixes: all, but the seasonal one only if the period is known.

    Example:
        >>> "seasonal" in experts(None), "seasonal" in experts(24)
        (False, True)
    """
    return {name: forecaster for name, forecaster in FORECASTERS.items() if name != "seasonal" or period is not None}
