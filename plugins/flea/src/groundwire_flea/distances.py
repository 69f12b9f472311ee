"""Discrepancy, disparity and disbalance of all pairs of sources, many pairs at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import joblib
import numpy as np
import torch
from torch import Tensor

from groundwire_flea.functional import COMPONENTS, Array, disbalance, total_distance
from groundwire_flea.minimise import LBFGS, Problems, minimise
from groundwire_flea.rows import Block, Rows, block_of, blocks

Fairness = Literal["demographic_parity", "equal_opportunity", "equalized_odds"]
FAIRNESS = ("demographic_parity", "equal_opportunity", "equalized_odds")
#: Beyond so many columns the Hessians cost more than the steps that they save.
NEWTON_COLUMNS = 30


@dataclass(frozen=True)
class Settings:
    """What distances are computed with; see :func:`groundwire_flea.filter_sources`."""

    fairness: str = "demographic_parity"
    components: tuple[str, ...] = COMPONENTS
    aggregation: str = "sum"
    compat: str | None = None
    device: str = "cpu"
    n_jobs: int | None = None
    progress: bool = False


@dataclass(frozen=True)
class Distances:
    """The three distances between all sources, each (n, n) and symmetric; 0 where a component was left out."""

    disc: Array
    disp: Array
    disb: Array

    def total(self, aggregation: str = "sum") -> Array:
        """D."""
        return total_distance(self.disc, self.disp, self.disb, aggregation)


@dataclass(frozen=True)
class Split:
    """Which rows (R,) classifiers are fitted on, and which they are judged on."""

    fit: Array
    test: Array


def conditions(rows: Rows, fairness: str) -> list[Array]:
    """The rows (R,) within which groups are compared: all; those of the positive label; those of each label."""
    if fairness == "demographic_parity":
        return [np.ones(len(rows.y), dtype=bool)]
    labels = [rows.positive] if fairness == "equal_opportunity" else range(rows.classes)
    return [rows.y == label for label in labels]


def cell_frequencies(rows: Rows, fairness: str) -> Array:
    """(n, c), what the disbalance compares: frequencies of the groups within each condition, and of the rest."""
    cells = [
        rows.frequency(mask & (rows.a == group)) for mask in conditions(rows, fairness) for group in range(rows.groups)
    ]
    return np.stack([*cells, 1 - np.sum(cells, axis=0)], axis=1)


def distances(rows: Rows, settings: Settings, known: Distances | None = None) -> Distances:
    """All three, in-sample, as published.

    Args:
        rows: The data.
        settings: How.
        known: The distances of the first sources, which are not computed again.
    """
    old = 0 if known is None else len(known.disc)
    everything = np.ones(len(rows.y), dtype=bool)
    split = Split(everything, everything)
    disc, disp = pairwise(rows, settings, [split], signed=False, first_new=old)
    if known is not None:
        disc[:old, :old], disp[:old, :old] = known.disc, known.disp
    disb = disbalance(cell_frequencies(rows, settings.fairness))
    return Distances(disc, disp, disb * ("disb" in settings.components))


def pairwise(
    rows: Rows, settings: Settings, splits: Sequence[Split], *, signed: bool, first_new: int = 0
) -> tuple[Array, Array]:
    """Discrepancy and disparity, averaged over ``splits``.

    With ``signed``, what a classifier was fitted to find counts with its sign, and a negative mean as 0: a test on
    other rows has no bias upwards. Without, its absolute value counts, as published.
    """
    n = rows.n
    unordered = np.array([(i, j) for i in range(n) for j in range(i + 1, n) if j >= first_new]).reshape(-1, 2)
    ordered = np.concatenate([unordered, unordered[:, ::-1]])
    work: list[tuple[Any, ...]] = []
    if "disc" in settings.components:
        work += [(discrepancies, part) for part in blocks(rows.sizes, unordered, rows.x.shape[1])]
    if "disp" in settings.components:
        work += [(disparities, part) for part in blocks(rows.sizes, ordered, rows.x.shape[1])]
    jobs = [joblib.delayed(_solve)(kind, rows, part, settings, tuple(splits), signed) for kind, part in work]
    found = {"discrepancies": np.zeros((n, n)), "disparities": np.zeros((n, n))}
    for (kind, part), values in zip(work, _run(jobs, settings), strict=True):
        found[kind.__name__][part[:, 0], part[:, 1]] = values
    disc, disp = found.values()
    return np.maximum(disc, disc.T), np.maximum(disp, disp.T)


def _run(jobs: list[Any], settings: Settings) -> Iterable[Array]:
    """The jobs' results in order, wherever joblib is configured to run them."""
    if len(jobs) == 1:
        return [function(*args, **kwargs) for function, args, kwargs in jobs]
    parallel = joblib.Parallel(n_jobs=settings.n_jobs)
    if not settings.progress:
        results: list[Array] = parallel(jobs)
        return results
    from rich.progress import track

    parallel = joblib.Parallel(n_jobs=settings.n_jobs, return_as="generator")
    return track(parallel(jobs), "Comparing sources", total=len(jobs), transient=True)


