"""Lower bound of the unfairness that an adversary can force on a learner that does not filter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from groundwire_flea.distances.sources import Sources


@dataclass(frozen=True)
class LowerBound:
    """The bound for training on all sources.

    Attributes:
        alpha: Share of the rows that the N - K largest sources have: an adversary may hold any N - K sources.
        rarest: Frequency of the rarest group, within the labels that ``fairness`` looks at.
    """

    alpha: float
    rarest: float

    @property
    def ratio(self) -> float:
        """Ratio alpha / rarest: from 1 on, the bound says nothing any more."""
        return self.alpha / self.rarest

    @property
    def value(self) -> float:
        """See :func:`unavoidable_unfairness`."""
        return unavoidable_unfairness(self.alpha, self.rarest)


def lower_bound(data: Sources, k: int, fairness: str, stands_for: NDArray[Any] | None = None) -> LowerBound:
    """The bound when ``k`` sources are assumed clean, of those that differ in ``stands_for`` (n,).

    Example:
        >>> data = Sources(np.zeros((8, 1)), np.zeros(8), np.arange(8) % 2, np.array([2, 5, 1]), 2, 2)
        >>> lower_bound(data, 2, "demographic_parity")
        LowerBound(alpha=0.625, rarest=0.5)
    """
    sizes = data.sizes if stands_for is None else np.bincount(stands_for, data.sizes)[np.unique(stands_for)]
    largest = np.sort(sizes)[k:]
    cells = [mask & (data.a == group) for mask in data.conditions(fairness) for group in range(data.groups)]
    return LowerBound(float(largest.sum() / data.sizes.sum()), min(float(cell.mean()) for cell in cells))


def unavoidable_unfairness(alpha: float, rarest: float) -> float:
    """Unfairness that an adversary can force on any learner of one pooled sample: ``min(1, alpha / rarest)``.

    The order of the lower bound for demographic parity of Konstantinov and Lampert (JMLR 23, 2022), without its
    constant, capped at 1, where it says nothing more.

    Args:
        alpha: Fraction of the rows that the adversary may change, in [0, 1].
        rarest: Frequency of the rarest group (for equal opportunity: of the rarest group with a positive label).

    Raises:
        ValueError: ``alpha`` or ``rarest`` is out of range.

    Example:
        >>> unavoidable_unfairness(0.1, 0.2)
        0.5
    """
    if not 0 <= alpha <= 1 or not 0 < rarest <= 1:
        raise ValueError(f"alpha must be in [0, 1] and rarest in (0, 1], got {alpha} and {rarest}")
    return min(1.0, alpha / rarest)
