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

from groundwire_flea.curvature import LBFGS
from groundwire_flea.functional import COMPONENTS, Array, disbalance, total_distance
from groundwire_flea.minimise import minimise
from groundwire_flea.problems import Problems
from groundwire_flea.rows import Banks, Block, Rows, blocks

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
    pairs = np.array([(i, j) for i in range(n) for j in range(i + 1, n) if j >= first_new]).reshape(-1, 2)
    work = list(blocks(rows.sizes, pairs))
    jobs = [joblib.delayed(_solve)(rows, part, settings, tuple(splits), signed) for part in work]
    found = np.zeros((2, n, n))
    for part, values in zip(work, _run(jobs, settings), strict=True):
        found[:, part[:, 0], part[:, 1]] = found[:, part[:, 1], part[:, 0]] = values
    return found[0], found[1]


def _run(jobs: list[Any], settings: Settings) -> Iterable[Array]:
    """The jobs' results in order, wherever joblib is configured to run them."""
    if len(jobs) == 1:
        return [function(*args, **kwargs) for function, args, kwargs in jobs]
    results: Iterable[Array] = joblib.Parallel(_workers(settings.n_jobs), return_as=_order(settings.progress))(jobs)
    if not settings.progress:
        return results
    from rich.progress import track

    return track(results, "Comparing sources", total=len(jobs), transient=True)


def _workers(n_jobs: int | None) -> int | None:
    """Joblib's ``n_jobs``; an engine that is not joblib's own (Ray) gets all its workers where nobody said how many.

    It would otherwise get one, for which joblib does not use it at all.
    """
    engine, said = joblib.parallel.get_active_backend()
    own = type(engine).__module__.startswith("joblib.")
    return -1 if n_jobs is None and said is None and not own else n_jobs


def _order(progress: bool) -> str:
    """Results one by one where a progress bar wants them and the engine (not Ray) can give them so."""
    engine, _ = joblib.parallel.get_active_backend()
    return "generator" if progress and engine.supports_return_generator else "list"


def _solve(rows: Rows, pairs: Array, settings: Settings, splits: Sequence[Split], signed: bool) -> Array:
    """Both distances of some pairs: (2, P)."""
    from groundwire_flea import reference

    banks = Banks(rows, settings.device)
    batched, single = (discrepancies, disparities), (reference.discrepancies, reference.disparities)
    disc, disp = single if settings.compat == "reference" else batched
    values = np.zeros((2, len(pairs)))
    both = np.concatenate([pairs, pairs[:, ::-1]])
    with one_thread(), torch.inference_mode():
        if "disc" in settings.components:
            found = np.mean([disc(banks, pairs, settings, split, signed) for split in splits], axis=0)
            values[0] = np.maximum(found, 0) if signed else found
        if "disp" in settings.components:
            found = np.mean([disp(banks, both, settings, split, signed) for split in splits], axis=0)
            values[1] = np.maximum(found.reshape(2, -1).max(0), 0 if signed else -np.inf)
    return values


