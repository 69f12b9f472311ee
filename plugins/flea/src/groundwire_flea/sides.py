"""Products with the rows of a few sources that many problems share, without a copy of the rows for each problem."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor


class Side:
    """One source's rows in each of P problems.

    Problems of the same source are put next to each other, so that every product is one batched matrix product over
    the sources.

    Args:
        x: (S, m, D), the rows of S sources.
        which: (P,), the source of each problem.
        squares: Products of the columns of ``x``, made when first needed.
    """

    def __init__(self, x: Tensor, which: Tensor, squares: Tensor | None = None) -> None:
        used, which = which.unique(return_inverse=True)
        every = len(used) == len(x)
        self.x = x if every else x[used]
        self._squares = squares if every or squares is None else squares[used]
        self.which = which
        counts = torch.bincount(which, minlength=len(used))
        order = torch.argsort(which, stable=True)
        width = int(counts.max())
        rank = torch.empty_like(which)
        rank[order] = torch.arange(len(which), device=which.device) - (counts.cumsum(0) - counts)[which[order]]
        # A place that no problem fills holds problem 0, and its result is never read.
        self._slot = which * width + rank
        self._table = torch.zeros(len(used) * width, dtype=torch.long, device=which.device)
        self._table[self._slot] = torch.arange(len(which), device=which.device)
        self._table = self._table.view(len(used), width)

    def take(self, index: Tensor) -> Side:
        """The problems ``index``."""
        return Side(self.x, self.which[index], self._squares)

    def scores(self, theta: Tensor) -> Tensor:
        """x theta for theta (P, D): (P, m)."""
        return self._product(theta, self.x.mT)

    def pull(self, weights: Tensor) -> Tensor:
        """x' weights for weights (P, m): (P, D)."""
        return self._product(weights, self.x)

    def gram(self, weights: Tensor) -> Tensor:
        """x' diag(weights) x for weights (P, m): (P, D, D)."""
        if self._squares is None:
            self._squares = self._column_products()
        return self._product(weights, self._squares.mT)[:, self._unpack]

    def shared_gram(self, weights: Tensor) -> Tensor:
        """As :meth:`gram`, for weights that are equal in all problems of a source."""
        one = weights[self._table[:, 0]]
        return ((self.x * one.unsqueeze(-1)).mT @ self.x)[self.which]

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        return torch.bmm(left[self._table], right).flatten(0, 1)[self._slot]

    def _column_products(self) -> Tensor:
        """(S, D (D + 1) / 2, m), the products of each two columns."""
        columns = self.x.mT.contiguous()
        row, column = torch.triu_indices(self.x.shape[-1], self.x.shape[-1], device=self.x.device)
        return columns[:, row] * columns[:, column]

    @cached_property
    def _unpack(self) -> Tensor:
        """(D, D), where the product of two columns stands."""
        columns = self.x.shape[-1]
        row, column = torch.triu_indices(columns, columns, device=self.x.device)
        place = torch.empty(columns, columns, dtype=torch.long, device=self.x.device)
        place[row, column] = place[column, row] = torch.arange(len(row), device=self.x.device)
        return place
