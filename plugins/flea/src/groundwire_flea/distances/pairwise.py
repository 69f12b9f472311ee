r"""Discrepancy, disparity and disbalance of all pairs of sources, many pairs at a time.

For two sources S and T, with f over linear classifiers, R the 0/1 error and Gamma the unfairness,

.. math::
    disc(S, T) = \max_f |R_S(f) - R_T(f)|, \quad
    disp(S, T) = \max_f |\Gamma_S(f) - \Gamma_T(f)|, \quad
    disb(S, T) = TV(a_S, a_T)

The distance is D = disc + disp + disb. The score q of a source is its K-th smallest distance, its own distance 0
included, where K sources are assumed clean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import joblib
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from groundwire_flea.distances.pair_batches import PaddedSources, PairBatch, pair_batches
from groundwire_flea.distances.parallel import one_thread, run_jobs
from groundwire_flea.distances.reference import reference_discrepancies, reference_disparities
from groundwire_flea.distances.solver import Objective, minimize
from groundwire_flea.distances.sources import Sources

#: The three parts of the distance, in the order of the paper.
COMPONENTS = ("disc", "disp", "disb")


@dataclass(frozen=True)
class DistanceOptions:
    """Options of the computation; see :class:`groundwire_flea.FLEASelector` for each."""

    fairness: str = "demographic_parity"
    components: tuple[str, ...] = COMPONENTS
    aggregation: str = "sum"
    compat: str | None = None
    device: str = "cpu"
    n_jobs: int | None = None
    progress: bool = False


@dataclass(frozen=True)
class Split:
    """Rows (R,) that classifiers are fitted on, and rows that they are judged on."""

    train: NDArray[Any]
    test: NDArray[Any]


@dataclass(frozen=True)
class Distances:
    """The three distances between all sources, each (n, n) and symmetric; 0 where a component was left out."""

    disc: NDArray[Any]
    disp: NDArray[Any]
    disb: NDArray[Any]

    def total(self, aggregation: str = "sum") -> NDArray[Any]:
        """D."""
        return total_distance(self.disc, self.disp, self.disb, aggregation)


def total_distance(
    disc: NDArray[Any], disp: NDArray[Any], disb: NDArray[Any], aggregation: str = "sum"
) -> NDArray[Any]:
    """D from its three parts, each (n, n): their sum (the paper), or their maximum.

    Example:
        >>> total_distance(np.array(0.1), np.array(0.25), np.array(0.5)).item()
        0.85
    """
    parts = np.stack([disc, disp, disb])
    total: NDArray[Any] = parts.sum(0) if aggregation == "sum" else parts.max(0)
    return total


def q_scores(distances: NDArray[Any], k: int, stands_for: NDArray[Any] | None = None) -> NDArray[Any]:
    """The K-th smallest entry of each row of D (n, n), the zero on the diagonal included.

    Args:
        distances: D.
        k: K.
        stands_for: (n,) the source that each source counts as; sources that count as one count once. Each for itself
            when left out.

    Example:
        >>> distances = np.array([[0, 1, 5], [1, 0, 6], [5, 6, 0]])
        >>> q_scores(distances, 2)
        array([1, 1, 5])
        >>> q_scores(distances, 2, np.array([0, 0, 2]))
        array([5, 6, 5])
    """
    if stands_for is not None:
        counted, own = np.unique(stands_for, return_inverse=True)
        distances = distances[:, counted]
        distances[np.arange(len(own)), own] = 0
    ordered: NDArray[Any] = np.sort(distances, axis=1)
    return ordered[:, k - 1]


def disbalance(cells: NDArray[Any]) -> NDArray[Any]:
    """Total variation distance between the cell frequencies of each two sources.

    With two groups and demographic parity this is the published |P_S(a=1) - P_T(a=1)|.

    Args:
        cells: (n, c), frequencies of the c cells (groups; or groups within labels) in each source, rows sum to 1.

    Example:
        >>> disbalance(np.array([[0.5, 0.5], [0.75, 0.25]]))
        array([[0.  , 0.25],
               [0.25, 0.  ]])
    """
    result: NDArray[Any] = np.abs(cells[:, None] - cells[None]).sum(-1) / 2
    return result


def cell_frequencies(data: Sources, fairness: str) -> NDArray[Any]:
    """(n, c), frequencies of the groups within each condition, and of the rest: what the disbalance compares."""
    cells = [
        data.frequency(mask & (data.a == group)) for mask in data.conditions(fairness) for group in range(data.groups)
    ]
    return np.stack([*cells, 1 - np.sum(cells, axis=0)], axis=1)


def distances(data: Sources, options: DistanceOptions, known: Distances | None = None) -> Distances:
    """All three distances, in-sample, as published.

    Args:
        data: The rows.
        options: How.
        known: The distances of the first sources, which are not computed again.
    """
    old = 0 if known is None else len(known.disc)
    everything = np.ones(len(data.y), dtype=bool)
    disc, disp = pairwise(data, options, [Split(everything, everything)], signed=False, first_new=old)
    if known is not None:
        disc[:old, :old], disp[:old, :old] = known.disc, known.disp
    disb = disbalance(cell_frequencies(data, options.fairness))
    return Distances(disc, disp, disb * ("disb" in options.components))


def pairwise(
    data: Sources, options: DistanceOptions, splits: Sequence[Split], *, signed: bool, first_new: int = 0
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Discrepancy and disparity (n, n), averaged over ``splits``.

    With ``signed``, what a classifier was fitted to find counts with its sign, and a negative mean as 0: a test on
    other rows has no bias upwards. Without, its absolute value counts, as published.
    """
    n = data.n
    pairs = np.array([(i, j) for i in range(n) for j in range(i + 1, n) if j >= first_new]).reshape(-1, 2)
    batches = list(pair_batches(data.sizes, pairs))
    jobs = [joblib.delayed(_distances_of_pairs)(data, batch, options, tuple(splits), signed) for batch in batches]
    found = np.zeros((2, n, n))
    for batch, values in zip(batches, run_jobs(jobs, options.n_jobs, options.progress), strict=True):
        found[:, batch[:, 0], batch[:, 1]] = found[:, batch[:, 1], batch[:, 0]] = values
    return found[0], found[1]