@contextmanager
def one_thread() -> Iterator[None]:
    """Small matrices are solved several times faster by one thread than by two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def discrepancies(banks: Banks, pairs: Array, settings: Settings, split: Split, signed: bool) -> Array:
    """Disc of each pair (P,): the error difference of a classifier that is right on one source and wrong on the other.

    With more than two labels, the largest over one label against the rest.
    """
    rows, block = banks.rows, banks.block(pairs)
    weights, second = block.values(rows.mean_weights(split.fit)), block.at(block.second)
    signs = block.values(rows.mean_weights(split.test)) * (2 * second.double() - 1)
    values = []
    for label in range(1 if rows.classes == 2 else 0, rows.classes):
        y = block.values(rows.y == label)
        t = torch.where(second, 1 - y, y)
        scores = _fitted(block, t, weights, torch.zeros_like(t), None, patience=1)
        values.append((((scores >= 0) != y.bool()) * signs).sum(-1))
    return _numbers(values, signed)


def disparities(banks: Banks, pairs: Array, settings: Settings, split: Split, signed: bool) -> Array:
    """Disp of each ordered pair (P,): how much more unfair a classifier is on the first source, when made to be so.

    With more than two groups, the largest over classifiers that tell one group from the rest; with several conditions
    (equalized odds), the largest over them.
    """
    rows, block = banks.rows, banks.block(pairs)
    values = []
    for condition in conditions(rows, settings.fairness):
        for group in range(1 if rows.groups == 2 else rows.groups):
            z = rows.a == group
            fit = condition & split.fit
            inside, outside = rows.mean_weights(fit & z), rows.mean_weights(fit & ~z)
            u, v = block.of_first((inside + outside) / 2), block.of_second(inside - outside)
            scores = _fitted(block, block.values(z), u, v, _starts(banks, pairs, z, fit))
            values.append(_gap_difference(rows, block, scores >= 0, condition & split.test))
    return _numbers(values, signed)


def _numbers(values: list[Tensor], signed: bool) -> Array:
    stacked = torch.stack(values).cpu().numpy()
    result: Array = (stacked if signed else np.abs(stacked)).max(0)
    return result


def _gap_difference(rows: Rows, block: Block, predicted: Tensor, mask: Array) -> Tensor:
    """Gamma of the predictions on the first source minus Gamma on the second (P,): gaps between positive rates."""
    weights = [block.values(rows.mean_weights(mask & (rows.a == group))) for group in range(rows.groups)]
    gaps = []
    for side in (block.at(~block.second), block.at(block.second)):
        rates = torch.stack([(predicted * side * weight).sum(-1) for weight in weights])
        gaps.append(rates.amax(0) - rates.amin(0))
    return gaps[0] - gaps[1]


def _fitted(block: Block, t: Tensor, u: Tensor, v: Tensor, start: Tensor | None, patience: int = 3) -> Tensor:
    """Scores of the block's rows by the classifiers that minimise the problems."""
    width = block.sides[0].x.shape[-1]
    ridge = torch.zeros(len(t), width, dtype=t.dtype, device=t.device)
    curvature = None if width <= NEWTON_COLUMNS + 1 else LBFGS
    problems = Problems(block.sides, t, u, v, ridge)
    theta = minimise(problems, ridge if start is None else start, curvature=curvature, patience=patience)
    return torch.cat(problems.scores(theta), dim=1)


def _starts(banks: Banks, pairs: Array, z: Array, fit: Array) -> Tensor:
    """Where the disparity begins (P, d+1): the first source's own L2 logistic regression of the group, C = 1.

    The penalty is on standardised columns. It depends on the first source alone, so it is fitted once for each.
    """
    sources, which = np.unique(pairs[:, 0], return_inverse=True)
    own = banks.block(sources[:, None])
    used = own.values(fit)
    t = own.values(z)
    width = own.sides[0].x.shape[-1]
    ridge = torch.zeros(len(sources), width, dtype=t.dtype, device=t.device)
    ridge[:, :-1] = torch.from_numpy(_variances(banks.rows)[sources]).to(t.device)
    problems = Problems(own.sides, t, used, torch.zeros_like(t), ridge)
    curvature = None if width <= NEWTON_COLUMNS + 1 else LBFGS
    theta = minimise(problems, torch.zeros_like(ridge), curvature=curvature, patience=1)
    return theta[torch.from_numpy(which).to(t.device)]


def _variances(rows: Rows) -> Array:
    """(n, d), of the columns within each source; 1 for a constant column."""
    sums = np.add.reduceat(rows.x, rows.starts) / rows.sizes[:, None]
    squares = np.add.reduceat(rows.x**2, rows.starts) / rows.sizes[:, None]
    variance = squares - sums**2
    # Below the rounding error of the subtraction.
    result: Array = np.where(variance <= 1e-12 * (1 + sums**2), 1.0, variance)
    return result
