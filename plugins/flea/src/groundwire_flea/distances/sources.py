"""The rows of all sources as arrays, and the conditions within which fairness compares groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

Fairness = Literal["demographic_parity", "equal_opportunity", "equalized_odds"]
FAIRNESS: tuple[str, ...] = get_args(Fairness)


@dataclass(frozen=True)
class Sources:
    """All rows, those of one source next to each other, in order of the sources' first appearance.

    Attributes:
        x: (R, d) float64. Shifted and scaled by columns, which no result depends on.
        y: (R,) label codes 0..classes-1.
        a: (R,) group codes 0..groups-1.
        sizes: (n,) rows of each source.
        classes: Number of label values.
        groups: Number of groups.
        positive: The label code that equal opportunity is about.
    """

    x: NDArray[Any]
    y: NDArray[Any]
    a: NDArray[Any]
    sizes: NDArray[Any]
    classes: int
    groups: int
    positive: int = 1

    @property
    def n(self) -> int:
        """Number of sources."""
        return len(self.sizes)

    @cached_property
    def source(self) -> NDArray[Any]:
        """(R,) number of each row's source."""
        source: NDArray[Any] = np.repeat(np.arange(self.n), self.sizes)
        return source

    @cached_property
    def starts(self) -> NDArray[Any]:
        """(n,) first row of each source."""
        starts: NDArray[Any] = np.cumsum(self.sizes) - self.sizes
        return starts

    def conditions(self, fairness: str) -> list[NDArray[Any]]:
        """The rows (R,) within which groups are compared: all; those of the positive label; those of each label."""
        if fairness == "demographic_parity":
            return [np.ones(len(self.y), dtype=bool)]
        labels = [self.positive] if fairness == "equal_opportunity" else range(self.classes)
        return [self.y == label for label in labels]

    def mean_weights(self, mask: NDArray[Any]) -> NDArray[Any]:
        """(R,) weights whose sum with a column is its mean over the masked rows of each source; 0 elsewhere.

        Example:
            >>> data = Sources(np.zeros((3, 1)), np.zeros(3), np.zeros(3), np.array([1, 2]), 2, 2)
            >>> data.mean_weights(np.array([True, True, True]))
            array([1. , 0.5, 0.5])
        """
        counts = np.bincount(self.source, mask, minlength=self.n)
        weights: NDArray[Any] = mask / np.maximum(counts, 1)[self.source]
        return weights

    def frequency(self, mask: NDArray[Any]) -> NDArray[Any]:
        """(n,) share of the masked rows in each source."""
        frequency: NDArray[Any] = np.bincount(self.source, mask, minlength=self.n) / self.sizes
        return frequency

    def group_counts(self) -> NDArray[Any]:
        """(n, groups) rows of each group in each source."""
        counts = [self.frequency(self.a == group) * self.sizes for group in range(self.groups)]
        return np.stack(counts, axis=1)

    def label_gap(self) -> NDArray[Any]:
        """(n,) the largest difference between groups in the frequency of a label."""
        gaps = []
        for label in range(self.classes):
            rates = [
                self.frequency((self.y == label) & (self.a == g)) / self.frequency(self.a == g)
                for g in range(self.groups)
            ]
            gaps.append(np.max(rates, axis=0) - np.min(rates, axis=0))
        result: NDArray[Any] = np.max(gaps, axis=0)
        return result

    def permuted(self, order: NDArray[Any]) -> Sources:
        """The same sizes with other rows."""
        return replace(self, x=self.x[order], y=self.y[order], a=self.a[order])

    def only(self, sources: NDArray[Any]) -> Sources:
        """The rows of some sources, in their order."""
        index = np.flatnonzero(np.isin(self.source, sources))
        return replace(self.permuted(index), sizes=self.sizes[sources])

    def followed_by(self, other: Sources) -> Sources:
        """The rows of more sources after these."""
        x, y, a, sizes = (
            np.concatenate([getattr(self, name), getattr(other, name)]) for name in ("x", "y", "a", "sizes")
        )
        return replace(self, x=x, y=y, a=a, sizes=sizes)


def check_sources(
    data: Sources, ids: Sequence[Any], labels: Sequence[Any], groups: Sequence[Any], fairness: str
) -> None:
    """Refuse sources between which the distances are not defined.

    Args:
        data: The rows.
        ids: (n,) names of the sources.
        labels: Label values in code order.
        groups: Group values in code order.
        fairness: The notion of fairness, which says where a group must occur.

    Raises:
        ValueError: There are fewer than 3, or one lacks a label or a group.
    """
    if data.n < 3:
        raise ValueError(
            f"{data.n} sources ({', '.join(map(repr, ids))}) cannot be compared -> FLEA needs at least 3, of which "
            "more than half are clean"
        )
    cells = [(data.y == code, f"with label {label!r}") for code, label in enumerate(labels)]
    where_of = {"demographic_parity": [""], "equal_opportunity": [f" and label {labels[data.positive]!r}"]}
    wheres = where_of.get(fairness, [f" and label {label!r}" for label in labels])
    for within, where in zip(data.conditions(fairness), wheres, strict=True):
        cells += [(within & (data.a == code), f"of group {group!r}{where}") for code, group in enumerate(groups)]
    missing = [
        f"source {ids[i]!r} ({data.sizes[i]} rows) has no row {cell}"
        for mask, cell in cells
        for i in np.flatnonzero(data.frequency(mask) == 0).tolist()
    ]
    if missing:
        more = f"; and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise ValueError(
            f"{'; '.join(missing[:5])}{more} -> the distances are not defined there: leave such sources out, or "
            "join small ones"
        )
