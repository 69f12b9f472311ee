"""How much of the rows an adversary may hold, and how rare the group is that he can aim at."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from groundwire_flea.classifiers import conditions
from groundwire_flea.functional import unavoidable_unfairness
from groundwire_flea.rows import Rows


@dataclass(frozen=True)
class Exposure:
    """What training on everything would be exposed to.

    Attributes:
        alpha: Share of the rows that the N - K largest sources have: an adversary may hold any N - K sources.
        rarest: Frequency of the rarest group, within the labels that ``fairness`` looks at.
    """

    alpha: float
    rarest: float

    @property
    def ratio(self) -> float:
        """How much alpha is of ``rarest``: from 1 on, the bound says nothing any more."""
        return self.alpha / self.rarest

    @property
    def bound(self) -> float:
        """See :func:`groundwire_flea.functional.unavoidable_unfairness`."""
        return unavoidable_unfairness(self.alpha, self.rarest)


def exposure(rows: Rows, k: int, fairness: str) -> Exposure:
    """Of learners that do not filter, when ``k`` sources are assumed clean.

    Example:
        >>> rows = Rows(np.zeros((8, 1)), np.zeros(8), np.arange(8) % 2, np.array([2, 5, 1]), 2, 2)
        >>> exposure(rows, 2, "demographic_parity")
        Exposure(alpha=0.625, rarest=0.5)
    """
    largest = np.sort(rows.sizes)[k:]
    cells = [mask & (rows.a == group) for mask in conditions(rows, fairness) for group in range(rows.groups)]
    return Exposure(float(largest.sum() / rows.sizes.sum()), min(float(cell.mean()) for cell in cells))
