"""The forecasters that "auto" hedges. Each sees the past and says what the prior of a later step will be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from groundwire_limes import kalman
from groundwire_limes.functional import Array
from groundwire_limes.history import horizon

#: Weight of a row of the same slot, one season older than another.
FADING = 0.6
#: How many past rows, and how many similar places, the analogue forecast looks at.
CONTEXT, ANALOGUES = 3, 5


@dataclass(frozen=True)
class Past:
    """The rows before a step.

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
    filter: kalman.Filter
    period: int | None
    distances: Callable[[int], Array]

    def ahead(self, step: int) -> int:
        """How many observed steps ``step`` is after the last row."""
        return horizon(self.steps[-1], step, self.gap)


def persistence(past: Past, step: int) -> Array:
    """The last row."""
    return np.asarray(past.priors[-1])


def long_run(past: Past, step: int) -> Array:
    """All labels together."""
    return past.pooled


def nearest_successor(past: Past, step: int) -> Array:
    """What followed the past row that is most like the last one: the published rule."""
    ahead, last = past.ahead(step), len(past.priors) - 1
    if last < ahead:
        return np.asarray(past.priors[-1])
    return np.asarray(past.priors[past.distances(last)[: last + 1 - ahead].argmin() + ahead])


def seasonal(past: Past, step: int) -> Array:
    """Rows of the same slot of the season, newer ones counting more; all labels together while there is none."""
    assert past.period is not None
    same = np.flatnonzero((np.asarray(past.steps) - step) % past.period == 0)[::-1][:8]
    if not len(same):
        return past.pooled
    weights = FADING ** np.arange(len(same))
    mean: Array = weights @ past.priors[same] / weights.sum()
    return mean


def filtered(past: Past, step: int) -> Array:
    """The Kalman filter's expectation."""
    return kalman.predicted(past.filter, step, past.period)


def analogue(past: Past, step: int) -> Array:
    """Mean of what followed the places in the past whose last few rows are most like the last few rows now."""
    ahead, rows = past.ahead(step), past.priors
    context = min(CONTEXT, len(rows) - ahead)
    if context < 1:
        return np.asarray(rows[-1])
    ends = np.arange(context - 1, len(rows) - ahead)
    distances = sum(past.distances(len(rows) - 1 - back)[ends - back] for back in range(context))
    closest = np.argsort(distances, kind="stable")[: min(ANALOGUES, max(1, len(ends) // 4))]
    mean: Array = rows[ends[closest] + ahead].mean(axis=0)
    return mean


Member = Callable[[Past, int], Array]
MEMBERS: dict[str, Member] = {
    "nearest": nearest_successor,
    "persistence": persistence,
    "seasonal": seasonal,
    "kalman": filtered,
    "long_run": long_run,
    "analogue": analogue,
}


def members(period: int | None) -> dict[str, Member]:
    """The members that can say something; the seasonal one only if the period is known.

    Example:
        >>> "seasonal" in members(None), "seasonal" in members(24)
        (False, True)
    """
    return {name: member for name, member in MEMBERS.items() if name != "seasonal" or period is not None}
