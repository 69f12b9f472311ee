"""Discrepancy, disparity and disbalance of all pairs of sources, many pairs at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import joblib
import numpy as np
import torch

from groundwire_flea.classifiers import conditions, discrepancies, disparities
from groundwire_flea.engines import one_thread, run
from groundwire_flea.functional import Array, disbalance, total_distance
from groundwire_flea.rows import Banks, Rows, blocks
from groundwire_flea.settings import Settings, Split


@dataclass(frozen=True)
class Distances:
    """The three distances between all sources, each (n, n) and symmetric; 0 where a component was left out."""

    disc: Array
    disp: Array
    disb: Array

    def total(self, aggregation: str = "sum") -> Array:
        """D."""
        return total_distance(self.disc, self.disp, self.disb, aggregation)


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
    for part, values in zip(work, run(jobs, settings), strict=True):
        found[:, part[:, 0], part[:, 1]] = found[:, part[:, 1], part[:, 0]] = values
    return found[0], found[1]


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