def _solve(kind: Any, rows: Rows, pairs: Array, settings: Settings, splits: Sequence[Split], signed: bool) -> Array:
    if settings.compat == "reference":
        from groundwire_flea import reference

        kind = getattr(reference, kind.__name__)
    with one_thread():
        values = np.mean([kind(rows, pairs, settings, split, signed) for split in splits], axis=0)
    result: Array = np.maximum(values, 0) if signed else values
    return result


@contextmanager
def one_thread() -> Iterator[None]:
    """Small matrices are solved several times faster by one thread than by two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def discrepancies(rows: Rows, pairs: Array, settings: Settings, split: Split, signed: bool) -> Array:
    """disc of each pair (P,): the error difference of a classifier that is right on one source and wrong on the other.

    With more than two labels, the largest over one label against the rest.
    """
    block = block_of(rows, pairs, settings.device)
    weights, test = rows.mean_weights(split.fit), rows.mean_weights(split.test)
    values = []
    for label in range(1 if rows.classes == 2 else 0, rows.classes):
        y = block.values(rows.y == label)
        t = torch.where(block.second, 1 - y, y)
        theta = _fit(block, t, block.values(weights), torch.zeros_like(t), None, patience=1)
        predicted = torch.bmm(block.x, theta.unsqueeze(-1)).squeeze(-1) >= 0
        wrong = (predicted != y.bool()).double()
        errors = [(wrong * part).sum(-1) for part in (block.of_second(test), block.of_first(test))]
        values.append(errors[0] - errors[1])
    return _numbers(values, signed)


def disparities(rows: Rows, pairs: Array, settings: Settings, split: Split, signed: bool) -> Array:
    """disp of each ordered pair (P,): the difference in unfairness of a classifier made unfair on the first source only.

    With more than two groups, the largest over classifiers that tell one group from the rest; with several conditions
    (equalized odds), the largest over them.
    """
    block = block_of(rows, pairs, settings.device)
    values = []
    for condition in conditions(rows, settings.fairness):
        for group in range(1 if rows.groups == 2 else rows.groups):
            z = rows.a == group
            fit = condition & split.fit
            inside, outside = rows.mean_weights(fit & z), rows.mean_weights(fit & ~z)
            t = block.values(z)
            start = _starts(rows, pairs, block, z, fit)
            theta = _fit(block, t, block.of_first((inside + outside) / 2), block.of_second(inside - outside), start)
            predicted = (torch.bmm(block.x, theta.unsqueeze(-1)).squeeze(-1) >= 0).double()
            judged = condition & split.test
            gaps = [_gap(rows, block, predicted, judged, side) for side in (~block.second, block.second)]
            values.append(gaps[0] - gaps[1])
    return _numbers(values, signed)


def _numbers(values: list[Tensor], signed: bool) -> Array:
    stacked = torch.stack(values).cpu().numpy()
    result: Array = (stacked if signed else np.abs(stacked)).max(0)
    return result


def _gap(rows: Rows, block: Block, predicted: Tensor, mask: Array, side: Tensor) -> Tensor:
    """Gamma of hard predictions on one side of each pair (P,): the largest difference of positive rates."""
    rates = []
    for group in range(rows.groups):
        weights = block.values(rows.mean_weights(mask & (rows.a == group)))
        rates.append((predicted * weights * side).sum(-1))
    stacked = torch.stack(rates)
    return stacked.amax(0) - stacked.amin(0)


def _fit(block: Block, t: Tensor, u: Tensor, v: Tensor, start: Tensor | None, patience: int = 3) -> Tensor:
    width = block.x.shape[-1]
    ridge = torch.zeros(len(t), width, dtype=t.dtype, device=t.device)
    curvature = None if width <= NEWTON_COLUMNS + 1 else LBFGS
    problems = Problems(block.x, t, u, v, ridge)
    return minimise(problems, ridge if start is None else start, curvature=curvature, patience=patience)


def _starts(rows: Rows, pairs: Array, block: Block, z: Array, fit: Array) -> Tensor:
    """Where the disparity begins (P, d+1): the first source's own L2 logistic regression of the group, C = 1."""
    sources, which = np.unique(pairs[:, 0], return_inverse=True)
    own = block_of(rows, np.stack([sources, sources], axis=1), str(block.x.device))
    rows_used = own.of_first(fit.astype(float))
    ridge = torch.ones(len(sources), own.x.shape[-1], dtype=own.x.dtype, device=own.x.device)
    ridge[:, -1] = 0
    problems = Problems(own.x, own.values(z), rows_used, torch.zeros_like(rows_used), ridge)
    theta = minimise(problems, torch.zeros_like(ridge), patience=1)[torch.from_numpy(which).to(own.x.device)]
    raw = theta[:, :-1] / own.scale[which]
    offset = theta[:, -1] - (raw * own.shift[which]).sum(-1)
    return torch.cat([raw * block.scale, (offset + (raw * block.shift).sum(-1)).unsqueeze(-1)], dim=1)
