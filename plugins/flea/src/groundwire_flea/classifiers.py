"""The classifiers that differ most between two sources, and by how much, for many pairs at once."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from groundwire_flea.curvature import LBFGS
from groundwire_flea.functional import Array
from groundwire_flea.minimise import minimise
from groundwire_flea.problems import Problems
from groundwire_flea.rows import Banks, Block, Rows
from groundwire_flea.settings import Settings, Split

#: Beyond so many columns the Hessians cost more than the steps that they save.
NEWTON_COLUMNS = 30


def conditions(rows: Rows, fairness: str) -> list[Array]:
    """The rows (R,) within which groups are compared: all; those of the positive label; those of each label."""
    if fairness == "demographic_parity":
        return [np.ones(len(rows.y), dtype=bool)]
    labels = [rows.positive] if fairness == "equal_opportunity" else range(rows.classes)
    return [rows.y == label for label in labels]


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
