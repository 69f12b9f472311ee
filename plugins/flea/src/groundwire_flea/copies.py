"""Copies among sources: the same rows, or nearly the same, under several names.

Copies are closer to each other than honest sources ever are, so a source that is delivered three times displaces
honest ones, and seven copies of a manipulated source outvote four honest ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import cdist
from scipy.stats import binom, chi2, chi2_contingency

from groundwire_flea.distances.sources import Sources

#: How seldom two independent sources may be taken for copies.
LEVEL = 1e-6
#: Share of the rows that copies have in common, at least about.
COMMON = 2 / 3
#: Rows of a source whose nearest neighbours are looked at.
SAMPLE = 50
#: Distance between rows of different labels or groups, in standard deviations of the columns: no neighbours.
FAR = 1e3


def first_copies(data: Sources) -> NDArray[Any]:
    """(n,) the first source of which each source is a near copy; its own number if it is none.

    Two sources are near copies if at least about two thirds of their rows are the same, or lie nearer to a row of the
    other source than to any row of their own. Both are compared with what happens by chance between independent
    sources of the same distribution, where values may repeat often.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(60, 3))
        >>> rows = np.concatenate([x, x[:30]])
        >>> first_copies(Sources(rows, np.zeros(90), np.zeros(90), np.array([30, 30, 30]), 2, 2))
        array([0, 1, 0])
    """
    _, group = connected_components(same_rows(data) | nearest_in_each_other(data), directed=False)
    _, first, member = np.unique(group, return_index=True, return_inverse=True)
    result: NDArray[Any] = first[member]
    return result


def representatives(first: NDArray[Any], preferred: Sequence[int]) -> NDArray[Any]:
    """(n,) the source that each source stands for: the first of its near copies, or the first preferred one.

    Example:
        >>> representatives(np.array([0, 1, 0, 1]), [2])
        array([2, 1, 2, 1])
    """
    result = first.copy()
    for source in reversed(preferred):
        result[first == first[source]] = source
    return result


def same_rows(data: Sources) -> NDArray[Any]:
    """(n, n) bool: two sources have each row (to a thousandth of a standard deviation) more equally often than chance.

    The test of homogeneity of two samples, at its lower end: with independent sources the statistic is about its
    degrees of freedom, with copies 0.
    """
    rows = np.column_stack([np.round(data.x, 3), data.y, data.a]) + 0.0  # one zero only
    # A hash of the numbers' bits: unique() of whole rows takes as long as the distances.
    factors = np.random.default_rng(0).integers(1, 2**62, rows.shape[1])
    _, row = np.unique(rows.view(np.int64) @ factors, return_inverse=True)
    counts = csr_array((np.ones(len(row)), (data.source, row)))
    present = counts.minimum(1)
    different = present.sum(axis=1)
    common = (present @ present.T).toarray()
    found = np.zeros((data.n, data.n), dtype=bool)
    for i, j in np.argwhere(np.triu(common >= np.minimum.outer(different, different) / 2, k=1)):
        pair = counts[[i, j]].toarray()
        pair = pair[:, pair.sum(axis=0) > 0]
        if pair.shape[1] > 1:
            test = chi2_contingency(pair, correction=False)
            found[i, j] = (
                test.statistic <= (1 - COMMON) * 1.5 * test.dof and chi2.cdf(test.statistic, test.dof) <= LEVEL
            )
    result: NDArray[Any] = found | found.T
    return result


def nearest_in_each_other(data: Sources) -> NDArray[Any]:
    """(n, n) bool: rows of each of two sources have their nearest neighbour in the other one, not in their own.

    Between independent sources of one distribution and one size that is so for half of the rows. Rows whose neighbours
    in both are equally near (values that repeat) tell nothing.
    """
    z = np.column_stack([data.x, FAR * data.y, FAR * data.a])
    nearer, told = np.zeros((2, data.n, data.n))
    for i in range(data.n):
        rows = data.starts[i] + np.unique(np.linspace(0, data.sizes[i] - 1, SAMPLE).astype(int))
        distance = cdist(z[rows], z)
        distance[np.arange(len(rows)), rows] = np.inf
        nearest = np.minimum.reduceat(distance, data.starts, axis=1)
        own = nearest[:, [i]]
        nearer[i], told[i] = (nearest < own).sum(axis=0), (nearest != own).sum(axis=0)
    chance = data.sizes[None] / (data.sizes[:, None] + data.sizes[None] - 1)
    surprising = binom.sf(nearer - 1, told, np.minimum(chance, 1)) <= LEVEL
    one_way = surprising & (nearer >= (COMMON + (1 - COMMON) / 2) * told)
    result: NDArray[Any] = one_way & one_way.T
    return result