def _distances_of_pairs(
    data: Sources, pairs: NDArray[Any], options: DistanceOptions, splits: Sequence[Split], signed: bool
) -> NDArray[Any]:
    """Discrepancy and disparity of some pairs: (2, P)."""
    padded = PaddedSources(data, options.device)
    both = np.concatenate([pairs, pairs[:, ::-1]])
    published = options.compat == "reference"
    values = np.zeros((2, len(pairs)))
    with one_thread(), torch.inference_mode():
        if "disc" in options.components:
            if published:
                found = reference_discrepancies(data, pairs)
            else:
                found = np.mean([discrepancies(padded, pairs, split, signed) for split in splits], axis=0)
            values[0] = np.maximum(found, 0) if signed else found
        if "disp" in options.components:
            if published:
                found = reference_disparities(data, both)
            else:
                parts = [disparities(padded, both, options.fairness, split, signed) for split in splits]
                found = np.mean(parts, axis=0)
            values[1] = np.maximum(found.reshape(2, -1).max(0), 0 if signed else -np.inf)
    return values


def discrepancies(padded: PaddedSources, pairs: NDArray[Any], split: Split, signed: bool) -> NDArray[Any]:
    """Disc of each pair (P,): the error difference of a classifier that is right on one source and wrong on the other.

    With more than two labels, the largest over one label against the rest.
    """
    data, batch = padded.data, padded.batch(pairs)
    weights, second = batch.values(data.mean_weights(split.train)), batch.on_device(batch.second)
    signs = batch.values(data.mean_weights(split.test)) * (2 * second.double() - 1)
    values = []
    for label in range(1 if data.classes == 2 else 0, data.classes):
        y = batch.values(data.y == label)
        t = torch.where(second, 1 - y, y)
        zero = torch.zeros(len(t), batch.width, dtype=t.dtype, device=t.device)
        objective = Objective(batch.designs, t, weights, torch.zeros_like(t), zero)
        scores = torch.cat(objective.scores(minimize(objective, zero, patience=1)), dim=1)
        values.append((((scores >= 0) != y.bool()) * signs).sum(-1))
    return _largest(values, signed)


