"""History of a stream: one row of label counts for every time step that has any. NumPy only."""

from __future__ import annotations

from bisect import bisect_left
from itertools import pairwise
from statistics import median

import numpy as np

from groundwire_limes.functional import Array


class History:
    """Label counts by time step, oldest first. A step without a row is missing, which is not the same as uniform.

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
        """Return how many rows are older than ``step``."""
        return bisect_left(self.steps, step)

    def add(self, step: int, counts: Array) -> int:
        """Add ``counts`` to the row of ``step``, wherever it belongs.

        Returns:
            Index of the row that changed.
        """
        at, used = self.before(step), len(self.steps)
        if at == used or self.steps[at] != step:
            if used == len(self._rows):
                self._rows = np.concatenate([self._rows, np.zeros_like(self._rows)])
            self._rows[at + 1 : used + 1] = self._rows[at:used]
            self._rows[at] = 0
            self.steps.insert(at, step)
        self._rows[at] += counts
        return at


def usual_gap(steps: list[int], last: int = 32) -> int:
    """Return the median distance between the last observed steps, at least 1: how far ahead "the next one" is.

    Example:
        >>> usual_gap([0, 10, 20, 40, 50]), usual_gap([3])
        (10, 1)
    """
    gaps = [after - before for before, after in pairwise(steps[-last:])]
    return max(1, int(median(gaps))) if gaps else 1


def horizon(last: int, step: int, gap: int) -> int:
    """Return how many observed steps, usually ``gap`` apart, ``step`` is ahead of the ``last`` one; at least 1.

    Example:
        >>> horizon(20, 40, gap=10)
        2
    """
    return max(1, round((step - last) / gap))
