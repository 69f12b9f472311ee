"""Selection of sources: how many are assumed clean, which are kept, and what that rests on."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.random import RandomState
from numpy.typing import NDArray

from groundwire_flea.distances.pairwise import DistanceOptions, Distances, q_scores
from groundwire_flea.distances.sources import Sources
from groundwire_flea.lower_bound import LowerBound, lower_bound
from groundwire_flea.significance import Significance, permutation_test

SourceId: TypeAlias = Hashable
Mode = Literal["filter", "weights", "report"]
MODES: tuple[str, ...] = get_args(Mode)


@dataclass(frozen=True)
class Selection:
    """The sources that are kept, and everything that this rests on.

    Attributes:
        data: The rows that were compared.
        ids: (n,) names of the sources.
        labels: Label values in code order.
        groups: Group values in code order.
        distances: The parts of D.
        total: (n, n), D.
        q: (n,) scores.
        kept: (n,) bool.
        k: K, the number of sources assumed clean.
        vouched: (n,) bool, sources that are kept whatever their score.
        stands_for: (n,) the source that a near copy stands for: the first of them, or one that is vouched for.
        counted: (n,) bool, sources that count among the N of which K are clean: with ``count_copies_once``, those that
            stand for themselves, else all.
        significance: The permutation test, if there was one.
        bound: What an adversary could do to a learner that does not filter.
    """

    data: Sources
    ids: Sequence[SourceId]
    labels: Sequence[Any]
    groups: Sequence[Any]
    distances: Distances
    total: NDArray[Any]
    q: NDArray[Any]
    kept: NDArray[Any]
    k: int
    vouched: NDArray[Any]
    stands_for: NDArray[Any]
    counted: NDArray[Any]
    significance: Significance | None
    bound: LowerBound

    def names(self, chosen: NDArray[Any]) -> tuple[SourceId, ...]:
        """The sources of a bool (n,)."""
        return tuple(source for source, here in zip(self.ids, chosen, strict=True) if here)

    @property
    def rejected(self) -> NDArray[Any]:
        """(n,) bool, sources that count and are not kept."""
        rejected: NDArray[Any] = self.counted & ~self.kept
        return rejected

    @property
    def copies(self) -> tuple[tuple[SourceId, ...], ...]:
        """Sets of near copies, in each the one first that stands for them."""
        found = []
        for source in np.unique(self.stands_for):
            others = (self.stands_for == source) & (np.arange(len(self.ids)) != source)
            if others.any():
                found.append((self.ids[source], *self.names(others)))
        return tuple(found)


def select_sources(
    data: Sources,
    ids: Sequence[SourceId],
    labels: Sequence[Any],
    groups: Sequence[Any],
    distances: Distances,
    options: DistanceOptions,
    *,
    k: int,
    stands_for: NDArray[Any],
    count_copies_once: bool = False,
    always_keep: Sequence[SourceId] = (),
    keep_unsuspicious: bool = False,
    alpha: float = 0.05,
    permutations: int = 0,
    random: RandomState,
) -> Selection:
    """Score the sources, keep the K of smallest score, and test them; see :class:`groundwire_flea.FLEASelector`."""
    counted = stands_for == np.arange(data.n) if count_copies_once else np.ones(data.n, dtype=bool)
    counts_as = stands_for if count_copies_once else None
    total = distances.total(options.aggregation)
    q = q_scores(total, k, counts_as)
    vouched = np.isin(np.arange(data.n), [ids.index(source) for source in always_keep])
    eligible = np.where(counted, q, np.inf)
    kept = select(eligible, k, np.flatnonzero(vouched).tolist())
    significance = permutation_test(data, options, select(eligible, k), permutations, random, counts_as)
    if keep_unsuspicious and significance is not None:
        kept = kept | (counted & (significance.p > alpha))
    bound = lower_bound(data, k, options.fairness, counts_as)
    return Selection(
        data, ids, labels, groups, distances, total, q, kept, k, vouched, stands_for, counted, significance, bound
    )


def clean_count(n_clean: Any, n: int) -> int:
    """K, the number of sources assumed clean, of ``n``.

    Args:
        n_clean: An int in 1..n; a float in (0, 1] meaning ``ceil(n_clean * n)``; None for ``n // 2 + 1``.
        n: Number of sources.

    Raises:
        TypeError: ``n_clean`` is a bool, or no number.
        ValueError: It is out of its range.

    Example:
        >>> clean_count(None, 5), clean_count(0.6, 5), clean_count(4, 5)
        (3, 3, 4)
    """
    check_n_clean(n_clean)
    if n_clean is None:
        return n // 2 + 1
    if isinstance(n_clean, Integral):
        if int(n_clean) > n:
            raise ValueError(f"n_clean={n_clean} is outside 1..{n}, the number of sources -> choose more than {n // 2}")
        return int(n_clean)
    # 0.6 * 5 is a little more than 3 in floating point, and must still mean 3.
    return max(1, math.ceil(round(float(n_clean) * n, 9)))


def check_n_clean(n_clean: Any) -> None:
    """Refuse what no number of sources could make right; see :func:`clean_count`.

    Raises:
        TypeError: ``n_clean`` is a bool, or no number.
        ValueError: It is an int below 1, or a fraction outside (0, 1].

    Example:
        >>> check_n_clean(4)
    """
    if n_clean is None:
        return
    if isinstance(n_clean, bool | np.bool_) or not isinstance(n_clean, Real):
        raise TypeError(f"n_clean must be an int, a float or None, got {n_clean!r} -> say how many sources are clean")
    if isinstance(n_clean, Integral):
        if int(n_clean) < 1:
            raise ValueError(f"n_clean={n_clean} is not positive -> choose more than half of the number of sources")
    elif not 0 < float(n_clean) <= 1:
        raise ValueError(f"n_clean={n_clean} is a fraction outside (0, 1] -> use an int for a number of sources")


def select(q: NDArray[Any], k: int, always: Sequence[int] = ()) -> NDArray[Any]:
    """Keep K sources of smallest score: bool (n,). Of equal scores the earlier ones; ``always`` come first.

    Example:
        >>> select(np.array([0.2, 0.9, 0.2, 0.2]), 2)
        array([ True, False,  True, False])
    """
    kept = np.zeros(len(q), dtype=bool)
    kept[list(always)] = True
    for index in np.argsort(q, kind="stable"):
        if kept.sum() >= k:
            break
        kept[index] = True
    return kept


def source_weights(q: NDArray[Any], kept: NDArray[Any], counted: NDArray[Any]) -> NDArray[Any]:
    """Sampling weights: 1 for kept sources; for others ``exp(1 - q / q_kept)``, where q_kept is the largest kept score.

    0 for copies of sources that count for them. No guarantee.

    Example:
        >>> kept, counted = np.array([True, True, False, False]), np.array([True, True, True, False])
        >>> source_weights(np.array([0.1, 0.2, 0.4, 0.1]), kept, counted).round(3)
        array([1.   , 1.   , 0.368, 0.   ])
    """
    scale = max(float(q[kept].max()), 1e-12)
    weights: NDArray[Any] = np.where(kept, 1.0, counted * np.exp(np.minimum(0, 1 - q / scale)))
    return weights
