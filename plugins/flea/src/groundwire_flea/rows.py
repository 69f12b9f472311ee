"""The rows of all sources in one array, and blocks of pairs of sources cut out of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from groundwire_flea.functional import Array
from groundwire_flea.sides import Side

#: Rows of all pairs of a block together, which bounds its memory.
BLOCK = 500_000


@dataclass(frozen=True)
class Rows:
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

    x: Array
    y: Array
    a: Array
    sizes: Array
    classes: int
    groups: int
    positive: int = 1

    @property
    def n(self) -> int:
        """Number of sources."""
        return len(self.sizes)

    @property
    def source(self) -> Array:
        """(R,) number of each row's source."""
        return np.repeat(np.arange(self.n), self.sizes)

    @property
    def starts(self) -> Array:
        """(n,) first row of each source."""
        return np.cumsum(self.sizes) - self.sizes

    def mean_weights(self, mask: Array) -> Array:
        """(R,) weights whose sum with a column is its mean over the masked rows of each source; 0 elsewhere.

        Example:
            >>> rows = Rows(np.zeros((3, 1)), np.zeros(3), np.zeros(3), np.array([1, 2]), 2, 2)
            >>> rows.mean_weights(np.array([True, True, True]))
            array([1. , 0.5, 0.5])
        """
        counts = np.bincount(self.source, mask, minlength=self.n)
        weights: Array = mask / np.maximum(counts, 1)[self.source]
        return weights

    def frequency(self, mask: Array) -> Array:
        """(n,) share of the masked rows in each source."""
        frequency: Array = np.bincount(self.source, mask, minlength=self.n) / self.sizes
        return frequency

    def permuted(self, order: Array) -> Rows:
        """The same sizes with other rows."""
        return replace(self, x=self.x[order], y=self.y[order], a=self.a[order])

    def followed_by(self, other: Rows) -> Rows:
        """The rows of more sources after these."""
        joined = {name: np.concatenate([getattr(self, name), getattr(other, name)]) for name in ("x", "y", "a", "sizes")}
        return replace(self, **joined)


@dataclass(frozen=True)
class Block:
    """Pairs of sources that are solved together: the first sources' rows, padded to m1, then the second ones', to m2.

    Attributes:
        sides: The rows, with a last column of 1.
        index: (P, m1 + m2), number of each row; 0 where there is none.
        valid: (P, m1 + m2), whether there is a row.
        second: (m1 + m2,), whether the row is of the second source.
    """

    sides: tuple[Side, ...]
    index: Array
    valid: Array
    second: Array

    def values(self, of_rows: Array) -> Tensor:
        """(P, m1 + m2) from (R,), float64; 0 where there is no row."""
        found = np.where(self.valid, of_rows[self.index], 0).astype(np.float64)
        return torch.from_numpy(found).to(self.sides[0].x.device)

    def of_first(self, of_rows: Array) -> Tensor:
        """As :meth:`values`, 0 in the second source."""
        return self.values(of_rows) * self.at(~self.second)

    def of_second(self, of_rows: Array) -> Tensor:
        """As :meth:`values`, 0 in the first source."""
        return self.values(of_rows) * self.at(self.second)

    def at(self, mask: Array) -> Tensor:
        """A mask of rows as a tensor on the block's device."""
        return torch.from_numpy(mask).to(self.sides[0].x.device)


def block_of(rows: Rows, pairs: Array, device: Any = "cpu") -> Block:
    """Cut the pairs (P, 2) out of ``rows``; for (P, 1), single sources."""
    cut = [_side(rows, column, device) for column in pairs.T]
    indices = [index for _, index, _ in cut]
    second = np.repeat([False, True][: len(cut)], [index.shape[1] for index in indices])
    valid = np.concatenate([valid for _, _, valid in cut], axis=1)
    return Block(tuple(side for side, _, _ in cut), np.concatenate(indices, axis=1), valid, second)


def _side(rows: Rows, sources: Array, device: Any) -> tuple[Side, Array, Array]:
    """The side, and (P, m) the number of each row and whether there is one."""
    used, which = np.unique(sources, return_inverse=True)
    place = np.arange(rows.sizes[used].max())[None]
    valid = place < rows.sizes[used][:, None]
    index = np.where(valid, rows.starts[used][:, None] + place, 0)
    x = np.concatenate([rows.x[index], np.ones((*index.shape, 1))], axis=-1) * valid[..., None]
    side = Side(torch.from_numpy(x).to(device), torch.from_numpy(which).to(device))
    return side, index[which], valid[which]


def blocks(sizes: Array, pairs: Array, limit: int = BLOCK) -> Iterator[Array]:
    """Divide pairs into blocks of sources of similar sizes, so that little is padded.

    The division depends on the data alone, never on the number of workers, so neither do results.
    """
    magnitude = np.ceil(np.log2(sizes)).astype(int)
    first, second = pairs.T
    order = np.lexsort((second, first, magnitude[second], magnitude[first]))
    kinds = np.stack([magnitude[first], magnitude[second]], axis=1)[order]
    borders = np.flatnonzero((np.diff(kinds, axis=0) != 0).any(1)) + 1
    for part in np.split(order, borders):
        rows = int(sizes[first[part]].max() + sizes[second[part]].max())
        many = max(1, limit // rows)
        yield from (pairs[part[begin : begin + many]] for begin in range(0, len(part), many))
