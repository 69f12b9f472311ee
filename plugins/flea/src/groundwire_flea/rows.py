"""The rows of all sources in one array, and blocks of pairs of sources cut out of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from groundwire_flea.functional import Array

#: Numbers in the largest array of a block: what a processor's cache holds is solved fastest.
BLOCK = 400_000


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

    def only(self, sources: Sequence[int]) -> Rows:
        """The rows of some sources, in their order."""
        starts = self.starts
        index = np.concatenate([np.arange(starts[i], starts[i] + self.sizes[i]) for i in sources])
        return replace(self.permuted(index), sizes=self.sizes[list(sources)])


@dataclass(frozen=True)
class Block:
    """Pairs of sources that are solved together.

    Attributes:
        x: (P, M, d+1), both sources' rows below each other, each pair standardised; the last column is 1.
        index: (P, M) number of each row; 0 where there is none.
        valid: (P, M) whether there is a row.
        second: (P, M) whether the row is of the pair's second source.
        shift: (P, d) and
        scale: (P, d): ``x = (raw - shift) / scale``.
    """

    x: Tensor
    index: Array
    valid: Tensor
    second: Tensor
    shift: Tensor
    scale: Tensor

    def values(self, of_rows: Array) -> Tensor:
        """(P, M) from (R,); 0 where there is no row."""
        found = torch.from_numpy(of_rows.astype(np.float64)[self.index]).to(self.x.device)
        return found * self.valid

    def of_first(self, of_rows: Array) -> Tensor:
        """As :meth:`values`, 0 in the second source."""
        return self.values(of_rows) * ~self.second

    def of_second(self, of_rows: Array) -> Tensor:
        """As :meth:`values`, 0 in the first source."""
        return self.values(of_rows) * self.second


def block_of(rows: Rows, pairs: Array, device: Any = "cpu") -> Block:
    """Cut the pairs (P, 2) out of ``rows``.

    A pair's columns depend on the rows of its two sources only, so a source that comes later changes no old pair.
    """
    first, second = pairs.T
    sizes, starts = rows.sizes, rows.starts
    place = np.arange((sizes[first] + sizes[second]).max())[None]
    inner = place < sizes[first][:, None]
    index = np.where(inner, starts[first][:, None] + place, (starts[second] - sizes[first])[:, None] + place)
    valid = place < (sizes[first] + sizes[second])[:, None]
    index[~valid] = 0
    shift, scale = pair_scaling(rows, first, second)
    x = np.ones((*index.shape, rows.x.shape[1] + 1))
    x[..., :-1] = (rows.x[index] - shift[:, None]) / scale[:, None]
    tensors = (torch.from_numpy(v).to(device) for v in (x, valid, ~inner, shift, scale))
    x_, valid_, second_, shift_, scale_ = tensors
    return Block(x_, index, valid_, second_, shift_, scale_)


def pair_scaling(rows: Rows, first: Array, second: Array) -> tuple[Array, Array]:
    """Mean and standard deviation of the columns over the rows of each pair, (P, d) each; 1 for constant columns."""
    starts = rows.starts
    sums = np.add.reduceat(rows.x, starts)
    squares = np.add.reduceat(rows.x**2, starts)
    total = (rows.sizes[first] + rows.sizes[second])[:, None]
    mean = (sums[first] + sums[second]) / total
    variance = (squares[first] + squares[second]) / total - mean**2
    # Below the rounding error of the subtraction, a column is constant.
    constant = variance <= 1e-12 * (1 + mean**2)
    return mean, np.sqrt(np.where(constant, 1.0, variance))


def blocks(sizes: Array, pairs: Array, columns: int, limit: int = BLOCK) -> Iterator[Array]:
    """Divide pairs into blocks of similar numbers of rows, so that little is padded.

    The division depends on the data alone, never on the number of workers, so neither do results.
    """
    rows = sizes[pairs].sum(1)
    order = np.argsort(-rows, kind="stable")
    begin = 0
    while begin < len(order):
        many = max(1, limit // int(rows[order[begin]] * (columns + 1)))
        yield pairs[order[begin : begin + many]]
        begin += many
