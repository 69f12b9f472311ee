"""Pairs of sources in batches: rows padded to one length, and products with rows that many problems share.

A source takes part in many pairs. Its rows are stored once; every product of a batch is one batched matrix product
over the sources, without a copy of the rows for each pair.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from groundwire_flea.distances.sources import Sources

#: Rows of all pairs of a batch together, which bounds its memory.
MAX_ROWS = 500_000


class PaddedRows:
    """The rows of S sources, (S, m, D), and the products of their columns, made when first needed.

    Example:
        >>> PaddedRows(torch.ones(2, 3, 4)).column_products.shape
        torch.Size([2, 10, 3])
    """

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def only(self, sources: Tensor) -> PaddedRows:
        """The rows of some sources."""
        rows = PaddedRows(self.x[sources])
        if "column_products" in vars(self):
            rows.column_products = self.column_products[sources]
        return rows

    @cached_property
    def column_products(self) -> Tensor:
        """(S, D (D + 1) / 2, m), the products of each two columns."""
        columns = self.x.mT.contiguous()
        width = columns.shape[1]
        return torch.cat([columns[:, i : i + 1] * columns[:, i:] for i in range(width)], dim=1)

    @cached_property
    def product_index(self) -> Tensor:
        """(D, D), where in ``column_products`` the product of two columns stands."""
        width = self.x.shape[-1]
        row, column = torch.triu_indices(width, width, device=self.x.device)
        place = torch.empty(width, width, dtype=torch.long, device=self.x.device)
        place[row, column] = place[column, row] = torch.arange(len(row), device=self.x.device)
        return place


class Design:
    """The design matrices of P problems, each of which is the rows of one source.

    Problems of the same source are put next to each other, so that every product is one batched matrix product over
    the sources.

    Args:
        rows: The rows of S sources.
        which: (P,), the source of each problem.
    """

    def __init__(self, rows: PaddedRows, which: Tensor) -> None:
        counts = torch.bincount(which, minlength=len(rows.x))
        used = counts.nonzero().squeeze(-1)
        # A few idle sources in each product cost less than a copy of the others.
        if 2 * len(used) <= len(rows.x):
            rows, which, counts = rows.only(used), torch.searchsorted(used, which), counts[used]
        self.rows, self.which = rows, which
        order, places = torch.argsort(which, stable=True), torch.arange(len(which), device=which.device)
        width = int(counts.max())
        rank = torch.empty_like(which)
        rank[order] = places - (counts.cumsum(0) - counts)[which[order]]
        # A place that no problem fills holds problem 0, and its result is never read.
        self._slot = which * width + rank
        self._table = torch.zeros(len(rows.x) * width, dtype=torch.long, device=which.device)
        self._table[self._slot] = places

    @property
    def x(self) -> Tensor:
        """(S, m, D), the rows."""
        return self.rows.x

    def take(self, index: Tensor) -> Design:
        """The problems ``index``."""
        return Design(self.rows, self.which[index])

    def scores(self, theta: Tensor) -> Tensor:
        """X theta for theta (P, D): (P, m)."""
        return self._product(theta, self.x.mT)

    def transposed(self, weights: Tensor) -> Tensor:
        """X' weights for weights (P, m): (P, D)."""
        return self._product(weights, self.x)

    def gram(self, weights: Tensor) -> Tensor:
        """X' diag(weights) X for weights (P, m): (P, D, D)."""
        return self._product(weights, self.rows.column_products.mT)[:, self.rows.product_index]

    def shared_gram(self, weights: Tensor) -> Tensor:
        """As :meth:`gram`, for weights that are equal in all problems of a source."""
        one = weights[self._table.view(len(self.x), -1)[:, 0]]
        return ((self.x * one.unsqueeze(-1)).mT @ self.x)[self.which]

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        laid = left.index_select(0, self._table).view(len(right), -1, left.shape[1])
        return torch.bmm(laid, right).flatten(0, 1).index_select(0, self._slot)


