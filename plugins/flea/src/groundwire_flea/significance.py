"""Significance of scores: cross-fitted ones, and how often chance alone gives scores as large."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.random import RandomState
from numpy.typing import NDArray
from rich.progress import track

from groundwire_flea.distances.pairwise import (
    DistanceOptions,
    Distances,
    Split,
    cell_frequencies,
    disbalance,
    pairwise,
    q_scores,
)
from groundwire_flea.distances.sources import Sources


@dataclass(frozen=True)
class Significance:
    """Result of a permutation test.

    Attributes:
        q: (n,) cross-fitted scores; near 0 for sources of one distribution, unlike the in-sample scores.
        p: (n,) share of permuted scores at least as large.
        spread: Standard deviation of the permuted scores.
    """

    q: NDArray[Any]
    p: NDArray[Any]
    spread: float


def permutation_test(
    data: Sources,
    options: DistanceOptions,
    kept: NDArray[Any],
    permutations: int,
    random: RandomState,
    stands_for: NDArray[Any] | None = None,
) -> Significance | None:
    """Test every source against "it is like the K kept ones"; None without permutations.

    Rows change places between the K kept sources (bool (n,)) at random. The p-value of a source is the share of all
    scores that come out that are at least as large as its own, its own counted. Among K sources the score is the
    distance to the farthest one, as it is for a clean source when all others are manipulated: where more sources are
    clean, the test is careful not to accuse. For ``stands_for`` see
    :func:`groundwire_flea.distances.pairwise.q_scores`; no two of the K kept sources stand for the same one.
    """
    if not permutations:
        return None
    k, trusted = int(kept.sum()), data.only(np.flatnonzero(kept))
    q = crossfitted_scores(data, options, k, random, stands_for)
    steps = range(permutations)
    null = [
        crossfitted_scores(trusted.permuted(random.permutation(len(trusted.y))), options, k, random)
        for _ in (track(steps, "Permuting sources", transient=True) if options.progress else steps)
    ]
    values = np.concatenate(null)
    p = (1 + (values[None] >= q[:, None] - 1e-12).sum(1)) / (1 + len(values))
    return Significance(q, p, float(values.std()))


def crossfitted_scores(
    data: Sources,
    options: DistanceOptions,
    k: int,
    random: RandomState,
    stands_for: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """(n,) scores from classifiers fitted on one half of the rows and judged on the other, both ways."""
    fold = halves(data, random)
    splits = [Split(fold == half, fold != half) for half in (0, 1)]
    disc, disp = pairwise(data, replace(options, compat=None, progress=False), splits, signed=True)
    disb = disbalance(cell_frequencies(data, options.fairness)) * ("disb" in options.components)
    return q_scores(Distances(disc, disp, disb).total(options.aggregation), k, stands_for)


def halves(data: Sources, random: RandomState) -> NDArray[Any]:
    """(R,) 0 or 1: half of the rows of each cell of source, label and group, at random."""
    shuffled = pd.Series(random.permutation(len(data.y)))
    rank = shuffled.groupby([data.source, data.y, data.a]).rank().to_numpy().astype(int)
    result: NDArray[Any] = rank % 2
    return result


def check_power(alpha: float, permutations: int, k: int) -> None:
    """Refuse a test that could never find a source suspicious: it would keep every manipulated one.

    Raises:
        ValueError: The smallest p-value that ``permutations`` of ``k`` sources can give is above ``alpha``.

    Example:
        >>> check_power(0.05, 20, 3)
    """
    least = 1 / (1 + permutations * k)
    if least > alpha:
        raise ValueError(
            f"keep_unsuspicious=True with permutations={permutations}: {k} sources then give p-values of at least "
            f"{least:.3f}, so nothing is ever suspicious at alpha={alpha:g} -> use permutations >= "
            f"{math.ceil((1 / alpha - 1) / k)}"
        )
