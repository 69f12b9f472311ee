"""The rows of all sources in one array, and blocks of pairs of sources cut out of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from groundwire_flea.functional import Array
from groundwire_flea.sides import Bank, Side

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

    @cached_property
    def source(self) -> Array:
        """(R,) number of each row's source."""
        return np.repeat(np.arange(self.n), self.sizes)

    @cached_property
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

    def only(self, sources: Array) -> Rows:
        """The rows of some sources, in their order."""
        index = np.flatnonzero(np.isin(self.source, sources))
        return replace(self.permuted(index), sizes=self.sizes[sources])

    def followed_by(self, other: Rows) -> Rows:
        """The rows of more sources after these."""
        x, y, a, sizes = (
            np.concatenate([getattr(self, name), getattr(other, name)]) for name in ("x", "y", "a", "sizes")
        )
        return replace(self, x=x, y=y, a=a, sizes=sizes)


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


class Banks:
    """The rows of groups of sources as tensors, each made once."""

    def __init__(self, rows: Rows, device: Any = "cpu") -> None:
        self.rows, self._device = rows, device
        self._made: dict[tuple[int, ...], Bank] = {}

    def of(self, sources: Array) -> Bank:
        """The rows of ``sources`` (S,), padded with zeros, with a last column of 1."""
        key = tuple(sources.tolist())
        if key not in self._made:
            index, valid = padded(self.rows, sources)
            x = np.concatenate([self.rows.x[index], np.ones((*index.shape, 1))], axis=-1) * valid[..., None]
            self._made[key] = Bank(torch.from_numpy(x).to(self._device))
        return self._made[key]

    def block(self, pairs: Array) -> Block:
        """The pairs (P, 2) of sources; for (P, 1), single sources. The sources of a column are of similar sizes."""
        similar = len(set(magnitude(self.rows.sizes[pairs]).ravel())) == 1
        columns = [np.unique(pairs if similar else column) for column in pairs.T]
        sides, indices, valids = [], [], []
        for used, column in zip(columns, pairs.T, strict=True):
            which = np.searchsorted(used, column)
            index, valid = padded(self.rows, used)
            sides.append(Side(self.of(used), torch.from_numpy(which).to(self._device)))
            indices.append(index[which])
            valids.append(valid[which])
        second = np.repeat([False, True][: len(indices)], [index.shape[1] for index in indices])
        return Block(tuple(sides), np.concatenate(indices, axis=1), np.concatenate(valids, axis=1), second)


def padded(rows: Rows, sources: Array) -> tuple[Array, Array]:
    """(S, m) the number of each row of ``sources``, and whether there is one."""
    place = np.arange(rows.sizes[sources].max())[None]
    valid = place < rows.sizes[sources][:, None]
    return np.where(valid, rows.starts[sources][:, None] + place, 0), valid


def magnitude(sizes: Array) -> Array:
    """The power of two that a size is at most."""
    result: Array = np.ceil(np.log2(sizes)).astype(int)
    return result


def blocks(sizes: Array, pairs: Array) -> Iterator[Array]:
    """Divide pairs into blocks of sources of similar sizes, so that little is padded.

    The division depends on the data alone, never on the number of workers, so neither do results.
    """
    first, second = pairs.T
    kinds = magnitude(sizes[pairs])
    order = np.lexsort((second, first, kinds[:, 1], kinds[:, 0]))
    kinds = kinds[order]
    borders = np.flatnonzero((np.diff(kinds, axis=0) != 0).any(1)) + 1
    for part in np.split(order, borders):
        rows = int(sizes[first[part]].max() + sizes[second[part]].max())
        many = max(1, BLOCK // rows)
        yield from (pairs[part[begin : begin + many]] for begin in range(0, len(part), many))
