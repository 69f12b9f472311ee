"""Cross-fitted scores, and how often chance alone gives scores as large."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from groundwire_flea.distances import Distances, cell_frequencies, pairwise
from groundwire_flea.functional import Array, disbalance, q_scores
from groundwire_flea.rows import Rows
from groundwire_flea.settings import Settings, Split

if TYPE_CHECKING:
    from numpy.random import RandomState


@dataclass(frozen=True)
class Significance:
    """What a permutation test says.

    Attributes:
        q: (n,) cross-fitted scores; near 0 for sources of one distribution, unlike the in-sample scores.
        p: (n,) share of permuted scores at least as large.
        spread: Standard deviation of the permuted scores.
    """

    q: Array
    p: Array
    spread: float


def folds(rows: Rows, random: RandomState) -> Array:
    """(R,) 0 or 1: half of the rows of each cell of source, label and group, at random."""
    shuffled = pd.Series(random.permutation(len(rows.y)))
    rank = shuffled.groupby([rows.source, rows.y, rows.a]).rank().to_numpy().astype(int)
    result: Array = rank % 2
    return result


def crossfitted(rows: Rows, settings: Settings, k: int, random: RandomState) -> Array:
    """(n,) scores from classifiers fitted on one half of the rows and judged on the other, both ways."""
    fold = folds(rows, random)
    splits = [Split(fold == half, fold != half) for half in (0, 1)]
    fast = replace(settings, compat=None, progress=False)
    disc, disp = pairwise(rows, fast, splits, signed=True)
    disb = disbalance(cell_frequencies(rows, settings.fairness)) * ("disb" in settings.components)
    return q_scores(Distances(disc, disp, disb).total(settings.aggregation), k)


def significance(
    rows: Rows, settings: Settings, kept: Array, permutations: int, random: RandomState
) -> Significance | None:
    """A permutation test of every source against "it is like the K kept ones"; None without permutations.

    Rows change places between the K kept sources (bool (n,)) at random. The p-value of a source is the share of all
    scores that come out that are at least as large as its own, its own counted. Among K sources the score is the
    distance to the farthest one, as it is for a clean source when all others are manipulated: where more sources are
    clean, the test is careful not to accuse.
    """
    if not permutations:
        return None
    k, trusted = int(kept.sum()), rows.only(np.flatnonzero(kept))
    q = crossfitted(rows, settings, k, random)
    null = [crossfitted(_shuffled(trusted, random), settings, k, random) for _ in _steps(permutations, settings)]
    values = np.concatenate(null)
    p = (1 + (values[None] >= q[:, None] - 1e-12).sum(1)) / (1 + len(values))
    return Significance(q, p, float(values.std()))


def _shuffled(rows: Rows, random: RandomState) -> Rows:
    return rows.permuted(random.permutation(len(rows.y)))


def _steps(permutations: int, settings: Settings) -> Any:
    if not settings.progress:
        return range(permutations)
    from rich.progress import track

    return track(range(permutations), "Permuting sources", transient=True)