@dataclass(frozen=True)
class PairBatch:
    """Pairs of sources that are solved together: the first sources' rows, padded to m1, then the second ones', to m2.

    Attributes:
        designs: The rows, with a last column of 1.
        index: (P, m1 + m2), number of each row; 0 where there is none.
        valid: (P, m1 + m2), whether there is a row.
        second: (m1 + m2,), whether the row is of the second source.
    """

    designs: tuple[Design, ...]
    index: NDArray[Any]
    valid: NDArray[Any]
    second: NDArray[Any]

    @property
    def width(self) -> int:
        """D, the number of columns with the last one of 1."""
        return self.designs[0].x.shape[-1]

    def values(self, of_rows: NDArray[Any]) -> Tensor:
        """(P, m1 + m2) from (R,), float64; 0 where there is no row."""
        found = np.where(self.valid, of_rows[self.index], 0).astype(np.float64)
        return torch.from_numpy(found).to(self.designs[0].x.device)

    def of_first(self, of_rows: NDArray[Any]) -> Tensor:
        """As :meth:`values`, 0 in the second source."""
        return self.values(of_rows) * self.on_device(~self.second)

    def of_second(self, of_rows: NDArray[Any]) -> Tensor:
        """As :meth:`values`, 0 in the first source."""
        return self.values(of_rows) * self.on_device(self.second)

    def on_device(self, mask: NDArray[Any]) -> Tensor:
        """A mask of rows as a tensor on the batch's device."""
        return torch.from_numpy(mask).to(self.designs[0].x.device)


class PaddedSources:
    """Sources whose rows are padded and put on a device, each set of sources once."""

    def __init__(self, data: Sources, device: Any = "cpu") -> None:
        self.data, self._device = data, device
        self._padded: dict[tuple[int, ...], PaddedRows] = {}

    def rows(self, sources: NDArray[Any]) -> PaddedRows:
        """The rows of ``sources`` (S,), padded with zeros, with a last column of 1."""
        key = tuple(sources.tolist())
        if key not in self._padded:
            index, valid = padded_index(self.data, sources)
            x = np.concatenate([self.data.x[index], np.ones((*index.shape, 1))], axis=-1) * valid[..., None]
            self._padded[key] = PaddedRows(torch.from_numpy(x).to(self._device))
        return self._padded[key]

    def batch(self, pairs: NDArray[Any]) -> PairBatch:
        """The pairs (P, 2) of sources; for (P, 1), single sources. The sources of a column are of similar sizes."""
        similar = len(set(size_class(self.data.sizes[pairs]).ravel())) == 1
        columns = [np.unique(pairs if similar else column) for column in pairs.T]
        designs, indices, valids = [], [], []
        for used, column in zip(columns, pairs.T, strict=True):
            which = np.searchsorted(used, column)
            index, valid = padded_index(self.data, used)
            designs.append(Design(self.rows(used), torch.from_numpy(which).to(self._device)))
            indices.append(index[which])
            valids.append(valid[which])
        second = np.repeat([False, True][: len(indices)], [index.shape[1] for index in indices])
        return PairBatch(tuple(designs), np.concatenate(indices, axis=1), np.concatenate(valids, axis=1), second)


def padded_index(data: Sources, sources: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """(S, m) the number of each row of ``sources``, and whether there is one."""
    place = np.arange(data.sizes[sources].max())[None]
    valid = place < data.sizes[sources][:, None]
    return np.where(valid, data.starts[sources][:, None] + place, 0), valid


def size_class(sizes: NDArray[Any]) -> NDArray[Any]:
    """The power of two that a size is at most."""
    result: NDArray[Any] = np.ceil(np.log2(sizes)).astype(int)
    return result


def pair_batches(sizes: NDArray[Any], pairs: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Divide pairs into batches of sources of similar sizes, so that little is padded.

    The division depends on the data alone, never on the number of workers, so neither do results.
    """
    first, second = pairs.T
    kinds = size_class(sizes[pairs])
    order = np.lexsort((second, first, kinds[:, 1], kinds[:, 0]))
    kinds = kinds[order]
    borders = np.flatnonzero((np.diff(kinds, axis=0) != 0).any(1)) + 1
    for part in np.split(order, borders):
        rows = int(sizes[first[part]].max() + sizes[second[part]].max())
        many = max(1, MAX_ROWS // rows)
        yield from (pairs[part[begin : begin + many]] for begin in range(0, len(part), many))
