"""Rows of an evaluation pass, matched with those of another pass over the same data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from groundwire_bias_audit.audit.change import pair_counts
from groundwire_bias_audit.audit.groups import Groups, read_groups
from groundwire_bias_audit.audit.predictions import Outputs
from groundwire_bias_audit.audit.rates import Counts

#: Ids of different loaders are kept apart by this.
LOADER_STEP = 2**40


@dataclass(frozen=True)
class ScoredRows:
    """The rows of a pass, in order.

    Attributes:
        outputs: Labels, predictions and scores.
        features: Group values of each row.
        ids: Data set index plus ``LOADER_STEP`` times the loader's number, or None where there are none.
    """

    outputs: Outputs
    features: Mapping[str, list[Any]]
    ids: NDArray[np.int64] | None

    @property
    def sample_ids(self) -> NDArray[np.int64] | None:
        """Data set index of each row, of whatever loader."""
        return None if self.ids is None else self.ids % LOADER_STEP

    def take(self, rows: NDArray[Any]) -> ScoredRows:
        """Only ``rows``, in that order."""
        o = self.outputs
        scores = None if o.scores is None else o.scores[rows]
        features = {name: [values[i] for i in rows] for name, values in self.features.items()}
        kept = replace(o, labels=o.labels[rows], predictions=o.predictions[rows], scores=scores)
        return ScoredRows(kept, features, None if self.ids is None else self.ids[rows])


def aligned(first: ScoredRows, second: ScoredRows) -> ScoredRows | None:
    """``second`` in the rows of ``first``, or None if they cannot be matched.

    By id; where there are none, by position if the labels agree, as they do without shuffling.
    """
    if first.outputs.rows != second.outputs.rows:
        return None
    if first.ids is not None and second.ids is not None:
        if (first.ids == second.ids).all():
            return second
        a, b = np.argsort(first.ids, kind="stable"), np.argsort(second.ids, kind="stable")
        if (first.ids[a] != second.ids[b]).any():
            return None
        order = np.empty_like(a)
        order[a] = b
        return second.take(order)
    return second if np.array_equal(first.outputs.labels, second.outputs.labels) else None


def codes_of(rows: ScoredRows, groups: Groups) -> NDArray[np.int64]:
    """Cell of each row in ``groups``."""
    read = read_groups(rows.features, rows=rows.outputs.rows, max_groups=10**9)
    assert read.codes is not None
    places = [
        np.array([groups.levels[i].index(value) for value in read.levels[i]], np.int64)
        for i in range(len(groups.levels))
    ]
    coordinates = np.unravel_index(read.codes, read.shape)
    found: NDArray[np.int64] = np.ravel_multi_index(
        tuple(place[c] for place, c in zip(places, coordinates, strict=True)), groups.shape
    )
    return found


def paired_counts(first: ScoredRows, second: ScoredRows, groups: Groups) -> tuple[Counts, Counts]:
    """Counts of pairs and flips (:func:`pair_counts`) of two passes over the same rows in the same order."""
    return pair_counts(codes_of(first, groups), first.outputs, second.outputs, groups.size)
