"""What was observed: one row of label counts for every step that has any."""

from __future__ import annotations

from bisect import bisect_left
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np

from groundwire_limes.functional import Array


class History:
    """Label counts by step, oldest first. A step without a row is missing, which is not the same as uniform.

    Args:
        classes: Number of classes K.

    Example:
        >>> history = History(2)
        >>> history.add(7, np.array([1.0, 0.0])), history.add(5, np.array([0.0, 2.0]))
        (0, 0)
        >>> history.steps, history.counts.tolist()
        ([5, 7], [[0.0, 2.0], [1.0, 0.0]])
    """

    def __init__(self, classes: int) -> None:
        self.steps: list[int] = []
        self._rows = np.zeros((64, classes))

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def counts(self) -> Array:
        """Shape (T, K); a view."""
        return self._rows[: len(self.steps)]

    def before(self, step: int) -> int:
        """How many rows are older than ``step``."""
        return bisect_left(self.steps, step)

    def add(self, step: int, counts: Array) -> int:
        """Add ``counts`` to the row of ``step``, wherever it belongs.

        Returns:
            Index of the row that changed.
        """
        at = self.before(step)
        if at == len(self.steps) or self.steps[at] != step:
            self._insert(at, step)
        self._rows[at] += counts
        return at

    def _insert(self, at: int, step: int) -> None:
        used = len(self.steps)
        if used == len(self._rows):
            self._rows = np.concatenate([self._rows, np.zeros_like(self._rows)])
        self._rows[at + 1 : used + 1] = self._rows[at:used]
        self._rows[at] = 0
        self.steps.insert(at, step)


def usual_gap(steps: list[int], last: int = 32) -> int:
    """Median distance between the last observed steps, at least 1: how far ahead "the next one" is.

    Example:
        >>> usual_gap([0, 10, 20, 40, 50]), usual_gap([3])
        (10, 1)
    """
    gaps = [after - before for before, after in pairwise(steps[-last:])]
    return max(1, int(median(gaps))) if gaps else 1


def horizon(last: int, step: int, gap: int) -> int:
    """How many observed steps, usually ``gap`` apart, ``step`` is ahead of the ``last`` one; at least 1.

    Example:
        >>> horizon(20, 40, gap=10)
        2
    """
    return max(1, round((step - last) / gap))


def checked_counts(counts: Any, classes: int) -> Array:
    """``counts`` as float64 of shape (K,).

    Raises:
        ValueError: Another shape, or a count that is negative, infinite or NaN; it names the class.
    """
    row = np.asarray(counts, np.float64)
    if row.shape != (classes,):
        raise ValueError(f"counts must have shape ({classes},), one per class, got {row.shape}")
    wrong = np.flatnonzero(~(np.isfinite(row) & (row >= 0)))
    if len(wrong):
        raise ValueError(f"the count of class {wrong[0]} is {row[wrong[0]]:g}; counts are finite and at least 0")
    return row


def checked_step(step: Any) -> int:
    """``step`` as an int.

    Raises:
        TypeError: It is not a whole number.
    """
    if isinstance(step, bool) or not isinstance(step, int | np.integer):
        raise TypeError(f"step must be a whole number, got {step!r}")
    return int(step)