def disparities(padded: PaddedSources, pairs: NDArray[Any], fairness: str, split: Split, signed: bool) -> NDArray[Any]:
    """Disp of each ordered pair (P,): how much more unfair a classifier is on the first source, when made to be so.

    With more than two groups, the largest over classifiers that tell one group from the rest; with several conditions
    (equalized odds), the largest over them.
    """
    data, batch = padded.data, padded.batch(pairs)
    values = []
    for condition in data.conditions(fairness):
        for group in range(1 if data.groups == 2 else data.groups):
            z = data.a == group
            train = condition & split.train
            inside, outside = data.mean_weights(train & z), data.mean_weights(train & ~z)
            u, v = batch.of_first((inside + outside) / 2), batch.of_second(inside - outside)
            start = _disparity_start(padded, pairs, z, train)
            objective = Objective(batch.designs, batch.values(z), u, v, torch.zeros_like(start))
            scores = torch.cat(objective.scores(minimize(objective, start)), dim=1)
            values.append(_gap_difference(data, batch, scores >= 0, condition & split.test))
    return _largest(values, signed)


def _largest(values: list[Tensor], signed: bool) -> NDArray[Any]:
    stacked = torch.stack(values).cpu().numpy()
    result: NDArray[Any] = (stacked if signed else np.abs(stacked)).max(0)
    return result


def _gap_difference(data: Sources, batch: PairBatch, predicted: Tensor, mask: NDArray[Any]) -> Tensor:
    """Gamma of the predictions on the first source minus Gamma on the second (P,): gaps between positive rates."""
    weights = [batch.values(data.mean_weights(mask & (data.a == group))) for group in range(data.groups)]
    gaps = []
    for of_source in (batch.on_device(~batch.second), batch.on_device(batch.second)):
        rates = torch.stack([(predicted * of_source * weight).sum(-1) for weight in weights])
        gaps.append(rates.amax(0) - rates.amin(0))
    return gaps[0] - gaps[1]


def _disparity_start(padded: PaddedSources, pairs: NDArray[Any], z: NDArray[Any], train: NDArray[Any]) -> Tensor:
    """The first source's own L2 logistic regression of the group, C = 1, where a disparity begins (P, d+1).

    The penalty is on standardised columns. It depends on the first source alone, so it is fitted once for each.
    """
    sources, which = np.unique(pairs[:, 0], return_inverse=True)
    batch = padded.batch(sources[:, None])
    t, weights = batch.values(z), batch.values(train)
    ridge = torch.zeros(len(sources), batch.width, dtype=t.dtype, device=t.device)
    ridge[:, :-1] = torch.from_numpy(_variances(padded.data)[sources]).to(t.device)
    objective = Objective(batch.designs, t, weights, torch.zeros_like(t), ridge)
    theta = minimize(objective, torch.zeros_like(ridge), patience=1)
    return theta[torch.from_numpy(which).to(t.device)]


def _variances(data: Sources) -> NDArray[Any]:
    """(n, d), of the columns within each source; 1 for a constant column."""
    sums = np.add.reduceat(data.x, data.starts) / data.sizes[:, None]
    squares = np.add.reduceat(data.x**2, data.starts) / data.sizes[:, None]
    variance = squares - sums**2
    # Below the rounding error of the subtraction.
    result: NDArray[Any] = np.where(variance <= 1e-12 * (1 + sums**2), 1.0, variance)
    return result
