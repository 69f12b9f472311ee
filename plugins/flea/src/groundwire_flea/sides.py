"""Products with the rows of a few sources that many problems share, without a copy of the rows for each problem."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor


class Bank:
    """The rows of S sources, (S, m, D), and the products of their columns, made when first needed.

    Example:
        >>> Bank(torch.ones(2, 3, 4)).squares.shape
        torch.Size([2, 10, 3])
    """

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def only(self, sources: Tensor) -> Bank:
        """The rows of some sources."""
        bank = Bank(self.x[sources])
        if "squares" in vars(self):
            bank.squares = self.squares[sources]
        return bank

    @cached_property
    def squares(self) -> Tensor:
        """(S, D (D + 1) / 2, m), the products of each two columns."""
        columns = self.x.mT.contiguous()
        width = columns.shape[1]
        return torch.cat([columns[:, i : i + 1] * columns[:, i:] for i in range(width)], dim=1)

    @cached_property
    def unpack(self) -> Tensor:
        """(D, D), where in ``squares`` the product of two columns stands."""
        row, column = self._pairs
        place = torch.empty(2 * self.x.shape[-1:], dtype=torch.long, device=self.x.device)
        place[row, column] = place[column, row] = torch.arange(len(row), device=self.x.device)
        return place

    @property
    def _pairs(self) -> Tensor:
        return torch.triu_indices(self.x.shape[-1], self.x.shape[-1], device=self.x.device)


class Side:
    """One source's rows in each of P problems.

    Problems of the same source are put next to each other, so that every product is one batched matrix product over
    the sources.

    Args:
        bank: The rows of S sources.
        which: (P,), the source of each problem.
    """

    def __init__(self, bank: Bank, which: Tensor) -> None:
        counts = torch.bincount(which, minlength=len(bank.x))
        used = counts.nonzero().squeeze(-1)
        # A few idle sources in each product cost less than a copy of the others.
        if 2 * len(used) <= len(bank.x):
            bank, which, counts = bank.only(used), torch.searchsorted(used, which), counts[used]
        self.bank, self.which = bank, which
        order, places = torch.argsort(which, stable=True), torch.arange(len(which), device=which.device)
        width = int(counts.max())
        rank = torch.empty_like(which)
        rank[order] = places - (counts.cumsum(0) - counts)[which[order]]
        # A place that no problem fills holds problem 0, and its result is never read.
        self._slot = which * width + rank
        self._table = torch.zeros(len(bank.x) * width, dtype=torch.long, device=which.device)
        self._table[self._slot] = places

    @property
    def x(self) -> Tensor:
        """(S, m, D), the rows."""
        return self.bank.x

    def take(self, index: Tensor) -> Side:
        """The problems ``index``."""
        return Side(self.bank, self.which[index])

    def scores(self, theta: Tensor) -> Tensor:
        """X theta for theta (P, D): (P, m)."""
        return self._product(theta, self.x.mT)

    def pull(self, weights: Tensor) -> Tensor:
        """X' weights for weights (P, m): (P, D)."""
        return self._product(weights, self.x)

    def gram(self, weights: Tensor) -> Tensor:
        """X' diag(weights) x for weights (P, m): (P, D, D)."""
        return self._product(weights, self.bank.squares.mT)[:, self.bank.unpack]

    def shared_gram(self, weights: Tensor) -> Tensor:
        """As :meth:`gram`, for weights that are equal in all problems of a source."""
        one = weights[self._table.view(len(self.x), -1)[:, 0]]
        return ((self.x * one.unsqueeze(-1)).mT @ self.x)[self.which]

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        laid = left.index_select(0, self._table).view(len(right), -1, left.shape[1])
        return torch.bmm(laid, right).flatten(0, 1).index_select(0, self._slot)
